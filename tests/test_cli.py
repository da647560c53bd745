"""The command `vikdf`: what it prints where, what it writes, how it ends."""

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_from
from safetensors.torch import load_file, save_file
from test_golden import GOLDEN
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

import modeling_vikdf
from modeling_vikdf.cli import main


needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden folder at {GOLDEN} (set VIKDF_GOLDEN_DIR)")
PACKAGE_ROOT = Path(modeling_vikdf.__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(backbones, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor = build_from(backbones, "qwen", "separate")
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, do_sample=False, max_new_tokens=50)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def replies(checkpoint: Path, *turns: str, max_new_tokens: int = 6, **kwargs) -> list[str]:
    """What the pipeline answers to successive user turns; a line break in a reply counts as a space."""
    pipe, messages, answers = pipeline("vikdf-dialogue", model=str(checkpoint)), [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        messages = pipe(messages, max_new_tokens=max_new_tokens, **kwargs)[0]["generated_text"]
        answers.append(messages[-1]["content"])
    return answers


def run(capsys: pytest.CaptureFixture, *argv: object) -> tuple[str, str]:
    capsys.readouterr()
    main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return captured.out, captured.err


def fails(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The one line that it ends with."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in argv])
    assert capsys.readouterr().out == ""
    assert isinstance(exit_.value.code, str)  # which Python prints to stderr, and ends with 1
    return exit_.value.code


# ---- chat ----


def test_messages_are_successive_turns_and_print_one_reply_each(checkpoint, capsys):
    turns = ("What is your dog doing?", "It is snowing outside.")
    out, err = run(
        capsys, "chat", "--model", checkpoint, "--max-new-tokens", 6, "--message", turns[0], "--message", turns[1]
    )
    first, second = replies(checkpoint, *turns)
    assert [line.strip() for line in out.splitlines()] == [first, second]
    assert first and second and second != replies(checkpoint, turns[1])[0]  # the dialogue is kept
    assert err == ""


def test_without_knowledge(checkpoint, capsys):
    turn = "What is your dog doing?"
    out, _ = run(capsys, "chat", "--model", checkpoint, "--no-knowledge", "--max-new-tokens", 6, "--message", turn)
    assert out.strip() == replies(checkpoint, turn, use_knowledge=False)[0] != replies(checkpoint, turn)[0]


def test_a_message_and_no_more_although_interactive_without_a_terminal(checkpoint, capsys):
    out, _ = run(
        capsys, "chat", "--model", checkpoint, "--max-new-tokens", 6, "--interactive", "--message", "Look at the sky."
    )
    assert out.splitlines()[0] == "you> Look at the sky."
    assert out.splitlines()[1].startswith("vikdf> ") and len(out.splitlines()) == 2


def test_lines_from_a_pipe(checkpoint, capsys, monkeypatch):
    lines = [
        "What is your dog doing?",
        "",
        "It is snowing outside.",
        "/reset",
        "It is snowing outside.",
        "/exit",
        "no",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    out, err = run(capsys, "chat", "--model", checkpoint, "--max-new-tokens", 6)
    first, second = replies(checkpoint, lines[0], lines[2])
    assert [line.strip() for line in out.splitlines()] == [first, second, replies(checkpoint, lines[2])[0]]
    assert "new dialogue" in err


def test_a_refused_message_does_not_end_the_dialogue(checkpoint, capsys, monkeypatch):
    lines = ["What is your dog doing?", "a <|knowledge|> b", "It is snowing outside."]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    out, err = run(capsys, "chat", "--model", checkpoint, "--max-new-tokens", 6)
    assert [line.strip() for line in out.splitlines()] == replies(checkpoint, lines[0], lines[2])
    assert "reserved for knowledge" in err


def test_a_terminal(checkpoint):
    """In a process of its own behind a pseudo-terminal, ended by Ctrl-D."""
    ours, theirs = pty.openpty()
    path = os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "modeling_vikdf.cli", "chat", "--model", str(checkpoint), "--max-new-tokens", "6"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        seen = b""

        def wait_for(text: bytes, times: int = 1) -> None:
            nonlocal seen
            while seen.count(text) < times:
                try:
                    seen += os.read(ours, 1024)
                except OSError:  # the process has ended
                    pytest.fail(f"ended before {text!r}: {seen!r}")

        wait_for(b"you> ")
        os.write(ours, b"What is your dog doing?\n")
        wait_for(b"you> ", 2)
        os.write(ours, b"/reset\n")
        wait_for(b"you> ", 3)
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    os.close(ours)
    text = seen.decode(errors="replace").replace("\r\n", "\n")
    assert "/reset starts a new dialogue" in text and "new dialogue)" in text
    assert "vikdf> " + replies(checkpoint, "What is your dog doing?")[0][:10] in text.replace("vikdf>  ", "vikdf> ")


def test_errors_of_chat(checkpoint, capsys, tmp_path):
    assert str(tmp_path / "nothing") in fails(capsys, "chat", "--model", tmp_path / "nothing", "--message", "a")
    assert "content is empty" in fails(capsys, "chat", "--model", checkpoint, "--message", "")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "model.safetensors" and path.is_file():
            (broken / path.name).write_bytes(path.read_bytes())
    message = fails(capsys, "chat", "--model", broken, "--message", "a")
    assert message.startswith("vikdf: ") and "model.safetensors" in message and "\n" not in message.strip()


def test_interrupting_ends_quietly(checkpoint, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(modeling_vikdf.VikdfDialoguePipeline, "stream", interrupt)
    with pytest.raises(SystemExit) as exit_:
        main(["chat", "--model", str(checkpoint), "--message", "a"])
    assert exit_.value.code == 130


# ---- new ----


def new(backbones: Path, output: Path, *more: str) -> list[str]:
    sizes = ["--layers", "1", "--width", "32", "--heads", "4", "--num-knowledge-tokens", "3"]
    names = ["--language-model", str(backbones / "llama"), "--context-encoder", str(backbones / "bert")]
    return ["new", *names, "--output", str(output), *sizes, *more]


def test_new_makes_a_model_that_talks(backbones, capsys, tmp_path):
    out, _ = run(capsys, *new(backbones, tmp_path, "--system-prompt", "Answer in one short sentence."))
    assert str(tmp_path) in out
    pipe = pipeline("vikdf-dialogue", model=str(tmp_path))
    assert pipe.processor.system_prompt == "Answer in one short sentence."
    assert pipe.model.config.num_knowledge_tokens == 3
    assert (pipe.model.knowledge_gate == 1).all()
    # the LLM's own defaults draw at random; a new model is greedy until told otherwise
    assert not pipe.model.generation_config.do_sample
    assert run(capsys, "chat", "--model", tmp_path, "--message", "a")[0].strip()


def test_new_with_eyes_and_silent_knowledge(backbones, capsys, tmp_path):
    eyes = ["--vision-encoder", str(backbones / "dinov2")]
    run(capsys, *new(backbones, tmp_path, *eyes, "--base-text", "the dog"))
    pipe = pipeline("vikdf-dialogue", model=str(tmp_path))
    assert pipe.processor.image_processor is not None and pipe.model.config.vision_config is not None
    assert (pipe.model.knowledge_gate == 0).all() and not (pipe.model.knowledge_base == 0).all()


def test_errors_of_new(backbones, capsys, tmp_path):
    message = fails(capsys, *new(backbones, tmp_path, "--vision-encoder", "org/nowhere-to-be-found"))
    assert "org/nowhere-to-be-found" in message and "hf download" in message
    assert list(tmp_path.iterdir()) == []


# ---- convert ----


@needs_golden
def test_convert(capsys, tmp_path):
    out, _ = run(capsys, "convert", GOLDEN, "--output", tmp_path)
    assert str(tmp_path) in out
    golden = load_file(GOLDEN / "inputs_outputs.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        text = model.get_text_knowledge(golden["in.text_input_ids"], golden["in.text_attention_mask"])
        image = model.get_image_knowledge(golden["in.pixel_values"])
    torch.testing.assert_close(text, golden["out.knowledge_text"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(image, golden["out.knowledge_image"], atol=1e-4, rtol=1e-4)


@needs_golden
@pytest.mark.parametrize("damage", ["a key of the configuration", "a size", "a weight", "truncated"])
def test_errors_of_converting_a_damaged_checkpoint(capsys, tmp_path, damage):
    source = tmp_path / "source"
    source.mkdir()
    config, weights = json.loads((GOLDEN / "config.json").read_text()), load_file(GOLDEN / "weights_fp16.safetensors")
    if damage == "a key of the configuration":
        del config["language_model"]
    elif damage == "a size":
        config["num_query_tokens"] += 1
    elif damage == "a weight":
        del weights[next(name for name in weights if "intermediate_query" in name)]
    (source / "config.json").write_text(json.dumps(config))
    save_file(weights, source / "weights.safetensors")
    if damage == "truncated":
        (source / "weights.safetensors").write_bytes((source / "weights.safetensors").read_bytes()[:5000])
    message = fails(capsys, "convert", source, "--output", tmp_path / "out")
    assert str(source) in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_errors_of_convert(capsys, tmp_path):
    assert "config.json" in fails(capsys, "convert", tmp_path, "--output", tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    assert "query_tokens" in fails(capsys, "convert", tmp_path, "--output", tmp_path / "out")


# ---- benchmark ----


def test_benchmark_generation_writes_its_figures(checkpoint, capsys, tmp_path):
    output = tmp_path / "generation.json"
    out, _ = run(capsys, "benchmark", "generation", "--model", checkpoint, "--output", output, "--repeats", 1)
    figures = json.loads(output.read_text())
    assert json.loads(out) == figures
    for key in ("overhead_ratio", "time_to_first_token_s", "tokens_per_s", "batch8_over_batch1", "peak_memory_mb"):
        assert figures[key] > 0, key


# ---- the command itself ----


def test_every_command_explains_itself(capsys):
    for argv in (["--help"], *([command, "--help"] for command in ("chat", "new", "convert", "benchmark"))):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 0
        assert "usage: vikdf" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["sing"], ["chat", "--volume", "11"], ["benchmark", "singing"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2 and "usage: vikdf" in capsys.readouterr().err
