"""Cached encoder states: what the encoders say, found at random, the same after an interruption, and never stale."""

import io
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import TOWERS, tiny_model
from tiny_tokenizers import bert_tokenizer, clip_like_tokenizer, image_processor, llama_tokenizer
from torch.utils.data import DataLoader

from modeling_vikdf import VikdfForConditionalGeneration, VikdfProcessor
from modeling_vikdf.data import features
from modeling_vikdf.data.features import FeatureDataset, cache_features
from modeling_vikdf.data.sources import SkipReport


CAPTIONS = [
    ["A dog runs.", "The dog is running after a red ball in the park, and it is happy."],
    ["Über den Bergen geht die Sonne unter 🌄"],
    ["snow", "It is snowing outside.", "We build a snowman together.", ""],
    ["Pizza with cheese,\ttomatoes and olives."],
    ["The water was so blue!", "blue water"],
]


@pytest.fixture(scope="module", params=TOWERS)
def parts(request: pytest.FixtureRequest) -> tuple[VikdfForConditionalGeneration, VikdfProcessor]:
    return build(request.param)


def build(
    towers: str, seed: int = 0, size: int = 32, **kwargs
) -> tuple[VikdfForConditionalGeneration, VikdfProcessor]:
    processor = VikdfProcessor.from_backbones(
        llama_tokenizer(),
        bert_tokenizer() if towers == "separate" else clip_like_tokenizer(),
        image_processor(size),
        vocab_size=512,
        num_knowledge_tokens=4,
        **kwargs,
    )
    return tiny_model("llama", towers, seed=seed), processor


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    pixels = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 40, 48, 3), dtype=np.uint8)
    return [
        {"key": f"shard/{i}", "image": Image.fromarray(picture), "captions": captions}
        for i, (picture, captions) in enumerate(zip(pixels, CAPTIONS, strict=True))
    ]


