"""Reading pairs and dialogues from tiny files drawn here: every format, every fault, every way of splitting."""

import bz2
import functools
import gzip
import http.server
import io
import itertools
import json
import lzma
import os
import pickle
import posixpath
import signal
import tarfile
import tempfile
import threading
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from datasets.distributed import split_dataset_by_node
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_tokenizers import CHATML, qwen_tokenizer
from torch.utils.data import DataLoader

from modeling_vikdf.data import SkipReport, dialogues, load_dialogues, load_image_text_pairs, pairs, sources
from modeling_vikdf.data.sources import expand_braces


DATA = Path(os.environ.get("VIKDF_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}; VIKDF_DATA_DIR says where it is")


def picture(shade: int = 100, format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (4, 4), **kw) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, shade).convert(mode).save(file, format, **kw)
    return file.getvalue()


PNG = picture()


def write_tar(path, members) -> str:
    """A shard of (name, content); the path comes back."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def samples(*keys: str):
    return [member for key in keys for member in ((f"{key}.png", PNG), (f"{key}.txt", f"caption of {key}"))]


def write_shards(folder, sizes) -> str:
    """Shards with as many samples each, keys `shard-0/s0`, ...; a glob for them."""
    for shard, size in enumerate(sizes):
        write_tar(folder / f"shard-{shard}.tar", samples(*(f"s{i}" for i in range(size))))
    return str(folder / "shard-*.tar")


def keys(pairs) -> list[str]:
    return [pair["key"] for pair in pairs]


def first(examples):
    return examples[0]


@pytest.fixture(scope="module", autouse=True)
def temporary_folder(tmp_path_factory):
    """Where reports without a folder are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("t")))
        yield


@pytest.fixture
def report(tmp_path):
    return SkipReport(tmp_path / "report")


# ---- formats ----


def test_webdataset_with_every_kind_of_member(tmp_path):
    members = [
        ("a.jpg", picture(format="JPEG")),
        ("a.txt", "\ufeffone  caption \n\nanother\r\n"),
        ("b.JPEG", picture(format="JPEG")),
        ("b.json", json.dumps({"caption": "from json"})),
        ("./deep/c.png", PNG),
        ("./deep/c.json", json.dumps({"captions": ["x", "", "y"], "url": "http://nowhere"})),
        ("d.webp", picture(format="WEBP")),
        ("d.txt", ""),
        ("d.json", json.dumps({"captions": [{"raw": "raw one"}, {"raw": "raw two"}]})),
        ("README", "no extension"),
        ("._e.jpg", b"what macOS leaves behind"),
        ("e.cls", "3"),
        ("e.png", PNG),
        ("e.txt", "last"),
        ("f.png", PNG),  # named by no image
        ("f.seg.png", PNG),
        ("f.txt", "segmented"),
    ]
    pairs = list(load_image_text_pairs(write_tar(tmp_path / "s.tar", members), shuffle_buffer=0))
    assert {pair["key"]: pair["captions"] for pair in pairs} == {
        "s/a": ["one caption", "another"],
        "s/b": ["from json"],
        "s/deep/c": ["x", "y"],
        "s/d": ["raw one", "raw two"],
        "s/e": ["last"],
        "s/f": ["segmented"],
    }
    assert all(pair.keys() == {"key", "image", "captions"} for pair in pairs)
    assert all(type(pair["image"]) is Image.Image and pair["image"].mode == "RGB" for pair in pairs)


def test_image_folder_puts_the_lines_about_a_file_together(tmp_path, report):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "c.png"):
        (folder / name).write_bytes(PNG)
    lines = [
        {"file_name": "a.png", "text": "first"},
        {"file_name": "sub/b.png", "captions": ["b1", "b2"]},
        {"file_name": "a.png", "caption": "second"},
        {"file_name": "c.png", "text": None},
        {"file_name": "gone.png", "text": "x"},
        {"text": "of nothing"},
        ["no object"],
    ]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n{broken")
    for num_shards in (1, 2, 5):
        pairs = load_image_text_pairs(folder, num_shards=num_shards, shuffle_buffer=0, report=report)
        assert pairs.num_shards == num_shards
        found = {pair["key"]: pair["captions"] for pair in pairs}
        assert found == {"pictures/a.png": ["first", "second"], "pictures/sub/b.png": ["b1", "b2"]}
    assert report.counts() == {"no caption": 1, "unreadable image": 1, "malformed JSON": 3}
    assert set(report.skipped()["malformed JSON"]) == {f"pictures/metadata.jsonl:{n}" for n in (11, 13, 14)}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "image, captions, value",
    [
        ("image", "caption", "x"),
        ("jpg", "txt", "x\ny"),
        ("img", "sentences", [{"raw": "x"}]),
        ("photo", "said", ["x"]),
    ],
)
def test_datasets_with_usual_and_unusual_columns(tmp_path, report, streaming, image, captions, value):
    (tmp_path / "file.png").write_bytes(PNG)
    images = [{"bytes": content} for content in (picture(1), None, b"damaged", None, picture(5), None)]
    images[1]["path"], images[3], images[5]["path"] = str(tmp_path / "file.png"), None, str(tmp_path / "gone.png")
    empty = {str: "", list: []}[type(value)]
    rows = {image: images, captions: [value] * 4 + [empty, value], "id": list(range(6))}
    source = Dataset.from_dict(rows).cast_column(image, ImageFeature())
    if image == "photo":
        with pytest.raises(ValueError, match="columns.*image_column="):
            load_image_text_pairs(source)
    names = {"image_column": image, "captions_column": captions} if image == "photo" else {}
    pairs = load_image_text_pairs(source, shuffle_buffer=0, streaming=streaming, report=report, **names)
    pairs = list(pairs)
    assert [pair["captions"] for pair in pairs] == [["x", "y"] if captions == "txt" else ["x"]] * 2
    assert [pair["image"].getpixel((0, 0)) for pair in pairs] == [(1, 1, 1), (100, 100, 100)]
    assert len(set(keys(pairs))) == 2
    assert report.counts() == {"corrupt image": 1, "no image": 1, "no caption": 1, "unreadable image": 1}


