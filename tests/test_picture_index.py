"""Picture indexes: what is near, what is on the disk, what is refused; and the index that ships with the Space."""

import io
import json
import os
import random
import weakref
from pathlib import Path

import pytest
import torch
from conftest import build_from
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import tiny_model

from modeling_vikdf import DEFAULT_CHECKPOINT, VikdfForConditionalGeneration
from modeling_vikdf.cli import main
from modeling_vikdf.data.sources import SkipReport
from modeling_vikdf.picture_index import (
    INDEX_NAME,
    Note,
    PictureIndex,
    Thresholds,
    embed_texts,
    fingerprint,
    load_notes,
    load_pictures,
)
from modeling_vikdf.processing_vikdf import read_picture


SHIPPED = Path(__file__).parents[1] / "spaces_demo" / "pictures"


@pytest.fixture(scope="module")
def parts(backbones):
    return build_from(backbones, "qwen", "separate")


def colours(number: int = 5) -> list[tuple[str, Image.Image]]:
    """Titles and pictures that no two are alike of."""
    draw = random.Random(0)
    return [
        (
            f"picture {i}",
            Image.frombytes("RGB", (8, 8), draw.randbytes(192)).resize((300, 200), Image.Resampling.NEAREST),
        )
        for i in range(number)
    ]


def by_hand(**changes) -> PictureIndex:
    """Three pictures at 0, 90 and 180 degrees."""
    fields = {
        "embeddings": torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]),
        "thumbnails": [b"zero", b"", b"half"],
        "titles": ["east", "north", "west"],
        "fingerprint": "abc",
    }
    return PictureIndex(**{**fields, **changes})


def test_nearest_by_hand():
    near, far = by_hand().nearest(torch.tensor([[0.8, 0.6], [-1.0, 0.0]]), k=2)
    assert [(match.title, match.thumbnail) for match in near] == [("east", b"zero"), ("north", b"")]
    assert [match.score for match in near] == pytest.approx([0.8, 0.6])
    assert [match.title for match in far] == ["west", "north"]
    assert len(by_hand().nearest(torch.tensor([[1.0, 0.0]]), k=9)[0]) == 3  # as many as there are


@pytest.mark.parametrize("embeddings", [torch.zeros(2), torch.zeros(1, 3)])
def test_embeddings_of_another_width_are_refused(embeddings):
    with pytest.raises(ValueError, match=r"Expected embeddings \[B, 2\]"):
        by_hand().nearest(embeddings)


@pytest.mark.parametrize(
    "changes", [{"titles": ["one"]}, {"thumbnails": [b""] * 4}, {"embeddings": torch.zeros(0, 2), "titles": []}]
)
def test_parts_that_do_not_fit_together_are_refused(changes):
    with pytest.raises(ValueError, match="for each picture"):
        by_hand(**changes)


def with_captions(**changes) -> PictureIndex:
    """Those three pictures; the northern one has two captions, at 180 and 0 degrees."""
    fields = {
        "notes": [Note(), Note(("out west", "out east"), "CC BY 2.0", "https://a.example/1.jpg"), Note()],
        "caption_embeddings": torch.tensor([[-1.0, 0.0], [1.0, 0.0]]),
    }
    return by_hand(**{**fields, **changes})


def test_a_captioned_picture_is_scored_by_its_nearest_caption_too():
    query = torch.tensor([[0.8, 0.6]])
    assert with_captions().scores(query).tolist()[0] == pytest.approx([0.8, (0.6 + 0.8) / 2, -0.8])
    match = with_captions().nearest(query, k=2)[0][1]
    assert (match.title, match.note.license, match.note.source) == ("north", "CC BY 2.0", "https://a.example/1.jpg")
    (first, score), second = with_captions().nearest_captions(query, k=5)[0]
    assert (first, second[0]) == ("out east", "out west") and score == pytest.approx(0.8)
    assert by_hand().nearest_captions(query) == [[]]


