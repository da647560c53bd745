"""A save that is killed, wherever that happens, leaves what was there or what was to be there, and nothing else."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import build_from
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline

from modeling_vikdf import VikdfForConditionalGeneration, VikdfProcessor
from modeling_vikdf.sharing import export


FORMS = {
    "trained part": {},
    "trained part in shards": {"max_shard_size": "50KB"},
    "self-contained": {"include_backbones": True},
    "self-contained in shards": {"include_backbones": True, "max_shard_size": "300KB"},
}
# what Python tells before it asks the system to change something
CHANGES = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.copyfile"}
_watchers = []


def _tell(event: str, arguments: tuple) -> None:
    if event in CHANGES:
        for watcher in list(_watchers):
            watcher()


sys.addaudithook(_tell)  # for good: hooks cannot be removed


State = dict[str, bytes]


def files_of(folder: Path) -> State:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def kill_points(folder: Path) -> Iterator[list[State]]:
    """Every state of the folder that a killed process could leave, in order, those that differ in what is read."""
    states, seen, active = [], set(), []

    def watch() -> None:
        if active:  # reading the folder opens files, too
            return
        active.append(True)
        state = files_of(folder)
        heads = b"".join(state.get(head, b"") for head in ("config.json", "processor_config.json"))
        read = {name: data for name, data in state.items() if not is_abandoned(name, heads)}
        if (key := hash(tuple(sorted(read.items())))) not in seen:
            seen.add(key)
            states.append(state)
        active.pop()

    def is_abandoned(name: str, heads: bytes) -> bool:
        return name.startswith(".saving-") and name.split("/")[0].encode() not in heads

    _watchers.append(watch)
    try:
        yield states
        watch()
    finally:
        _watchers.remove(watch)


def restore(state: State, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in state.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def llama(backbones, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model, processor = build_from(backbones, "llama", "separate")
    model.attach_vision_encoder()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def old(llama) -> VikdfForConditionalGeneration:
    return marked(VikdfForConditionalGeneration.from_pretrained(llama), 1)


@pytest.fixture(scope="module")
def new(llama) -> VikdfForConditionalGeneration:
    return marked(VikdfForConditionalGeneration.from_pretrained(llama), 2)


def marked(model: VikdfForConditionalGeneration, mark: int) -> VikdfForConditionalGeneration:
    """Every file that is saved tells which model it is of."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(mark)
    model.config.state_dropout = mark / 10
    model.generation_config.max_new_tokens = mark
    model.attach_vision_encoder()
    return model


def marks_in(folder: Path, loader=VikdfForConditionalGeneration.from_pretrained) -> set:
    """Of which models what is loaded is, and whether it is self-contained."""
    model = loader(folder)
    trained = {
        round(value, 6)
        for name, each in model.named_parameters()
        if each.requires_grad
        for value in each.detach().unique().tolist()
    }
    marks = {*trained, round(model.config.state_dropout * 10, 6), float(model.generation_config.max_new_tokens)}
    return marks | {"self-contained" if not model.config.backbones else "trained part"}


@pytest.mark.parametrize(("before", "after"), list(product(FORMS, FORMS)))
def test_a_model_loads_as_the_old_or_as_the_new_one(old, new, tmp_path, before, after):
    old.save_pretrained(tmp_path / "folder", **FORMS[before])
    with kill_points(tmp_path / "folder") as states:
        new.save_pretrained(tmp_path / "folder", **FORMS[after])
    allowed = [{1, before.removesuffix(" in shards")}, {2, after.removesuffix(" in shards")}]
    found = [marks_in(restore(state, tmp_path / "killed")) for state in states]
    assert len(states) >= 5 and found[0] == allowed[0] and found[-1] == allowed[1]
    switch = found.index(allowed[1])
    assert found == [allowed[0]] * switch + [allowed[1]] * (len(found) - switch)


@pytest.mark.parametrize("loader", ["AutoModelForCausalLM", "a folder that cannot be written"])
def test_no_repair_is_needed_to_load(old, new, tmp_path, loader):
    old.save_pretrained(tmp_path / "folder", include_backbones=True)
    with kill_points(tmp_path / "folder") as states:
        new.save_pretrained(tmp_path / "folder")
    load, write = VikdfForConditionalGeneration.from_pretrained, patch.object(os, "replace", side_effect=OSError)
    if loader == "AutoModelForCausalLM":
        load, write = AutoModelForCausalLM.from_pretrained, contextlib.nullcontext()
    with write:
        for state in states[1:]:
            folder = restore(state, tmp_path / "killed")
            assert marks_in(folder, load) == {2, "trained part"}
            assert load(folder).name_or_path == str(folder)  # by which an adapter would find it
            assert files_of(folder) == state