@pytest.mark.parametrize(
    "source, arguments",
    [
        ("org/name", {"path": "org/name", "name": None, "revision": None}),
        ("name@v1.0", {"path": "name", "name": None, "revision": "v1.0"}),
        ("org/name:en-us@refs/pr/1", {"path": "org/name", "name": "en-us", "revision": "refs/pr/1"}),
    ],
)
def test_hub_datasets_are_streamed(monkeypatch, source, arguments):
    def load_dataset(**given):
        assert given == {**arguments, "split": "test", "streaming": True}
        return Dataset.from_dict({"image": [PNG], "text": ["x"], "turns": [["a", "b"]]}).to_iterable_dataset()

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    assert [pair["captions"] for pair in load_image_text_pairs(source, split="test")] == [["x"]]
    assert load_dialogues(source, split="test")["references"] == [["b"]]


def test_what_does_not_exist_is_named(tmp_path):
    for source in (tmp_path / "gone.tar", str(tmp_path / "{0..2}.tar"), str(tmp_path / "*.tar"), "gone.jsonl"):
        for load in (load_image_text_pairs, load_dialogues):
            with pytest.raises(FileNotFoundError, match="There is no file"):
                load(source)
    with pytest.raises(FileNotFoundError, match="no file or folder 'org/gone'"):
        load_image_text_pairs("org/gone")  # offline
    with pytest.raises(FileNotFoundError, match="metadata.jsonl"):
        load_image_text_pairs(tmp_path)


def test_a_mistyped_folder_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(sources.datasets, "load_dataset", asked)
    monkeypatch.chdir(tmp_path)
    Path("photographs").mkdir()
    for source in ("photograps", "photographs/flikr", "./flickr"):
        for load in (load_image_text_pairs, load_dialogues):
            with pytest.raises(FileNotFoundError, match=f"There is no file or folder '{source}'"):
                load(source)


def test_no_sources_are_refused():
    for load in (load_image_text_pairs, load_dialogues):
        with pytest.raises(ValueError, match="No sources"):
            load([])


# ---- names of members ----


def test_names_may_hold_dots(tmp_path, report):
    sample = samples("cat.v2", "0.5", "dog.a", "dog.b", "deep.er/x.y")
    extended = [*samples("f"), ("f.mask.png", PNG), ("f.mask2.txt", "x"), ("f.v2.png", PNG), ("f.v2.txt", "version 2")]
    apart = [("lone.v1.png", PNG), ("lone.txt", "x")]
    path = write_tar(tmp_path / "s.tar", [*sample, *extended, *apart])
    for num_shards in (1, 3):
        pairs = list(load_image_text_pairs(path, shuffle_buffer=0, num_shards=num_shards, report=report))
        assert {pair["key"]: pair["captions"] for pair in pairs} == {
            **{f"s/{key}": [f"caption of {key}"] for key in ("cat.v2", "0.5", "dog.a", "dog.b", "deep.er/x.y", "f")},
            "s/f.v2": ["version 2"],
        }
    hint = "lone.v1, lone: names must be equal up to the last dot"
    assert report.skipped() == {
        "no caption": {"s/lone.v1": hint},
        "no image": {"s/lone": hint},
        "part of no pair": {
            "s/*.png": "such as f.mask.png, whose name adds to that of a sample",
            "s/*.txt": "such as f.mask2.txt, whose name adds to that of a sample",
        },
    }


MEMBERS = st.tuples(
    st.sampled_from(["a", "a.v2", "a.v2.x", "b", "deep/a", "../a", "._c", "README"]),
    st.sampled_from(["", ".png", ".jpg", ".PNG", ".txt", ".json", ".cls"]),
    st.sampled_from([PNG, b"?", b"", b"a caption", b" ", b'{"caption": "x"}']),
    st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]),
)


@settings(max_examples=150)
@example(
    members=[
        ("a.v2.x", ".png", PNG, tarfile.REGTYPE),
        ("a.v2.x", ".jpg", PNG, tarfile.SYMTYPE),
        ("a.v2.x", ".txt", b"a caption", tarfile.REGTYPE),
    ],
    num_shards=1,
)
@given(
    members=st.lists(MEMBERS, max_size=9, unique_by=lambda member: (member[0] + member[1]).lower()),
    num_shards=st.integers(1, 3),
)
def test_every_member_is_in_a_pair_or_in_the_report(tmp_path_factory, members, num_shards):
    folder = tmp_path_factory.mktemp("shard")
    with tarfile.open(folder / "s.tar", "w") as tar:
        for stem, extension, content, kind in members:
            info = tarfile.TarInfo(stem + extension)
            info.type, info.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content))
    report, pairs = SkipReport(folder / "report"), []
    try:
        pairs = list(load_image_text_pairs(str(folder / "s.tar"), num_shards=num_shards, report=report))
    except ValueError as error:
        assert "Nothing is readable" in str(error)
    readable = (member for member in members if member[3] == tarfile.REGTYPE)
    contents = {stem + extension.lower(): content for stem, extension, content, _ in readable}
    used = set()
    for key in (key.removeprefix("s/") for key in keys(pairs)):
        used.add(next(f"{key}.{end}" for end in ("jpg", "png") if f"{key}.{end}" in contents))
        text = contents.get(f"{key}.txt", b"").strip()
        used.update([f"{key}.txt"] if text else [f"{key}.txt", f"{key}.json"])
    told = {key for keys in report.skipped().values() for key in keys}
    for stem, extension, *_ in members:
        name = stem + extension
        ways = {
            name.lower() if name.lower() in used else name,
            posixpath.splitext(name)[0],
            "*" + posixpath.splitext(name)[1].lower(),
        }
        assert stem + extension.lower() in used or {f"s/{way}" for way in ways} & told, (name, told)
    assert members or "s" in told