def test_nothing_is_found_where_nothing_stands_out(tmp_path):
    query = torch.tensor([[0.8, 0.6]])
    index = with_captions(thresholds=Thresholds(picture=0.75, caption=0.81))
    index.save(tmp_path)
    for strict in (index, PictureIndex.load(tmp_path)):
        assert [match.title for match in strict.nearest(query)[0]] == ["east"]
        assert strict.nearest_captions(query) == [[]]
        assert strict.nearest(-query) == [[strict.nearest(-query)[0][0]]]  # west alone


def test_notes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a note for each picture and an embedding for each caption"):
        with_captions(notes=[Note()])
    with pytest.raises(ValueError, match="1 captions"):
        with_captions(notes=[Note(), Note(("one",)), Note()])


# ---- building ----


def test_a_picture_is_nearest_to_itself(parts):
    model, processor = parts
    index = PictureIndex.build(model, processor, iter(colours()), batch_size=2)
    assert index.titles == [title for title, _ in colours()]
    for title, image in colours():
        pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        best = index.nearest(model.get_image_embeddings(pixels), k=1)[0][0]
        assert best.title == title and best.score == pytest.approx(1, abs=1e-5)
        thumbnail = read_picture(best.thumbnail)
        assert max(thumbnail.size) == 128 and thumbnail.width > thumbnail.height  # the shape is kept


def test_pictures_are_held_one_at_a_time(parts):
    alive, most = [], []

    def pictures():
        for number in range(8):
            title, image = colours(number + 1)[-1]
            alive.append(weakref.ref(image))
            most.append(sum(each() is not None for each in alive))
            yield title, image
            del image

    assert len(PictureIndex.build(*parts, pictures(), batch_size=8)) == 8
    assert max(most) <= 2 < 8


def test_a_rebuilt_index_keeps_its_thumbnails(parts):
    old = PictureIndex.build(*parts, colours())
    other, processor = tiny_model(seed=3), parts[1]
    with pytest.raises(ValueError, match=f"{fingerprint(parts[0])}.*{fingerprint(other)}.*vikdf index"):
        old.check_model(other)
    new = old.rebuild(other, processor)
    new.check_model(other)
    assert new.thumbnails == old.thumbnails and new.titles == old.titles
    assert not torch.allclose(new.embeddings, old.embeddings)
    # a thumbnail is embedded as it is, so the same model finds the same a second time
    assert torch.equal(new.rebuild(other, processor).embeddings, new.embeddings)


def test_the_fingerprint_tells_what_the_embeddings_depend_on(llama_model):
    before = fingerprint(llama_model)
    with torch.no_grad():
        llama_model.knowledge_gate.add_(1)  # only the LLM sees this
    assert fingerprint(llama_model) == before
    for parameter in (llama_model.iqformer.query_tokens, llama_model.matching_head.image_projection.bias):
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        assert fingerprint(llama_model) != before
        before = fingerprint(llama_model)


def test_a_model_without_eyes_and_no_pictures_are_refused(parts):
    with pytest.raises(ValueError, match="no vision encoder"):
        PictureIndex.build(tiny_model(vision_config=None), parts[1], colours())
    with pytest.raises(ValueError, match="no pictures"):
        PictureIndex.build(*parts, [])


# ---- on the disk ----


def test_saved_and_loaded(tmp_path):
    path = by_hand().save(tmp_path / "new" / "folder")
    loaded = PictureIndex.load(path.parent)
    assert torch.equal(loaded.embeddings, by_hand().embeddings)
    assert (loaded.thumbnails, loaded.titles, loaded.fingerprint) == ([b"zero", b"", b"half"], by_hand().titles, "abc")
    assert [each.name for each in path.parent.iterdir()] == [INDEX_NAME]