def assert_equal(ours: dict, theirs: dict) -> None:
    assert (ours["key"], ours["captions"]) == (theirs["key"], theirs["captions"])
    for name in ("vision_states", "context_states", "context_input_ids"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_states_are_those_of_the_encoders(parts, pairs, tmp_path):
    model, processor = parts
    model.vision_encoder.train(), model.context_encoder.train()  # as after building a model; dropout must not act
    cached = cache_features(model, processor, iter(pairs), tmp_path, batch_size=2, shard_size=3)
    assert len(cached) == len(pairs)
    assert sorted(path.name for path in tmp_path.glob("features*")) == [
        "features-00000.safetensors",
        "features-00001.safetensors",
    ]
    for index in (4, 0, 2, 1, 3, -1):
        pair, example = pairs[index], cached[index]
        assert (example["key"], example["captions"]) == (pair["key"], pair["captions"])
        pixel_values = processor.image_processor(pair["image"], return_tensors="pt")["pixel_values"]
        assert example["vision_states"].dtype == torch.float16
        torch.testing.assert_close(
            example["vision_states"].float(), model.encode_images(pixel_values)[0], rtol=2e-3, atol=2e-3
        )
        assert len(example["context_states"]) == len(example["context_input_ids"]) == len(pair["captions"])
        for caption, states, ids in zip(
            pair["captions"], example["context_states"], example["context_input_ids"], strict=True
        ):
            inputs = processor.context_tokenizer(caption, return_tensors="pt")
            torch.testing.assert_close(ids, inputs["input_ids"][0])
            alone = model.encode_context(inputs["input_ids"], inputs["attention_mask"])[0]  # [T, d]: no padding
            assert states.dtype == torch.float16
            torch.testing.assert_close(states.float(), alone, rtol=2e-3, atol=2e-3)
    with pytest.raises(IndexError):
        cached[len(pairs)]


def test_patches_are_pooled_and_the_class_state_is_kept(parts, pairs, tmp_path):
    model, processor = parts
    whole = cache_features(model, processor, pairs, tmp_path / "whole")
    pooled = cache_features(model, processor, pairs, tmp_path / "pooled", pool_grid=2)
    for before, after in zip(whole, pooled, strict=True):
        before, after = before["vision_states"].float(), after["vision_states"].float()
        prefix = len(before) - 16  # 32 pixels are 4 x 4 patches
        assert len(after) == prefix + 4
        torch.testing.assert_close(after[:prefix], before[:prefix])
        grid = before[prefix:].view(4, 4, -1)
        for row, column in itertools.product(range(2), range(2)):
            quarter = grid[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((0, 1))
            torch.testing.assert_close(after[prefix + 2 * row + column], quarter, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="pool_grid must be between 1 and the patch grid's 4 x 4, not 5"):
        cache_features(model, processor, pairs, tmp_path / "larger", pool_grid=5)


def test_long_captions_are_cut(pairs, tmp_path):
    model, processor = build("separate", max_context_length=6)
    cached = cache_features(model, processor, pairs, tmp_path)
    lengths = [[len(ids) for ids in example["context_input_ids"]] for example in cached]
    assert max(map(max, lengths)) == 6 and min(map(min, lengths)) == 2
    assert [[len(states) for states in example["context_states"]] for example in cached] == lengths


@pytest.mark.parametrize("moment", ["reading", "writing a shard", "moving it into place", "finishing"])
def test_an_interrupted_cache_is_continued_to_the_same_bytes(pairs, tmp_path, monkeypatch, moment):
    model, processor = build("separate")
    settings = {"batch_size": 2, "shard_size": 2}
    cache_features(model, processor, pairs, tmp_path / "at once", **settings)

    def stop(*args):
        raise KeyboardInterrupt

    def stream():
        yield from pairs[:3]
        stop()

    def stop_at(name: str, times: int):
        """Stops at a call, before or in the middle of it."""
        calls, call = itertools.count(1), getattr(features, name)

        def stopping(first, second):
            if next(calls) < times:
                return call(first, second)
            if name == "save_file":
                Path(second).write_bytes(b"half a shard")
            stop()

        monkeypatch.setattr(features, name, stopping)

    if moment == "writing a shard":
        stop_at("save_file", 2)
    elif moment == "moving it into place":
        replace, calls = features.os.replace, itertools.count(1)
        # the index, the first shard, the second
        monkeypatch.setattr(features.os, "replace", lambda *args: replace(*args) if next(calls) < 3 else stop())
    elif moment == "finishing":
        stop_at("_write_index", 2)
    source = stream() if moment == "reading" else pairs
    with pytest.raises(KeyboardInterrupt):
        cache_features(model, processor, source, tmp_path / "resumed", **settings)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="not complete"):
        FeatureDataset(tmp_path / "resumed")

    seen, encode = [], model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    cache_features(model, processor, pairs, tmp_path / "resumed", **settings)
    assert sum(seen) == (0 if moment == "finishing" else 3)  # the first shard of two was there
    assert files(tmp_path / "resumed") == files(tmp_path / "at once")


@pytest.mark.parametrize("number", [0, 4, 5])
def test_any_number_of_pictures(pairs, tmp_path, number):
    """None, a multiple of the shard size, and more; a second call finds all done."""
    model, processor = build("separate")
    for _ in range(2):
        assert len(cache_features(model, processor, pairs[:number], tmp_path, shard_size=2)) == number
    assert [example["key"] for example in FeatureDataset(tmp_path)] == [pair["key"] for pair in pairs[:number]]


def test_images_are_decoded_once_and_damaged_ones_left_out(pairs, tmp_path, monkeypatch):
    """Given as files they give the same states; when all is there, none but the damaged is looked at again."""

    def content(image):
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return buffer.getvalue()

    coded = [{**pair, "image": content(pair["image"])} for pair in pairs]
    damaged = {**coded[0], "key": "damaged", "image": b"no picture"}
    coded = [*coded[:2], damaged, *coded[2:], {**damaged, "key": "the last"}]
    model, processor = build("separate")
    cache_features(model, processor, pairs, tmp_path / "decoded", shard_size=2)
    decode, looked_at, kept = features.decode_pair, [], None
    monkeypatch.setattr(features, "decode_pair", lambda pair, to: looked_at.append(pair["key"]) or decode(pair, to))
    for expected in (len(coded), 2):
        report = SkipReport()
        cache_features(model, processor, coded, tmp_path / "coded", shard_size=2, report=report)
        assert len(looked_at) == expected and report.counts() == {"corrupt image": 2}
        looked_at.clear()
        kept = kept or files(tmp_path / "coded")
    assert files(tmp_path / "coded") == kept
    datasets = FeatureDataset(tmp_path / "coded"), FeatureDataset(tmp_path / "decoded")
    for ours, theirs in zip(*datasets, strict=True):
        assert_equal(ours, theirs)


OTHER = {
    "vision_encoder.*context_encoder": lambda: (build("separate", seed=1), {}),
    r"image_processor: .*\b32\b.*cached.*\b40\b": lambda: (build("separate", size=40), {}),
    "max_length: 512 cached, 9 now": lambda: (build("separate", max_context_length=9), {}),
    "pool_grid: None cached, 2 now": lambda: (build("separate"), {"pool_grid": 2}),
    "shard_size: 512 cached, 3 now": lambda: (build("separate"), {"shard_size": 3}),
}


@pytest.mark.parametrize("difference", OTHER)
def test_another_encoder_or_setting_is_refused(pairs, tmp_path, difference):
    cache_features(*build("separate"), pairs, tmp_path)
    before = files(tmp_path)
    parts, settings = OTHER[difference]()
    with pytest.raises(ValueError, match=difference) as error:
        cache_features(*parts, pairs, tmp_path, **settings)
    assert "Choose another folder" in str(error.value)
    assert str(error.value).count(" cached, ") == difference.count(".*context") + 1  # and nothing else is blamed
    assert files(tmp_path) == before


def test_what_the_states_do_not_depend_on_is_no_difference(pairs, tmp_path):
    """The pooler is often not saved and so random, and the trained part has no say."""
    cache_features(*build("separate"), pairs, tmp_path)
    model, processor = build("separate")
    with torch.no_grad():
        for parameter in (*model.context_encoder.pooler.parameters(), *model.iqformer.parameters()):
            parameter.add_(1)
    cache_features(model, processor, pairs, tmp_path, batch_size=1)


def recoloured(pair: dict) -> dict:
    """Another picture under the same name."""
    return {**pair, "image": Image.new("RGB", pair["image"].size, "red")}


# what becomes of the pairs -> the shards that are encoded anew, and how many pictures and captions are for it
CHANGED = {
    "nothing": (lambda pairs: pairs, [], 0, 0),
    "a picture": (lambda pairs: [*pairs[:3], recoloured(pairs[3]), pairs[4]], [1], 2, 0),
    "a caption": (lambda pairs: [*pairs[:3], {**pairs[3], "captions": ["Else."]}, pairs[4]], [1], 0, 5),
    "a key": (lambda pairs: [{**pairs[0], "key": "new"}, *pairs[1:]], [0], 0, 0),
    "the order": (lambda pairs: pairs[::-1], [0, 1, 2], 5, 10),
    "two places": (lambda pairs: [pairs[1], pairs[0], *pairs[2:]], [0], 2, 3),
    "one more": (lambda pairs: [*pairs, pairs[0]], [2], 2, 4),
    "one less": (lambda pairs: pairs[:4], [2], 0, 0),
    "two less": (lambda pairs: pairs[:3], [1, 2], 1, 4),
    "all gone": (lambda pairs: [], [0, 1, 2], 0, 0),
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_has_changed_is_encoded_anew(pairs, tmp_path, monkeypatch, caplog, change):
    """Only that, with a warning, and to the bytes of a new cache."""
    model, processor = build("separate")
    cache_features(model, processor, pairs, tmp_path / "old", shard_size=2)
    alter, shards, pictures, captions = CHANGED[change]
    cache_features(model, processor, alter(pairs), tmp_path / "new", shard_size=2)
    seen, read = [], []
    for name, counts in (("encode_images", seen), ("encode_context", read)):
        encode = getattr(model, name)
        monkeypatch.setattr(model, name, lambda x, *rest, f=encode, n=counts: n.append(len(x)) or f(x, *rest))
    cache_features(model, processor, alter(pairs), tmp_path / "old", shard_size=2)
    assert (sum(seen), sum(read)) == (pictures, captions)
    assert files(tmp_path / "old") == files(tmp_path / "new")
    names = ", ".join(f"features-0000{number}.safetensors" for number in shards)
    assert [names in message for message in caplog.messages] == ([True] if shards else [])
    cached = FeatureDataset(tmp_path / "old")
    assert [(each["key"], each["captions"]) for each in cached] == [(p["key"], p["captions"]) for p in alter(pairs)]


@pytest.mark.parametrize("as_files", [False, True])
def test_a_picture_that_was_replaced_under_its_name_is_seen(pairs, tmp_path, as_files):
    def prepare(pair: dict) -> dict:
        buffer = io.BytesIO()
        pair["image"].save(buffer, "png")
        return {**pair, "image": buffer.getvalue()} if as_files else pair

    model, processor = build("separate")
    before = cache_features(model, processor, map(prepare, pairs), tmp_path)[3]["vision_states"]
    changed = [*pairs[:3], recoloured(pairs[3]), pairs[4]]
    after = cache_features(model, processor, map(prepare, changed), tmp_path)[3]["vision_states"]
    expected = model.encode_images(processor.pixel_values([changed[3]["image"]]))[0]
    torch.testing.assert_close(after.float(), expected, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(before, after, atol=1e-2)


def test_an_interrupted_change_leaves_no_complete_cache(pairs, tmp_path, monkeypatch):
    model, processor = build("separate")
    cache_features(model, processor, pairs, tmp_path / "old", shard_size=2)
    changed = [recoloured(pair) for pair in pairs]
    cache_features(model, processor, changed, tmp_path / "new", shard_size=2)
    write, calls = features._write_shard, itertools.count()

    def stopping(*args):
        if next(calls):
            raise KeyboardInterrupt
        write(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "_write_shard", stopping)
        cache_features(model, processor, changed, tmp_path / "old", shard_size=2)
    with pytest.raises(ValueError, match="not complete"):
        FeatureDataset(tmp_path / "old")
    cache_features(model, processor, changed, tmp_path / "old", shard_size=2)
    assert files(tmp_path / "old") == files(tmp_path / "new")


@pytest.fixture(scope="module")
def built() -> tuple[VikdfForConditionalGeneration, VikdfProcessor]:
    """Once, for no two tokenizers are trained alike."""
    return build("separate")


@pytest.fixture(scope="module")
def whole(built, pairs, tmp_path_factory) -> Path:
    """A cache of two shards."""
    folder = tmp_path_factory.mktemp("whole")
    cache_features(*built, pairs, folder, shard_size=3, pool_grid=1)
    return folder


@given(st.data())
def test_no_flipped_byte_is_returned(whole, tmp_path_factory, data):
    """An example is what was written, or there is an OSError that names the file."""
    folder = tmp_path_factory.mktemp("damaged")
    for name, content in files(whole).items():
        (folder / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(files(whole))))
    content = bytearray(files(whole)[name])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 1000).filter(lambda i: i < len(content)))
        content[place] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    expected = FeatureDataset(whole)
    try:
        damaged = FeatureDataset(folder)
        for index, example in enumerate(expected):
            try:
                assert_equal(damaged[index], example)
            except OSError as error:
                assert name in str(error) and "cache_features" in str(error)
    except (OSError, ValueError) as error:
        assert name == "index.json" and "cache_features" in str(error)