def test_links_devices_and_hidden_files_in_a_shard(tmp_path, report):
    with tarfile.open(write_tar(tmp_path / "s.tar", [*samples("a"), ("a.cls", "3")]), "a") as tar:
        for name, kind in (("b.png", tarfile.SYMTYPE), ("c.png", tarfile.LNKTYPE), ("d.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo(".DS_Store"))
        folder = tarfile.TarInfo("e.png")  # a folder is no file
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert keys(load_image_text_pairs(tmp_path / "s.tar", report=report)) == ["s/a"]
    assert report.skipped() == {
        "no regular file": {
            "s/b.png": "a link to a.png",
            "s/c.png": "a link to a.png",
            "s/d.png": "a device or pipe",
        },
        "part of no pair": {"s/*.cls": "such as a.cls", "s/*": "such as .DS_Store, a hidden file"},
    }


def test_what_a_sample_has_twice_is_reported(tmp_path, report):
    members = [("a.png", PNG), ("a.jpg", picture(7)), ("a.txt", "x"), ("a.json", '{"caption": "y"}'), ("a.txt", "z")]
    (pair,) = load_image_text_pairs(write_tar(tmp_path / "s.tar", members), report=report)
    assert pair["captions"] == ["z"] and pair["image"].getpixel((0, 0)) == (7, 7, 7)
    assert report.skipped() == {
        "an earlier file of the same name": {"s/a.txt": ""},
        "part of no pair": {
            "s/*.json": "such as a.json, beside .jpg and .txt",
            "s/*.png": "such as a.png, beside .jpg and .txt",
        },
    }


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_the_ends_of_lines_part_captions(tmp_path, separator):
    text = f"one{separator}caption\r\nanother\rand\na third"
    (pair,) = load_image_text_pairs(write_tar(tmp_path / "s.tar", [("a.png", PNG), ("a.txt", text)]))
    assert pair["captions"] == ["one caption", "another", "and", "a third"]
    rows = {"jpg": [picture()], "txt": [text]}
    (pair,) = load_image_text_pairs(Dataset.from_dict(rows).cast_column("jpg", ImageFeature()))
    assert pair["captions"] == ["one caption", "another", "and", "a third"]


def test_members_too_large_to_read_are_reported(tmp_path, report):
    """Six gigabytes in the header, and not even the memory to hold them is asked for."""
    path = Path(write_tar(tmp_path / "s.tar", [*samples("a"), ("b.png", PNG)]))
    large = tarfile.TarInfo("b.txt")
    large.size = 6 * 2**30
    path.write_bytes(path.read_bytes()[: 6 * 512] + large.tobuf())
    assert keys(load_image_text_pairs(path, report=report)) == ["s/a"]
    skipped = report.skipped()
    assert skipped["too large"] == {"s/b.txt": "6442450944 bytes; at most 16777216 are read"}
    assert set(skipped["no caption"]) == {"s/b"}


def test_headers_too_large_to_read_end_a_shard(tmp_path, report):
    path = Path(write_tar(tmp_path / "s.tar", samples("a")))
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        large = tarfile.TarInfo("x")
        large.type, large.size = kind, 6 * 2**30
        (tmp_path / "large.tar").write_bytes(path.read_bytes()[:2048] + large.tobuf())
        assert keys(load_image_text_pairs(tmp_path / "large.tar", report=report)) == ["large/a"]
        assert "a header of 6442450944 bytes" in report.skipped()["truncated shard"]["large"]


# ---- folders ----


def write_folder(folder, files: dict[str, bytes], lines: list) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def test_metadata_leads_nowhere_but_to_files_of_the_folder(tmp_path, report):
    folder = tmp_path / "pictures"
    (tmp_path / "secret.png").write_bytes(PNG)
    good = ["a.png", "./sub/b.png", "link.png"]
    bad = ["../secret.png", "sub/../../secret.png", str(tmp_path / "secret.png"), "/dev/zero", "pipe.png", "zero.png"]
    bad += ["folder.png", "gone.png", "no\0name.png", "half\ud800.png"]
    lines = [{"file_name": name, "text": name} for name in good + bad]
    write_folder(folder, {"a.png": PNG, "sub/b.png": PNG}, lines)
    (folder / "link.png").symlink_to("a.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    pairs = load_image_text_pairs(folder, shuffle_buffer=0, report=report)
    assert keys(pairs) == ["pictures/a.png", "pictures/sub/b.png", "pictures/link.png"]
    details = report.skipped()
    assert list(details) == ["unreadable image"] and len(details["unreadable image"]) == len(bad)
    for name in bad[:4]:
        assert details["unreadable image"][f"pictures/{name}"] == "the path is outside the folder"
    for name in ("pipe", "zero", "folder"):
        assert details["unreadable image"][f"pictures/{name}.png"].endswith(f"{name}.png is not a regular file")


def test_rows_of_datasets_lead_to_files_alone(tmp_path, report, monkeypatch):
    (tmp_path / "large.png").write_bytes(PNG)
    paths = ["/dev/zero", str(tmp_path), str(tmp_path / "large.png"), f"file://{tmp_path}/large.png"]
    images = [{"bytes": PNG}, *({"bytes": None, "path": path} for path in paths)]
    source = Dataset.from_dict({"image": images, "text": ["x"] * 5}).cast_column("image", ImageFeature())
    monkeypatch.setattr(pairs, "MAX_PICTURE_BYTES", len(PNG) - 1)
    assert len(keys(load_image_text_pairs(source, report=report))) == 1
    details = sorted(report.skipped()["unreadable image"].values())
    assert details == sorted(
        [
            *(f"{path} is not a regular file" for path in paths[:2]),
            *(f"{path} has more than {len(PNG) - 1} bytes" for path in paths[2:]),
        ]
    )


FILES = st.sampled_from(["a.png", "b.png", "b.txt", "sub/a.png", "sub/.hidden", "notes", "gone.png", "../x.png"])


@settings(max_examples=60)
@given(
    st.dictionaries(FILES.filter(lambda name: name[0] not in "g."), st.sampled_from([PNG, b"?", b""])), st.lists(FILES)
)
def test_every_file_of_a_folder_is_in_a_pair_or_in_the_report(tmp_path_factory, files, named):
    folder = tmp_path_factory.mktemp("parent") / "f"
    folder.mkdir()
    write_folder(folder, files, [{"file_name": name, "text": "x"} for name in named])
    report, found = SkipReport(folder.parent / "report"), []
    try:
        found = keys(load_image_text_pairs(folder, num_shards=2, report=report))
    except ValueError as error:
        assert "Nothing is readable" in str(error)
    assert set(found) == {f"f/{name}" for name in named if files.get(name) == PNG}
    told = {key for keys in report.skipped().values() for key in keys}
    for name in {*files, *named}:
        kind = f"f/*{posixpath.splitext(name)[1]}"
        assert f"f/{name}" in {*found, *told} or (kind in told and name not in named), name
    assert named or "f/metadata.jsonl" in told


# ---- faults ----


def test_unreadable_samples_are_skipped_and_reported(tmp_path, report):
    members = [
        *samples("good"),
        ("corrupt.png", PNG[:40]),
        ("corrupt.txt", "x"),
        ("blank.png", PNG),
        ("blank.txt", " \n \n"),
        ("alone.png", PNG),
        ("text.txt", "x"),
        ("latin.png", PNG),
        ("latin.txt", "café".encode("latin-1")),
        ("json.png", PNG),
        ("json.json", "{"),
        ("deep.png", PNG),
        ("deep.json", '{"caption": ' + "[" * 500 + "]" * 500 + "}"),
        ("surrogate.png", PNG),
        ("surrogate.json", '{"caption": "half \\ud83d"}'),
    ]
    path = write_tar(tmp_path / "s.tar", members)
    for streaming in (True, False, True):  # counted once, however often
        pairs = list(load_image_text_pairs(path, shuffle_buffer=0, streaming=streaming, report=report))
        assert [pair["captions"] for pair in pairs] == [["caption of good"], ["half ?"]]
    assert report.counts() == {"corrupt image": 1, "no caption": 3, "no image": 1, "unreadable caption": 2}
    assert set(report.skipped()["no caption"]) == {"s/blank", "s/alone", "s/deep"}
    assert "1 x corrupt image: s/corrupt (" in report.summary() and "s/alone" in report.summary()


def test_an_unreadable_source_is_an_error(tmp_path):
    bad = write_tar(tmp_path / "bad.tar", [("a.png", b"?"), ("a.txt", "x")])
    good = write_tar(tmp_path / "good.tar", samples("a"))
    (tmp_path / "no.tar").write_bytes(b"no archive")
    (tmp_path / "empty.tar").write_bytes(b"")
    for streaming in (True, False):
        for path in (bad, str(tmp_path / "no.tar"), str(tmp_path / "empty.tar"), write_tar(tmp_path / "0.tar", [])):
            with pytest.raises(ValueError, match="Nothing is readable"):
                load_image_text_pairs(path, streaming=streaming)
    with pytest.raises(ValueError, match=r"bad\.tar[^$]*corrupt image"):
        load_image_text_pairs([good, bad], probabilities=[0.5, 0.5])
    assert len(keys(load_image_text_pairs([good, bad, str(tmp_path / "empty.tar")]))) == 1


@pytest.mark.parametrize("compress", [False, True])
def test_a_shard_cut_off_anywhere_gives_what_precedes_the_cut(tmp_path, compress):
    whole = Path(write_tar(tmp_path / "whole.tar", samples("a", "b", "c"))).read_bytes()
    end = 6 * 1024  # six members, each a header and a block; then the zeros that end an archive
    expected = keys(load_image_text_pairs(str(tmp_path / "whole.tar"), shuffle_buffer=0))
    assert len(expected) == 3
    cuts = [*range(2048, end, 211), *range(2048, end + 1, 512), end + 1]
    for cut in cuts:
        report = SkipReport(tmp_path / f"report-{cut}")
        (tmp_path / "whole.tar").write_bytes(gzip.compress(whole[:cut], 0) if compress else whole[:cut])
        found = keys(load_image_text_pairs(str(tmp_path / "whole.tar"), shuffle_buffer=0, report=report))
        # a file's content is its first bytes, so a cut in the padding behind it costs nothing unless it is noticed
        complete = cut // 2048
        assert found in (expected[:complete], expected[: complete + 1]), cut
        assert report.counts()["truncated shard"] == 1, cut


def test_a_damaged_header_ends_a_shard_loudly(tmp_path, report):
    path = Path(write_tar(tmp_path / "s.tar", samples("a", "b", "c")))
    content = bytearray(path.read_bytes())
    content[2048:2148] = b"\xff" * 100
    path.write_bytes(content)
    assert keys(load_image_text_pairs(str(path), report=report)) == ["s/a"]
    assert report.counts() == {"truncated shard": 1}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves `tmp_path/www`; `plan(name, *answers)` says what the next requests get: a status or a share of it."""
    monkeypatch.setattr(sources, "RETRY_DELAYS", (0.0, 0.01, 0.02))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    plans, requests = {}, Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.split("?")[0].strip("/")
            requests[name] += 1
            answers = plans.get(name, [])
            answer = answers.pop(0) if answers else 1.0
            if isinstance(answer, int):
                return self.send_error(answer)
            content = (tmp_path / "www" / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: int(len(content) * answer)])

        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        running.url = f"http://127.0.0.1:{running.server_port}"
        running.plan = lambda name, *answers: plans.update({name: list(answers)})
        running.requests = requests
        yield running
        running.shutdown()


def test_urls_that_fail_once_lose_nothing(tmp_path, server, report):
    expected = []
    for shard in range(3):
        write_tar(tmp_path / "www" / f"s{shard}.tar", samples(*(f"k{i}" for i in range(20))))
        expected += [f"s{shard}/k{i}" for i in range(20)]
    url = server.url + "/s{0..2}.tar?download=true"
    for answers in ([500], [0.5], [0.3, 503, 0.7]):
        pairs = load_image_text_pairs(url, shuffle_buffer=0, report=report)
        for shard in range(3):
            server.plan(f"s{shard}.tar", *answers)
        assert keys(pairs) == expected
    assert report.summary() == "Skipped nothing."


def test_urls_that_keep_failing_are_skipped(tmp_path, server, report):
    for name in ("good", "half", "gone", "down"):
        write_tar(tmp_path / "www" / f"{name}.tar", samples(*(f"k{i}" for i in range(20))))
    urls = [f"{server.url}/{name}.tar" for name in ("good", "half", "gone", "down")]
    pairs = load_image_text_pairs(urls, shuffle_buffer=0, report=report)
    server.plan("half.tar", *[0.5] * 9)
    server.plan("gone.tar", *[404] * 9)
    server.plan("down.tar", *[500] * 9)
    server.requests.clear()
    counts = Counter(key.split("/")[0] for key in keys(pairs))
    assert counts["good"] == 20 and 8 <= counts["half"] <= 12 and counts.keys() == {"good", "half"}
    skipped = report.skipped()
    assert set(skipped.pop("no caption", {})) <= {f"half/k{counts['half']}"}  # cut off behind its image
    assert set(skipped["truncated shard"]) == {"half"} and set(skipped["unreadable shard"]) == {"gone", "down"}
    assert server.requests == {"good.tar": 1, "half.tar": 4, "gone.tar": 1, "down.tar": 4}
    with pytest.raises(ValueError, match="(?s)Nothing is readable.*unreadable shard"):
        load_image_text_pairs(urls[2], report=report)


def test_a_connection_that_breaks_ever_further_on_is_taken_up_again(tmp_path, server, report):
    write_tar(tmp_path / "www" / "s.tar", samples(*(f"k{i}" for i in range(40))))
    pairs = load_image_text_pairs(f"{server.url}/s.tar", shuffle_buffer=0, report=report)
    server.plan("s.tar", *(n / 10 for n in range(1, 10)))
    assert keys(pairs) == [f"s/k{i}" for i in range(40)] and report.counts() == {}


def test_other_file_systems(tmp_path):
    fsspec.filesystem("memory").pipe("/vikdf/s.tar", Path(write_tar(tmp_path / "s.tar", samples("a"))).read_bytes())
    assert keys(load_image_text_pairs("memory://vikdf/s.tar")) == ["s/a"]


def test_dialogues_from_urls(tmp_path, server, report):
    lines = [json.dumps({"turns": ["a" * 50, str(i)]}) for i in range(20)]
    (tmp_path / "www" / "d.jsonl").write_text("\n".join(lines))
    server.plan("d.jsonl", 1.0, 0.5, 500)
    dialogues = load_dialogues(f"{server.url}/d.jsonl", report=report)
    assert [dialogue["references"] for dialogue in dialogues] == [[str(i)] for i in range(20)]
    assert report.counts() == {}


def test_a_report_gathers_what_worker_processes_skip(tmp_path, report):
    for shard in range(2):
        bad = [member for i in range(10) for member in ((f"b{i}.png", b"?"), (f"b{i}.txt", "x"))]
        write_tar(tmp_path / f"s{shard}.tar", [*samples("a"), *bad])
    pairs = load_image_text_pairs(str(tmp_path / "s*.tar"), report=report)
    for epoch in range(2):
        pairs.set_epoch(epoch)
        assert len(list(DataLoader(pairs, batch_size=None, num_workers=2))) == 2
    assert report.counts() == {"corrupt image": 20}
    assert len(list(report.folder.iterdir())) == 4
    assert report.summary(num_examples=1).endswith("), ...")
    with open(next(report.folder.iterdir()), "a") as file:
        file.write('{"reason": "ki')  # killed while writing
    assert report.counts() == {"corrupt image": 20}


def test_a_report_opens_its_file_once(report, monkeypatch):
    opened = []
    monkeypatch.setattr(
        sources, "open", lambda path, *args, **kw: opened.append(path) or open(path, *args, **kw), raising=False
    )
    for number in range(100):
        report.add("corrupt image", f"s/{number}")
        assert len(report.skipped()["corrupt image"]) == number + 1  # told at once
    assert len(opened) == 1
    pickle.loads(pickle.dumps(report)).add("corrupt image", "s/100")
    assert report.counts() == {"corrupt image": 101} and len(opened) == 2


def test_a_report_survives_forks_and_kills(report):
    report.add("corrupt image", "before")
    child = os.fork()
    if child == 0:
        report.add("corrupt image", "in the fork")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    report.add("corrupt image", "behind")
    assert set(report.skipped()["corrupt image"]) == {"before", "in the fork", "behind"}
    assert len(list(report.folder.iterdir())) == 2


def test_names_that_are_no_text_can_be_shown(tmp_path, report):
    assert report.add("no image", "caf\udce9") is None
    assert "caf\\udce9" in report.summary() and report.summary().encode()


def test_a_report_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    SkipReport(tmp_path / "file" / "report").add("corrupt image", "key")


# ---- shuffling, splitting, mixing, resuming ----


@pytest.mark.parametrize("num_shards", [None, "enough"])
def test_every_example_goes_to_one_worker_of_one_process(tmp_path, num_shards):
    for files in range(1, 6):
        (tmp_path / str(files)).mkdir()
        source = write_shards(tmp_path / str(files), [3 + shard % 3 for shard in range(files)])
        expected = sorted(keys(load_image_text_pairs(source)))
        assert len(set(expected)) == sum(3 + shard % 3 for shard in range(files))
        for world_size, workers in itertools.product((1, 2, 3), (0, 1, 2, 3)):
            if (files + world_size + workers) % 2:  # half of them, for time's sake; each value meets each other
                continue
            cut = world_size * max(workers, 1) if num_shards else 1
            pairs = load_image_text_pairs(source, shuffle_buffer=4, num_shards=cut)
            assert pairs.num_shards % cut == 0
            pairs.set_epoch(files % 2)
            shares = []
            for rank in range(world_size):
                share = split_dataset_by_node(pairs, rank=rank, world_size=world_size)
                shares.append(list(DataLoader(share, batch_size=2, collate_fn=keys, num_workers=workers)))
            found = sorted(itertools.chain(*itertools.chain(*shares)))
            assert found == expected, (files, world_size, workers)


def test_shuffling_repeats_by_seed_and_epoch(tmp_path):
    source = write_shards(tmp_path, [20] * 4)
    orders = {}
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0), (0, 1)]:
        pairs = load_image_text_pairs(source, seed=seed, shuffle_buffer=40)
        pairs.set_epoch(epoch)
        order = keys(pairs)
        assert order == orders.setdefault((seed, epoch), order)
    assert len({tuple(order) for order in orders.values()}) == 3
    in_order = keys(load_image_text_pairs(source, shuffle_buffer=0))
    assert in_order == [f"shard-{shard}/s{i}" for shard in range(4) for i in range(20)]
    assert all(sorted(order) == sorted(in_order) for order in orders.values())


def test_shards_of_the_same_name_keep_their_keys_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_shards(tmp_path / folder, [2])
    assert len(set(keys(load_image_text_pairs([tmp_path / "x" / "shard-0.tar", tmp_path / "y" / "shard-0.tar"])))) == 4
    assert len(keys(load_image_text_pairs([str(tmp_path / "x/*.tar"), tmp_path / "x" / "shard-0.tar"]))) == 2


def test_a_mixture_keeps_its_proportions_until_all_was_seen(tmp_path):
    small = write_tar(tmp_path / "small.tar", samples(*(f"s{i}" for i in range(30))))
    large = [
        write_tar(tmp_path / f"large{n}.tar", samples(*(f"s{i}" for i in range(n * 100, n * 100 + 100))))
        for n in (0, 1)
    ]
    pairs = load_image_text_pairs([small, large], probabilities=[20, 80], shuffle_buffer=10)
    orders = []
    for epoch in range(2):
        pairs.set_epoch(epoch)
        orders.append(keys(pairs))
        sources = Counter(key[:5] for key in orders[-1])
        assert sources["large"] >= 200 and len(set(orders[-1])) == 230
        assert 0.13 < sources["small"] / sources.total() < 0.27
    assert orders[0] != orders[1]
    pairs = load_image_text_pairs([small, large], probabilities=[0.2, 0.8], num_shards=4)
    shares = [split_dataset_by_node(pairs, rank=rank, world_size=2) for rank in range(2)]
    found = [DataLoader(share, batch_size=None, num_workers=2) for share in shares]
    assert len(set(keys(itertools.chain(*found)))) == 230
    for probabilities in ([1.0], [1.0, 0.0], [0.5, 0.25, 0.25]):
        with pytest.raises(ValueError, match="probability for each of the 2 sources"):
            load_image_text_pairs([small, large], probabilities=probabilities)
    with pytest.raises(ValueError, match="streaming=True"):
        load_image_text_pairs([small, large], probabilities=[0.5, 0.5], streaming=False)


def test_sources_of_all_kinds_together_give_each_example_once(tmp_path):
    rows = {"image": [picture(i) for i in range(7)], "text": [str(i) for i in range(7)]}
    hub = Dataset.from_dict(rows).cast_column("image", ImageFeature()).to_iterable_dataset(num_shards=3)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(PNG)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    sources = [write_shards(tmp_path, [3, 4]), hub, folder]
    for workers in (0, 2):
        pairs = load_image_text_pairs(sources, shuffle_buffer=5)
        found = list(DataLoader(pairs, batch_size=None, collate_fn=None, num_workers=workers))
        assert len(found) == len(set(keys(found))) == 15
    assert len(load_image_text_pairs(sources, streaming=False)) == 15


def test_without_streaming_a_dataset_decodes_on_access(tmp_path, report):
    path = write_tar(tmp_path / "s.tar", [*samples("a", "b", "c"), ("d.png", PNG[:30]), ("d.txt", "x")])
    pairs = load_image_text_pairs(path, streaming=False, report=report)
    assert isinstance(pairs, Dataset) and len(pairs) == 3 and report.counts() == {"corrupt image": 1}
    assert pairs["key"][:] == ["s/a", "s/b", "s/c"]
    assert pairs[-1]["image"].mode == "RGB" and pairs.shuffle(seed=1)[:2]["image"][0].size == (4, 4)


def test_a_picture_is_decoded_once_and_never_encoded(tmp_path, monkeypatch):
    """The time that a worker takes for a picture is that of its decoder and of resizing."""
    stream = load_image_text_pairs(write_tar(tmp_path / "train.tar", samples("a", "b", "c")), shuffle_buffer=2)
    opened, saved, open_ = [], [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(args) or open_(*args, **kwargs))
    monkeypatch.setattr(Image.Image, "save", lambda *args, **kwargs: saved.append(args))
    examples = list(DataLoader(stream, batch_size=None))
    assert len(examples) == len(opened) == 3 and not saved


def test_an_unshuffled_stream_resumes_where_its_state_was_taken(tmp_path):
    source = write_shards(tmp_path, [6, 7, 8])
    pairs = load_image_text_pairs(source, shuffle_buffer=0)
    pairs.set_epoch(1)
    expected = keys(pairs)
    for position in (0, 5, 6, 20):
        next(itertools.islice(pairs, position, None))
        state = pairs.state_dict()
        resumed = load_image_text_pairs(source, shuffle_buffer=0)
        resumed.set_epoch(1)
        resumed.load_state_dict(state)
        assert keys(resumed) == expected[position + 1 :]


def test_streams_can_be_sent_to_workers_that_are_spawned(tmp_path):
    tar = write_shards(tmp_path, [2, 2])
    hub = Dataset.from_dict({"image": [PNG], "text": ["x"]}).cast_column("image", ImageFeature())
    pairs = load_image_text_pairs([tar, hub])
    assert isinstance(pairs, IterableDataset)
    assert keys(pickle.loads(pickle.dumps(pairs))) == keys(pairs)


# ---- dialogues ----


def write_jsonl(path, records) -> str:
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return str(path)


U, A, S = (
    {"role": role, "content": content} for role, content in [("user", "u"), ("assistant", "a"), ("system", "s")]
)


@pytest.mark.parametrize(
    "record, messages, references",
    [
        ({"turns": ["u", "a"]}, [U, A], ["a"]),
        ({"turns": ["a", "u", " a\n"]}, [A, U, A], ["a"]),
        ({"dialog": ["u", "a", "u", "a"]}, [U, A, U, A], ["a"]),
        ({"turns": ["u"], "references": ["a", "b"]}, [U, A], ["a", "b"]),
        ({"turns": ["a", "u"], "references": ["a", "b", "a"]}, [A, U, A], ["a", "b", "a"]),
        ({"turns": ["u", "a"], "references": None}, [U, A], ["a"]),
        ({"messages": [S, U, A]}, [S, U, A], ["a"]),
        ({"messages": [U, U, A], "turns": ["x", "y"]}, [U, U, A], ["a"]),
        ({"messages": [U], "references": ["a", "b"]}, [U, A], ["a", "b"]),
        ({"messages": [U, A], "references": ["b"]}, [U, A], ["a", "b"]),
        (
            {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in (U, A)]},
            [U, A],
            ["a"],
        ),
    ],
)
@pytest.mark.parametrize("hub", [False, True])
def test_dialogue_formats(tmp_path, record, messages, references, hub):
    source = Dataset.from_list([record]) if hub else write_jsonl(tmp_path / "d.jsonl", [record])
    for streaming in (False, True):
        (dialogue,) = load_dialogues(source, streaming=streaming)
        assert dialogue["messages"] == messages and dialogue["references"] == references
        assert dialogue["key"].startswith("dataset/") if hub else dialogue["key"] == "d:1"


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"turns": []}, "no turns"),
        ({"text": "x"}, "no turns"),
        ({"turns": "no list"}, "no turns"),
        ({"turns": ["alone"]}, "no reply to a user's turn"),
        ({"turns": ["u", " ", "a"]}, "empty turn"),
        ({"turns": ["u", ""]}, "empty turn"),
        ({"turns": ["u", None]}, "a turn that is not text"),
        ({"turns": ["u", {"role": "user"}]}, "a turn that is not text"),
        ({"turns": ["u"], "references": []}, "no reply to a user's turn"),
        ({"turns": ["u"], "references": "no list"}, "references that are not a list"),
        ({"turns": ["u"], "references": ["a", ""]}, "empty turn"),
        ({"messages": [U]}, "no reply to a user's turn"),
        ({"messages": [S, A]}, "no reply to a user's turn"),
        ({"messages": [U, A, S, A]}, "unknown role or misplaced system message"),
        ({"messages": [{"role": "tool", "content": "x"}, U, A]}, "unknown role or misplaced system message"),
        ({"messages": [{"role": ["user"], "content": "x"}, A]}, "unknown role or misplaced system message"),
        ({"messages": [{"from": "human", "value": "x"}, A]}, "a turn that is not text"),
        ("{broken", "malformed JSON"),
        ("[1]", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
    ],
)
def test_what_is_no_dialogue_is_skipped_and_reported(tmp_path, report, record, reason):
    source = write_jsonl(tmp_path / "d.jsonl", ["", {"turns": ["u", "a"]}, record, {"turns": ["u", "half \ud83d"]}])
    dialogues = load_dialogues(source, report=report)
    assert dialogues["key"][:] == ["d:2", "d:4"] and dialogues["references"][1] == ["half ?"]
    assert list(report.skipped()) == [reason] and list(report.skipped()[reason]) == ["d:3"]


LINES = b"""{"turns": ["u", "a"]}\n\n{"turns": ["u", "b"]}\n"""


@pytest.mark.parametrize("content", [LINES, b"\xef\xbb\xbf" + LINES, LINES.replace(b"\n", b"\r\n"), LINES.strip()])
@pytest.mark.parametrize("compress", [False, True])
def test_lines_in_gzip_with_a_byte_order_mark_or_from_windows(tmp_path, report, content, compress):
    path = tmp_path / ("d.jsonl.gz" if compress else "d.jsonl")
    path.write_bytes(gzip.compress(content) if compress else content)
    dialogues = load_dialogues(path, report=report)
    assert dialogues["key"][:] == ["d:1", "d:3"] and dialogues["references"][:] == [["a"], ["b"]]
    assert report.counts() == {}


def test_lines_in_gzip_from_urls(tmp_path, server, report):
    (tmp_path / "www" / "d.jsonl.gz").write_bytes(gzip.compress(LINES))
    assert load_dialogues(f"{server.url}/d.jsonl.gz", report=report)["key"][:] == ["d:1", "d:3"]


def test_lines_in_gzip_that_is_cut_off(tmp_path, report):
    lines = b"".join(json.dumps({"turns": ["u", os.urandom(50).hex()]}).encode() + b"\n" for _ in range(2000))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines)[:-9000])
    assert 1000 < len(load_dialogues(tmp_path / "d.jsonl.gz", report=report)) < 2000
    assert set(report.skipped()) <= {"truncated shard", "malformed JSON"} and "truncated shard" in report.skipped()


ARRAY = json.dumps([{"turns": ["u", "a"]}, {"turns": ["u", "b"]}])
FOREIGN = {
    "bzip2": bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "zstd": b"\x28\xb5\x2f\xfd" + LINES,
    "zip": b"PK\x03\x04" + LINES,
    "gzip": gzip.compress(gzip.compress(LINES)),
    "UTF-16": LINES.decode().encode("utf-16"),
    "one JSON document": ARRAY.encode(),
    "one JSON document, not one object per line": b"\n \xef\xbb\xbf".strip()
    + json.dumps(json.loads(ARRAY), indent=1).encode(),
    "one JSON document, ": b"[\n" + LINES.replace(b"}\n\n", b"},\n") + b"]",
    "one JSON": json.dumps({"turns": ["u", "a"]}, indent=1).encode(),
    "empty": b"\n \n",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_files_of_another_kind_are_refused_once_and_by_name(tmp_path, server, report, what):
    write_jsonl(tmp_path / "good.jsonl", [{"turns": ["u", "a"]}])
    (tmp_path / "d.jsonl").write_bytes(FOREIGN[what])
    assert load_dialogues([tmp_path / "good.jsonl", tmp_path / "d.jsonl"], report=report)["key"][:] == ["good:1"]
    assert report.counts() == {"unreadable shard": 1}
    assert f"d.jsonl: it is {what}" in report.skipped()["unreadable shard"]["d"]
    (tmp_path / "www" / "d.jsonl").write_bytes(FOREIGN[what])
    server.requests.clear()
    with pytest.raises(ValueError, match=f"it is {what}"):
        load_dialogues(f"{server.url}/d.jsonl", report=report)
    assert server.requests == {"d.jsonl": 1}  # trying again would bring the same


def test_an_array_in_the_first_line_is_that_line_alone(tmp_path, report):
    source = write_jsonl(tmp_path / "d.jsonl", [[1], {"turns": ["u", "a"]}])
    assert load_dialogues(source, report=report)["key"][:] == ["d:2"]
    assert list(report.skipped()["malformed JSON"]) == ["d:1"]


def test_lines_too_long_to_read_are_reported(tmp_path, report, monkeypatch):
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 40)
    lines = [{"turns": ["u", "a"]}, {"turns": ["u", "b" * 100]}, {"turns": ["u", "c"]}]
    source = write_jsonl(tmp_path / "d.jsonl", lines)
    assert load_dialogues(source, report=report)["key"][:] == ["d:1", "d:3"]
    assert report.skipped() == {"malformed JSON": {"d:2": "more than 40 bytes"}}


@pytest.mark.parametrize("content, what", [(b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\x03\x04", "zip")])
def test_shards_of_another_kind_are_named(tmp_path, report, content, what):
    (tmp_path / "s.tar.zst").write_bytes(content * 1000)
    with pytest.raises(ValueError, match=f"it is {what}; a shard must be a tar archive"):
        load_image_text_pairs(tmp_path / "s.tar.zst", report=report)


def test_shards_and_files_without_content_are_reported(tmp_path, report):
    empty = [write_tar(tmp_path / "none.tar", []), str(tmp_path / "zero.tar"), str(tmp_path / "folder.tar")]
    (tmp_path / "zero.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "folder.tar", "w") as tar:
        folder = tarfile.TarInfo("a.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    pairs = load_image_text_pairs([write_tar(tmp_path / "s.tar", samples("a")), *empty], num_shards=2, report=report)
    assert keys(pairs) == ["s/a"]
    assert set(report.skipped()["unreadable shard"]) == {"none", "zero", "folder"}


def test_no_pipe_or_device_is_taken_for_a_file(tmp_path, report):
    os.mkfifo(tmp_path / "d.jsonl")
    for path in (tmp_path / "d.jsonl", "/dev/zero"):
        with pytest.raises(ValueError, match="it is not a regular file"):
            load_dialogues(path, report=report)
        with pytest.raises(ValueError, match="it is not a regular file"):
            load_image_text_pairs(path, report=report)


def test_dialogues_of_several_files_and_none(tmp_path):
    for name in ("x", "y"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"said": ["u", "a"]}] * 3)
    source = str(tmp_path / "{x,y}.jsonl")
    assert load_dialogues(source, column="said")["key"][:] == [f"{name}:{n}" for name in "xy" for n in (1, 2, 3)]
    streamed = load_dialogues(source, column="said", streaming=True)
    assert streamed.num_shards == 2
    found = list(DataLoader(streamed, batch_size=1, collate_fn=first, num_workers=2))
    assert len(set(keys(found))) == 6
    with pytest.raises(ValueError, match="Nothing is readable.*x.jsonl.*\n.*6 x no turns"):
        load_dialogues(source)
    with pytest.raises(ValueError, match="columns.*column="):
        load_dialogues(Dataset.from_dict({"said": [["u", "a"]]}))


WORDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5).filter(str.strip)


@settings(max_examples=60)
@given(turns=st.lists(WORDS, min_size=1, max_size=7), references=st.lists(WORDS, max_size=3))
def test_roles_alternate_back_from_the_reply_and_render(turns, references):
    if len(turns) + bool(references) < 2:
        return
    messages, found = dialogues._read_dialogue({"turns": turns, "references": references}, None)
    roles = [message["role"] for message in messages]
    assert roles[::-1] == ["assistant", "user"] * (len(roles) // 2) + ["assistant"] * (len(roles) % 2)
    assert [message["content"] for message in messages] == [turn.strip() for turn in [*turns, *references[:1]]]
    assert found == [text.strip() for text in references or turns[-1:]] and found[0] == messages[-1]["content"]
    text = chatml().apply_chat_template(messages, tokenize=False)
    assert text.count("<|im_start|>assistant") == roles.count("assistant")


@functools.cache
def chatml():
    return qwen_tokenizer(CHATML)


# ---- names of files ----


@pytest.mark.parametrize(
    "pattern, paths",
    [
        ("a.tar", ["a.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{000..2}", ["000", "001", "002"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b{1..2}}", ["a", "b1", "a", "b2"]),
        ("{x}-{}-{1..}", ["{x}-{}-{1..}"]),
        ("https://h/{a,b}-{0..1}.tar?x={y}", [f"https://h/{x}-{n}.tar?x={{y}}" for x in "ab" for n in (0, 1)]),
    ],
)
def test_expand_braces(pattern, paths):
    assert expand_braces(pattern) == paths


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 6), st.text("abc/.-", max_size=5))
def test_ranges_expand_to_every_number_in_order(first, last, width, text):
    paths = expand_braces(f"{text}{{{first:0{width}d}..{last:0{width}d}}}{text}")
    numbers = [int(path.removeprefix(text).removesuffix(text)) for path in paths]
    assert numbers == list(range(first, last + 1)) or numbers == list(range(first, last - 1, -1))
    padded = width > min(len(str(first)), len(str(last))) or "0" in (str(first)[0], str(last)[0])
    if padded:
        assert len({len(path) for path in paths}) == 1


@given(st.text("{},.0129ab*?[]/", max_size=12))
def test_no_pattern_breaks_the_parser(pattern):
    paths = expand_braces(pattern)
    assert paths and all(sources.BRACES.search(path) is None for path in paths)


def test_globs_braces_and_literal_names(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "b-0.tar", "odd{0..1}[x].tar"):
        write_tar(tmp_path / name, samples("k"))
    for pattern, count in [("a-*.tar", 2), ("{a,b}-0.tar", 2), ("{a,b}-?.tar", 3), ("odd{0..1}[x].tar", 1)]:
        assert len(keys(load_image_text_pairs(str(tmp_path / pattern)))) == count
    with pytest.raises(FileNotFoundError, match="b-1"):
        load_image_text_pairs(str(tmp_path / "{a,b}-{0..1}.tar"))


# ---- the real thing ----


@needs_data
def test_flickr8k_and_image_chat(report):
    pairs = load_image_text_pairs(DATA / "flickr8k" / "validation-00000.tar", report=report)
    found = {pair["key"]: len(pair["captions"]) for pair in pairs}
    assert len(found) == 1000 and set(found.values()) == {5}
    assert len(load_dialogues(DATA / "dialogues" / "image_chat_test.jsonl", report=report)) == 5000
    assert report.counts() == {}