@given(st.data())
@settings(max_examples=150)
def test_damaged_files_are_refused_or_whole(tmp_path_factory, data):
    """Cut off or with bytes changed, a file is an index that can be asked, or a ValueError that names it."""
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(by_hand().save(folder).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / INDEX_NAME).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        index = PictureIndex.load(folder)
    except ValueError as error:
        assert INDEX_NAME in str(error)
    else:
        matches = index.nearest(torch.zeros(1, index.embeddings.shape[1]))[0]
        assert all(isinstance(match.thumbnail, bytes) and isinstance(match.title, str) for match in matches)


def test_notes_are_saved_and_indexes_of_old_have_none(tmp_path):
    loaded = PictureIndex.load(with_captions().save(tmp_path).parent)
    assert loaded.notes == with_captions().notes and loaded.thresholds is None
    assert torch.equal(loaded.caption_embeddings, with_captions().caption_embeddings)
    with safe_open(tmp_path / INDEX_NAME, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "caption_embeddings"}
        metadata = {name: file.metadata()[name] for name in ("titles", "fingerprint")}
    save_file(tensors, tmp_path / INDEX_NAME, metadata)
    old = PictureIndex.load(tmp_path)
    assert old.notes == [Note()] * 3 and old.nearest_captions(torch.eye(2)) == [[], []]


def test_licences_are_listed_beside_the_index(tmp_path):
    with_captions().save(tmp_path)
    credits = (tmp_path / "CREDITS.md").read_text(encoding="utf-8")
    assert "* CC BY 2.0: <https://creativecommons.org/licenses/by/2.0/>" in credits
    assert "| north | CC BY 2.0 | <https://a.example/1.jpg> |" in credits
    assert Note(license="CC BY-SA 2.0").license_url == "https://creativecommons.org/licenses/by-sa/2.0/"
    assert Note(license="all rights reserved").license_url == ""


def test_no_index_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="vikdf index PICTURES --output"):
        PictureIndex.load(tmp_path)


# ---- reading pictures ----


def test_pictures_of_a_folder_and_what_is_none(tmp_path):
    (tmp_path / "animals").mkdir()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "animals" / "black-cat_1.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "rose.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    (tmp_path / "LICENSE").write_text("free")
    report = SkipReport(tmp_path.parent / f"{tmp_path.name}-report")
    pictures, total = load_pictures(tmp_path, report)
    found = dict(pictures)
    assert list(found) == ["black cat 1", "rose"] and total == 4
    assert found["black cat 1"].getpixel((0, 0)) == (255, 255, 255)  # not the black under what is transparent
    assert set(report.skipped()["unreadable picture"]) == {"broken.png", "LICENSE"}


