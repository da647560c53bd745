"""examples/: each script prints what it says, and the notebook runs from top to bottom; on tiny models."""

import functools
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_from
from PIL import Image
from tiny_tokenizers import CHATML_WITH_GENERATION
from transformers import GenerationConfig, pipeline

import modeling_vikdf


EXAMPLES = Path(modeling_vikdf.__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
BEACH = "I spent the whole day at the beach with my dog."
BREAD = "My grandmother bakes bread every Sunday."


@pytest.fixture(scope="module")
def checkpoint(backbones, tmp_path_factory) -> Path:
    """A tiny model that replies with words."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = build_from(backbones, "qwen", "separate", dtype=torch.float32)
    processor.chat_template = CHATML_WITH_GENERATION
    never = [id_ for token, id_ in processor.tokenizer.get_vocab().items() if not re.fullmatch("Ġ?[a-z]+", token)]
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, suppress_tokens=never, do_sample=False)
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def run(checkpoint, monkeypatch, capsys):
    """What a script prints."""
    monkeypatch.setattr(modeling_vikdf, "DEFAULT_CHECKPOINT", checkpoint)

    def run(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


load = functools.cache(pipeline)


def reply(checkpoint: Path, messages: str | list[dict], images=None, **kwargs) -> str:
    kwargs = {"return_full_text": False, "max_new_tokens": 40, **kwargs}
    return load("vikdf-dialogue", model=str(checkpoint))(messages, images, **kwargs)[0]["generated_text"]


def test_every_example_is_listed_and_short():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert len(SCRIPTS) == 5
    for script in SCRIPTS:
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 40
        assert f"({script.name})" in readme and "rint" in script.read_text(encoding="utf-8").split('"""')[1]


def test_reply(run, checkpoint):
    with_knowledge, alone = run("reply.py").splitlines()
    assert with_knowledge == f"with knowledge: {reply(checkpoint, BEACH)}"
    assert alone == f"the LLM alone:  {reply(checkpoint, BEACH, use_knowledge=False)}"
    assert with_knowledge.split(":")[1].strip() != alone.split(":")[1].strip()


def test_stream(run, checkpoint):
    lines = run("stream.py", checkpoint).splitlines()
    assert lines[0::2] == [f"you> {BREAD}", "you> Would you like a slice?"]
    first = reply(checkpoint, BREAD)
    assert lines[1].removeprefix("vikdf> ").strip() == first
    chat = [("user", BREAD), ("assistant", first), ("user", "Would you like a slice?")]
    second = reply(checkpoint, [{"role": role, "content": content} for role, content in chat])
    assert lines[3].removeprefix("vikdf> ").strip() == second


def test_pictures(run, checkpoint, tmp_path):
    drawn = run("pictures.py").splitlines()
    assert [line[:4] for line in drawn] == ["you>", "vikd"] * 3
    files = [tmp_path / "red.png", tmp_path / "blue.png"]
    for file in files:
        Image.new("RGB", (64, 64), file.stem).save(file)
    own = run("pictures.py", checkpoint, *files).splitlines()
    assert own[0::2] == drawn[0::2] and own[5] == drawn[5]
    for said, replied, picture in zip(own[0::2], own[1::2], [*map(str, files), None], strict=True):
        message = [{"role": "user", "content": said.removeprefix("you> ")}]
        assert replied.removeprefix("vikdf> ") == reply(checkpoint, message, picture)


def test_fine_tune(run, tmp_path):
    *_, figures = [line for line in run("fine_tune.py", tmp_path / "tuned").splitlines() if "before" in line]
    before, after = (float(part.split(":")[1]) for part in figures.split(","))
    assert after < before
    assert reply(tmp_path / "tuned", BEACH)


def test_fine_tune_on_dialogues_of_ones_own(run, checkpoint, tmp_path):
    turns = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "the red dog"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert "before: " in run("fine_tune.py", tmp_path / "tuned", tmp_path / "chats.jsonl", checkpoint)


def test_serve(run, checkpoint):
    assert run("serve.py").strip() == reply(checkpoint, BREAD)


def test_the_notebook(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(modeling_vikdf, "DEFAULT_CHECKPOINT", checkpoint)
    notebook = json.loads((EXAMPLES / "knowledge.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    namespace, order = {}, []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        order.append(cell["execution_count"])
        capsys.readouterr()
        exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
        printed = capsys.readouterr().out
        kept = "".join("".join(output["text"]) for output in cell["outputs"])
        assert len(kept.splitlines()) == len(printed.splitlines()) or "#" in kept  # a line a token
    assert order == list(range(1, len(order) + 1))