def test_where_files_cannot_be_linked(old, new, tmp_path):
    old.save_pretrained(tmp_path / "folder")
    with patch.object(os, "link", side_effect=OSError("not supported")), kill_points(tmp_path / "folder") as states:
        new.save_pretrained(tmp_path / "folder")
    for state in states:
        assert marks_in(restore(state, tmp_path / "killed")) in ({1, "trained part"}, {2, "trained part"})


def test_the_save_after_a_killed_one(old, new, tmp_path):
    """It may be killed, too; and what killed saves left is gone after one that is not."""
    new.save_pretrained(tmp_path / "other", include_backbones=True)
    with kill_points(tmp_path / "other") as states:
        old.save_pretrained(tmp_path / "other")
    finished = set(files_of(tmp_path / "other"))
    for state in states:
        folder = restore(state, tmp_path / "folder")
        (folder / ".saving-abcd1234").mkdir()  # as versions before this one left them
        with kill_points(folder) as later:
            new.save_pretrained(folder)
        assert set(files_of(folder)) == finished and not list(folder.glob(".saving*"))
        for again in later:
            marks = marks_in(restore(again, tmp_path / "killed"))
            assert marks in ({1, "trained part"}, {2, "self-contained"}, {2, "trained part"})


def test_a_disk_that_is_full(old, new, tmp_path):
    """An exception leaves no more than a kill does, and nothing behind."""
    old.save_pretrained(tmp_path)
    before = files_of(tmp_path)
    with patch.object(os, "fsync", side_effect=OSError("No space left on device")), pytest.raises(OSError):
        new.save_pretrained(tmp_path)
    assert files_of(tmp_path) == before and not list(tmp_path.glob(".saving*"))


def test_all_is_on_the_disk_before_it_counts(new, tmp_path):
    """A power cut keeps the order of renames, but not that of what was written and never flushed."""
    flushed, moved = set(), []
    fsync, replace = os.fsync, os.replace

    def note_flush(descriptor: int) -> None:
        flushed.add(os.stat(descriptor).st_ino)
        fsync(descriptor)

    def note_move(source, target) -> None:
        moved.append((Path(target).name, os.stat(source).st_ino in flushed))
        replace(source, target)

    with patch.object(os, "fsync", note_flush), patch.object(os, "replace", note_move):
        new.save_pretrained(tmp_path)
    assert moved[0][0] == moved[-1][0] == "config.json" and all(was_flushed for _, was_flushed in moved)


def test_a_repository_names_no_folder_of_its_own_as_unfinished(new, tmp_path):
    new.save_pretrained(tmp_path / "folder")
    new.save_pretrained(tmp_path / "elsewhere")
    path = tmp_path / "folder/config.json"
    path.write_text(path.read_text().replace("{", '{"saved_in": "../elsewhere",', 1))
    with pytest.raises(ValueError, match="which is not beside it"):
        VikdfForConditionalGeneration.from_pretrained(tmp_path / "folder")


# ---- processors ----


def marked_processor(folder: Path, mark: int) -> VikdfProcessor:
    """Every file that is saved tells which processor it is of."""
    processor = VikdfProcessor.from_pretrained(folder)
    for tokenizer in (processor.tokenizer, processor.context_tokenizer):
        tokenizer.add_tokens([f"<mark{number}>" for number in range(mark)])
    processor.chat_template += "." * mark
    processor.num_knowledge_tokens = mark
    return processor


def marks_of(processor: VikdfProcessor) -> set[int]:
    """Of which processors what was loaded is."""
    vocabularies = [tokenizer.get_vocab() for tokenizer in (processor.tokenizer, processor.context_tokenizer)]
    marks = {sum(token.startswith("<mark") for token in vocabulary) for vocabulary in vocabularies}
    dots = len(processor.chat_template) - len(processor.chat_template.rstrip("."))
    return marks | {dots, processor.num_knowledge_tokens}


@pytest.mark.parametrize("loader", [VikdfProcessor, AutoProcessor])
def test_a_processor_loads_as_the_old_or_as_the_new_one(llama, tmp_path, loader):
    old, new = marked_processor(llama, 1), marked_processor(llama, 2)
    old.save_pretrained(tmp_path / "folder")
    with kill_points(tmp_path / "folder") as states:
        (path,) = new.save_pretrained(tmp_path / "folder")
    assert path == str(tmp_path / "folder/processor_config.json")
    found = [marks_of(loader.from_pretrained(restore(state, tmp_path / "killed"))) for state in states]
    assert len(states) > 5 and found == [{1}] + [{2}] * (len(states) - 1)
    assert not list((tmp_path / "folder").glob(".saving*"))