def test_every_byte_of_a_shard_is_guarded(whole, tmp_path):
    """Each part of the file: the size of the header, the header, every tensor; but how far the last row reaches."""
    name = "features-00001.safetensors"
    content = (whole / name).read_bytes()
    for file in ("index.json", name, "features-00000.safetensors"):
        (tmp_path / file).write_bytes((whole / file).read_bytes())
    expected, noticed = FeatureDataset(whole), 0
    for place in range(0, len(content), 7):
        (tmp_path / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            damaged = FeatureDataset(tmp_path)
            assert_equal(damaged[3], expected[3])
            assert_equal(damaged[4], expected[4])
        except OSError:
            noticed += 1
    assert noticed > 0.99 * len(range(0, len(content), 7))


@pytest.mark.parametrize("damage", ["flipped", "cut off", "gone", "of other settings", "index"])
def test_damage_is_mended(pairs, built, whole, tmp_path, damage, monkeypatch):
    """By another call, which encodes the damaged shard alone."""
    for name, content in files(whole).items():
        (tmp_path / name).write_bytes(content)
    (model, processor), other = built, tmp_path.parent / f"{tmp_path.name}-other"
    shard = tmp_path / "features-00001.safetensors"
    if damage == "flipped":
        content = bytearray(shard.read_bytes())
        content[-1000] ^= 1
        shard.write_bytes(content)
    elif damage == "cut off":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif damage == "gone":
        shard.unlink()
    elif damage == "of other settings":
        cache_features(model, processor, pairs, other, shard_size=3, pool_grid=2)
        shard.write_bytes((other / shard.name).read_bytes())
    else:
        (tmp_path / "index.json").write_text(
            (tmp_path / "index.json").read_text().replace('"num_pictures": 5', '"num_pictures": 4')
        )
    with pytest.raises(OSError, match="Call cache_features again with the same pairs"):
        FeatureDataset(tmp_path)[4]
    seen, encode = [], model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    cache_features(model, processor, pairs, tmp_path, shard_size=3, pool_grid=1)
    assert sum(seen) == (0 if damage == "index" else 2)
    assert files(tmp_path) == files(whole)


def test_captions_are_encoded_anew_for_another_tokenizer(pairs, built, tmp_path, monkeypatch):
    """One of as many tokens, so that no setting differs."""
    before, tokenize = cache_features(*built, pairs, tmp_path)[0], features.tokenize_captions
    monkeypatch.setattr(features, "tokenize_captions", lambda *args: [ids.flip(0) for ids in tokenize(*args)])
    monkeypatch.setattr(built[0], "encode_images", lambda pixels: pytest.fail("pictures did not change"))
    after = cache_features(*built, pairs, tmp_path)[0]
    assert torch.equal(after["vision_states"], before["vision_states"])
    assert torch.equal(after["context_input_ids"][0], before["context_input_ids"][0].flip(0))
    ids = after["context_input_ids"][0][None]  # [1, T]
    expected = built[0].encode_context(ids, torch.ones_like(ids))[0]
    torch.testing.assert_close(after["context_states"][0].float(), expected, rtol=2e-3, atol=2e-3)


def test_a_cache_of_the_earlier_format_is_built_anew(pairs, built, whole, tmp_path, caplog):
    """As the first format was: neither hashes nor checksums."""
    for shard in whole.glob("features*"):
        tensors = load_file(shard)
        for name in ("checksums", "settings"):
            del tensors[name]
        texts = [json.dumps([pair["key"], pair["captions"]]).encode() for pair in pairs]
        texts = texts[:3] if shard.name == "features-00000.safetensors" else texts[3:]
        tensors["texts"] = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
        tensors["text_offsets"] = torch.tensor([0, *itertools.accumulate(map(len, texts))])
        save_file(tensors, tmp_path / shard.name)
    index = json.loads((whole / "index.json").read_text())
    del index["checksum"], index["key"]["format"]
    (tmp_path / "index.json").write_text(json.dumps(index, indent=2))
    with pytest.raises(ValueError, match="has format 1, expected format 2: call cache_features again"):
        FeatureDataset(tmp_path)
    model, processor = built
    with pytest.raises(ValueError, match="pool_grid: 1 cached, 2 now"):
        cache_features(model, processor, pairs, tmp_path, shard_size=3, pool_grid=2)
    cache_features(model, processor, pairs, tmp_path, shard_size=3, pool_grid=1)
    assert any("earlier format" in message for message in caplog.messages)
    assert files(tmp_path) == files(whole)


def test_only_what_differs_of_a_setting_is_told(pairs, tmp_path):
    cache_features(*build("separate"), pairs, tmp_path)
    with pytest.raises(ValueError) as error:
        cache_features(*build("separate", size=40), pairs, tmp_path)
    assert "image_processor: {" in str(error.value) and "crop_size" in str(error.value)
    assert "image_mean" not in str(error.value) and "delete the folder to rebuild it" in str(error.value)


def test_what_cannot_be_read_says_what_to_do(pairs, tmp_path):
    with pytest.raises(FileNotFoundError, match="cache_features"):
        FeatureDataset(tmp_path / "none")
    model, processor = build("separate")
    cached = cache_features(model, processor, pairs, tmp_path, shard_size=2)
    shard = tmp_path / "features-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    cached = FeatureDataset(tmp_path)
    assert cached[1]["key"] == "shard/1"
    with pytest.raises(OSError, match="features-00001.*Call cache_features again with the same pairs"):
        cached[2]
    cache_features(model, processor, pairs, tmp_path, shard_size=2)
    assert FeatureDataset(tmp_path)[2]["key"] == "shard/2"


def test_a_full_disk_leaves_what_was_finished(pairs, tmp_path, monkeypatch):
    model, processor = build("separate")
    with monkeypatch.context() as patch:
        write, calls = features.save_file, itertools.count(1)

        def fill(tensors, path):
            write(tensors, path)
            if next(calls) == 2:
                raise SafetensorError("I/O error: No space left on device (os error 28)")

        patch.setattr(features, "save_file", fill)
        with pytest.raises(OSError, match="features-00001.*No space left"):
            cache_features(model, processor, pairs, tmp_path, shard_size=2)
    assert set(files(tmp_path)) == {"index.json", "features-00000.safetensors"}
    assert len(cache_features(model, processor, pairs, tmp_path, shard_size=2)) == len(pairs)


def test_states_too_large_for_float16_are_refused(pairs, tmp_path, monkeypatch):
    model, processor = build("separate")
    monkeypatch.setattr(model, "encode_images", lambda pixels: torch.full((len(pixels), 17, 40), 7e4))
    with pytest.raises(ValueError, match="7e[+]04.*float16"):
        cache_features(model, processor, pairs, tmp_path)


def test_examples_are_read_alone_and_in_every_process(pairs, tmp_path):
    cached = cache_features(*build("separate"), pairs, tmp_path, shard_size=3)
    example = cached[1]
    for states in (example["vision_states"], *example["context_states"]):
        # a view of the file would take all of it along to another process
        assert (
            states.untyped_storage().nbytes()
            <= 2 * sum(row.numel() for row in example["context_states"]) + 2 * 17 * 40
        )
    buffer = io.BytesIO()
    pickle.dump(cached, buffer)
    assert buffer.tell() < 1000
    for each, expected in zip(pickle.loads(buffer.getvalue()), cached, strict=True):
        assert_equal(each, expected)
    loader = DataLoader(cached, batch_size=None, num_workers=2)  # forked with the files open
    for each, expected in zip(loader, cached, strict=True):
        assert_equal(each, expected)


def test_the_index_tells_where_the_states_are_from(pairs, tmp_path):
    cache_features(*build("separate"), pairs, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["num_pictures"] == len(pairs) and index["backbones"] == {}
    assert index["key"]["image_processor"]["crop_size"] == {"height": 32, "width": 32}