def test_what_is_no_regular_file_is_reported(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to("gone.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    report = SkipReport(tmp_path.parent / f"{tmp_path.name}-report")
    assert [title for title, _ in load_pictures(tmp_path, report)[0]] == ["a"]
    assert set(report.skipped()["unreadable picture"]) == {"pipe.png", "broken.png", "zero.png"}


def test_transparent_pictures_of_the_caller_are_embedded_and_shown_on_white(parts):
    clear, white = Image.new("RGBA", (40, 40), (0, 0, 0, 0)), Image.new("RGB", (40, 40), "white")
    index = PictureIndex.build(*parts, [("clear", clear), ("white", white)])
    assert torch.equal(index.embeddings[0], index.embeddings[1]) and index.thumbnails[0] == index.thumbnails[1]


def test_pictures_with_captions(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "A red wall."}\n')
    pictures, _ = load_pictures(tmp_path, SkipReport())
    assert [(title, image.size) for title, image in pictures] == [("A red wall.", (4, 4))]


def test_captions_and_credits_reach_the_index(parts, tmp_path):
    lines = [
        {
            "captions": ["A  dog runs.", "A very big dog runs."],
            "license": "CC BY 2.0",
            "source": "https://a.example/1",
        },
        {"text": "A red wall."},
    ]
    for number, line in enumerate(lines):
        Image.new("RGB", (4, 4), ("red", "green")[number]).save(tmp_path / f"{number}.png")
        line["file_name"] = f"{number}.png"
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    notes = load_notes(tmp_path, SkipReport())
    index = PictureIndex.build(*parts, load_pictures(tmp_path, SkipReport())[0], notes=notes)
    assert index.titles == ["A dog runs.", "A red wall."]
    assert index.notes[0] == Note(("A dog runs.", "A very big dog runs."), "CC BY 2.0", "https://a.example/1")
    assert index.notes[1] == Note(("A red wall.",))
    index.thresholds = Thresholds(0.5, 0.5)
    again = index.rebuild(*parts)
    assert again.notes == index.notes and again.thresholds is None  # of other embeddings
    assert torch.allclose(again.caption_embeddings, embed_texts(*parts, index.captions), atol=1e-6)
    assert load_notes(tmp_path / "gone", SkipReport()) == {}


def test_credits_of_two_pictures_with_one_title_are_refused(tmp_path):
    lines = [{"file_name": f"{name}.png", "text": "A dog.", "source": name} for name in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="'A dog.': reword"):
        load_notes(tmp_path, SkipReport())


def test_sources_without_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no files"):
        load_pictures(tmp_path, SkipReport())
    with pytest.raises(FileNotFoundError, match="gone"):
        load_pictures(tmp_path / "gone", SkipReport())


# ---- the command ----


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in parts:
        part.save_pretrained(folder)
    return folder


def test_the_command_indexes_and_indexes_anew(parts, checkpoint, tmp_path, capsys):
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    for title, image in colours(3):
        image.save(source / f"{title}.png")
    (source / "broken.png").write_bytes(b"")
    main(["index", str(source), "--output", str(output), "--model", str(checkpoint)])
    captured = capsys.readouterr()
    assert captured.out == f"Wrote 3 pictures to {output / INDEX_NAME}\n"
    assert "1 x unreadable picture: broken.png" in captured.err
    index = PictureIndex.load(output)
    index.check_model(parts[0])

    index.fingerprint = "stale"
    index.save(output)
    main(["index", str(output), "--output", str(output), "--model", str(checkpoint)])
    again = PictureIndex.load(output)
    again.check_model(parts[0])
    assert again.thumbnails == index.thumbnails


@pytest.mark.parametrize(
    ("source", "message"), [("gone", "gone"), ("empty", "holds no files"), ("text", "no pictures to embed")]
)
def test_the_command_says_what_is_wrong(checkpoint, tmp_path, capsys, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no picture")
    with pytest.raises(SystemExit) as exit_:
        main(["index", str(tmp_path / source), "--output", str(tmp_path / "output"), "--model", str(checkpoint)])
    assert message in exit_.value.code and "vikdf: " in exit_.value.code


# ---- what ships ----


def test_the_shipped_index_is_that_of_the_default_checkpoint():
    """Stale after a new default: `vikdf index spaces_demo/pictures --output spaces_demo/pictures` embeds it anew."""
    index = PictureIndex.load(SHIPPED)
    index.check_model(VikdfForConditionalGeneration.from_pretrained(DEFAULT_CHECKPOINT))
    assert len(index) > 100 and len(set(index.titles)) == len(index)
    assert index.thresholds is not None and len(index.captions) > 3 * len(index)
    assert (SHIPPED / INDEX_NAME).stat().st_size < 3_000_000
    credits = (SHIPPED / "CREDITS.md").read_text(encoding="utf-8")
    for note in index.notes:
        assert note.license in ("CC BY 2.0", "CC BY-SA 2.0") and f"| {note.license} | <{note.source}> |" in credits
    for thumbnail in index.thumbnails:
        with Image.open(io.BytesIO(thumbnail), formats=["WEBP"]) as image:
            assert max(image.size) <= 128