def test_no_file_of_an_earlier_processor_stays(llama, tmp_path):
    """It would be read with the new ones."""
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    stale = ("added_tokens.json", "special_tokens_map.json", "context_tokenizer/vocab.txt")
    for name in stale:
        (tmp_path / name).write_text("{}")
    (tmp_path / "README.md").write_text("mine")
    marked_processor(llama, 1).save_pretrained(tmp_path)
    assert not any((tmp_path / name).exists() for name in stale)
    assert (tmp_path / "README.md").exists() and (tmp_path / "model.safetensors").exists()


def test_a_processor_is_pushed_another_way(llama, tmp_path):
    with pytest.raises(ValueError, match="call push_to_hub"):
        VikdfProcessor.from_pretrained(llama).save_pretrained(tmp_path, push_to_hub=True)


def test_a_killed_save_is_shared_as_it_loads(llama, new, tmp_path):
    shutil.copytree(llama, tmp_path / "folder")
    (tmp_path / "folder/recipe.yaml").write_text("stages: []")
    with kill_points(tmp_path / "folder") as states:
        new.save_pretrained(tmp_path / "folder", include_backbones=True)
    for number, state in enumerate(states[1:]):
        export(restore(state, tmp_path / "killed"), tmp_path / f"{number}", include_backbones=True)
        assert marks_in(tmp_path / f"{number}") == {2, "self-contained"}
        assert (tmp_path / f"{number}/recipe.yaml").exists() and "saved_in" not in files_of(tmp_path / f"{number}")
        assert b"saved_in" not in (tmp_path / f"{number}/config.json").read_bytes()


@pytest.mark.parametrize("before", ["nothing", "both", "both, the processor unfinished"])
def test_a_pipeline_is_replaced_together(llama, old, new, tmp_path, before):
    """A processor of another model writes other placeholders than this one reads."""
    processors = [marked_processor(llama, mark) for mark in (1, 2)]
    folder, nothing = tmp_path / "folder", before == "nothing"
    folder.mkdir()
    if not nothing:
        pipeline("vikdf-dialogue", model=old, processor=processors[0]).save_pretrained(folder)
    if before == "both, the processor unfinished":
        with kill_points(folder) as states:
            processors[0].save_pretrained(folder)
        restore(states[1], folder)
    with kill_points(folder) as states:
        pipeline("vikdf-dialogue", model=new, processor=processors[1]).save_pretrained(folder)
    assert not list(folder.glob(".saving*"))
    found = []
    for state in states:
        killed = restore(state, tmp_path / "killed")
        if "config.json" not in state:
            found.append(None)
            continue
        model, processor = marks_in(killed), marks_of(VikdfProcessor.from_pretrained(killed))
        assert model == {*processor, "trained part"}
        assert marks_of(AutoProcessor.from_pretrained(killed)) == processor
        found += processor
    switch = found.index(2)
    assert found == [None if nothing else 1] * switch + [2] * (len(found) - switch) and 0 < switch < len(found) - 3


def test_a_processor_saved_over_an_unfinished_pipeline(llama, old, new, tmp_path):
    with kill_points(tmp_path) as states:
        pipeline("vikdf-dialogue", model=old, processor=marked_processor(llama, 1)).save_pretrained(tmp_path)
    unfinished = next(state for state in states if b"saved_in" in state.get("config.json", b""))
    restore(unfinished, tmp_path / "folder")
    marked_processor(llama, 2).save_pretrained(tmp_path / "folder")
    assert marks_in(tmp_path / "folder") == {1, "trained part"}
    assert marks_of(VikdfProcessor.from_pretrained(tmp_path / "folder")) == {2}


def test_an_unfinished_save_that_was_copied_without_its_hidden_files(llama, old, tmp_path):
    pipe = pipeline("vikdf-dialogue", model=old, processor=marked_processor(llama, 1))
    with kill_points(tmp_path / "folder") as states:
        pipe.save_pretrained(tmp_path / "folder")
    unfinished = next(state for state in states if b"saved_in" in state.get("config.json", b""))
    restore({name: data for name, data in unfinished.items() if not name.startswith(".")}, tmp_path / "copy")
    for each in (VikdfForConditionalGeneration, VikdfProcessor):
        with pytest.raises(FileNotFoundError, match=r"copied without hidden files\? Copy it whole"):
            each.from_pretrained(tmp_path / "copy")
    with pytest.raises(FileNotFoundError, match="copied without hidden files"):
        export(tmp_path / "copy", tmp_path / "repository")
    pipeline("vikdf-dialogue", model=old, processor=marked_processor(llama, 2)).save_pretrained(tmp_path / "copy")
    assert marks_of(VikdfProcessor.from_pretrained(tmp_path / "copy")) == {2}
