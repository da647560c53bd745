"""The command `vikdf`: what it prints where, what it writes, how it ends."""

import io
import json
import os
import pty
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build_from
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from test_golden import GOLDEN
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

import modeling_vikdf
from modeling_vikdf.benchmark_shapes import SHAPES
from modeling_vikdf.cli import main
from modeling_vikdf.environment import describe_environment
from modeling_vikdf.training.recipe_files import find_recipe, recipes


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


def in_process(**variables: str) -> dict[str, str]:
    """The environment of a process of its own."""
    path = os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


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
    lines = ["What is your dog doing?", "snow " * 1000, "It is snowing outside."]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    out, err = run(capsys, "chat", "--model", checkpoint, "--max-new-tokens", 6)
    assert [line.strip() for line in out.splitlines()] == replies(checkpoint, lines[0], lines[2])
    assert "ask for fewer max_new_tokens" in err


@pytest.mark.parametrize("encoding, wrong", [("utf-8", b"caf\xe9"), ("ascii", "café".encode())])
def test_a_line_with_invalid_bytes_does_not_end_the_dialogue(checkpoint, capsys, monkeypatch, encoding, wrong):
    lines = [b"What is your dog doing?", wrong, b"It is snowing outside."]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding=encoding))
    out, err = run(capsys, "chat", "--model", checkpoint, "--max-new-tokens", 6)
    spoken = [line.decode() for line in (lines[0], lines[2])]
    assert [line.strip() for line in out.splitlines()] == replies(checkpoint, *spoken)
    assert f"not {encoding}" in err


def test_a_file_of_deep_json_is_told_in_a_line(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("[" * 100_000)
    with pytest.raises(SystemExit, match="^vikdf: .*nested too deeply"):
        main(["compare", str(path), str(path)])


def test_a_terminal(checkpoint):
    """In a process of its own behind a pseudo-terminal, ended by Ctrl-D."""
    ours, theirs = pty.openpty()
    env = in_process(TERM="dumb")
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


# ---- recipes and models ----


def test_a_recipe_is_found_by_file_or_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_recipe("smollm2/distill")
    assert found.read_text() == (PACKAGE_ROOT / "configs" / "smollm2" / "distill.yaml").read_text()
    Path("smollm2").mkdir()
    Path("smollm2/distill").write_text("model: {}")
    assert find_recipe("smollm2/distill").samefile("smollm2/distill")  # what is there wins
    assert {"smoke", "paper/pretrain", "smollm2/tune"} <= set(recipes())
    assert not [name for name in recipes() if "study" in name or "accelerate" in name]


def test_recipes_of_a_wheel_are_its_own(tmp_path, monkeypatch):
    """Whatever another package has put beside it."""
    for path in ("modeling_vikdf/configs/ours.yaml", "configs/theirs.yaml"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    spec = SimpleNamespace(origin=str(tmp_path / "modeling_vikdf" / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert list(recipes()) == ["ours"]


def test_a_mistyped_recipe_names_the_nearest_and_all(capsys, tmp_path):
    message = fails(capsys, "distill", "--config", "smollm/distil")
    assert "did you mean 'smollm2/distill'?" in message and "paper/pretrain" in message


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("data:\nmodel: {checkpoint: nowhere}", ["data.trian=a.tar"], "for 'trian', did you mean 'train'?"),
        ("data: [a.tar]", ["data.train=b.tar"], "'data' must hold settings"),
        ("dat: {train: a.tar}", [], "for 'dat', did you mean 'data'?"),
        ("model: {checkpoint: nowhere", [], "is not a recipe"),
        ("model: {checkpoint: nowhere}\ndata: {train: a.tar}", [], "There is no folder 'nowhere'"),
    ],
)
def test_errors_of_recipes(recipe, overrides, message, capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe)
    said = fails(capsys, "distill", "--config", tmp_path / "recipe.yaml", f"output_dir={tmp_path}", *overrides)
    assert message in said and "\n" not in said


def test_only_what_the_command_does_is_told(checkpoint, tmp_path):
    """No bars of weights, no warnings of libraries, on correct use; in a process of its own, as warnings come once."""
    (tmp_path / "talk.jsonl").write_text('{"turns": ["How are you?", "Fine."]}\n')
    evaluate = ["evaluate", "--data", str(tmp_path / "talk.jsonl"), "--output", str(tmp_path / "report.json")]
    for argv in ([*evaluate, "--no-ranking"], ["export", "--include-backbones", "--output", str(tmp_path / "out")]):
        command = [sys.executable, "-m", "vikdf_cli", *argv, "--model", str(checkpoint)]
        result = subprocess.run(command, env=in_process(), check=True, capture_output=True, text=True)
        told = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.strip()]
        assert all(line.startswith(("Preparing: ", "Knowledge: ", "Evaluating: ")) for line in told), told


MODEL_COMMANDS = [
    ["chat", "--message", "a"],
    ["evaluate", "--data", "{data}", "--output", "report.json"],
    ["retrieve", "--data", "{pictures}"],
    ["index", "{pictures}", "--output", "index"],
    ["shrink", "--data", "{data}", "--validation", "{data}", "--output", "shrunk"],
    ["probe", "--data", "{items}", "--output", "probe.json"],
    ["export", "--output", "exported"],
    ["push", "--repo-id", "org/name"],
    ["benchmark", "generation"],
    ["serve"],
]


@pytest.mark.parametrize("command", MODEL_COMMANDS, ids=lambda command: command[0])
def test_a_mistyped_model_does_not_exist_and_no_hub_is_asked(command, capsys, tmp_path, monkeypatch):
    def ask(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("modeling_vikdf.backbones.cached_file", ask)
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    Path("talk.jsonl").write_text('{"turns": ["How are you?", "Fine."]}\n' * 100)
    item = {"id": "1", "context": ["a"], "positives": ["b"], "adversarial": ["c"], "random": ["d"]}
    Path("items.jsonl").write_text(json.dumps(item))
    Path("pictures").mkdir()
    Image.new("RGB", (8, 8)).save("pictures/a.png")
    Path("pictures/metadata.jsonl").write_text('{"file_name": "a.png", "text": "a dog"}')
    files = {"data": "talk.jsonl", "pictures": "pictures", "items": "items.jsonl"}
    for model in ("outputs/tnue", "tnue", "./tnue", "outputs/smollm2/tune", str(tmp_path / "tnue")):
        message = fails(capsys, *(word.format(**files) for word in command), "--model", model)
        assert message.startswith(f"vikdf: There is no folder {model!r}.") and "\n" not in message


def test_a_model_that_may_be_on_the_hub_is_told_in_a_line(capsys):
    message = fails(capsys, "chat", "--model", "org/nowhere-to-be-found", "--message", "a")
    assert "no folder 'org/nowhere-to-be-found' here" in message and "Hub" in message and "\n" not in message


BACKBONES = {"language_model": "llama", "context_encoder": "bert", "vision_encoder": "dinov2"}


@pytest.mark.parametrize("name", ["outputs/tnue", "./tnue", "../tnue", "~/tnue", "a/b/tnue", "/nowhere/tnue"])
@pytest.mark.parametrize(
    "command, role", [*product(["new", "distill"], BACKBONES), ("distill", "bert")], ids=lambda word: word
)
def test_a_mistyped_backbone_does_not_exist_and_no_hub_is_asked(
    command, name, role, backbones, capsys, tmp_path, monkeypatch
):
    def ask(*args, local_files_only, **kwargs):
        assert local_files_only, "the Hub was asked"
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("modeling_vikdf.backbones.snapshot_download", ask)
    monkeypatch.setattr("modeling_vikdf.backbones.is_offline_mode", lambda: False)
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    names = {key: str(backbones / folder) for key, folder in BACKBONES.items()} | {role: name}
    Path("recipe.yaml").write_text(json.dumps({"model": names, "data": {"train": "a.tar"}}))
    if command == "distill":
        message = fails(capsys, command, "--config", "recipe.yaml", "output_dir=run")
    else:
        options = (word for key, value in names.items() for word in (f"--{key.replace('_', '-')}", value))
        message = fails(capsys, command, *options, "--output", "model")
    assert message.startswith(f"vikdf: There is no folder {name!r}.") and "\n" not in message


def test_a_backbone_that_is_on_this_machine_is_not_mistyped(backbones, capsys, tmp_path, monkeypatch):
    """Its organisation may be the name of a folder here that has nothing to do with it."""
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    monkeypatch.setenv("VIKDF_BACKBONES", str(backbones))
    run(capsys, *new(Path("org"), Path("model")))
    config = json.loads(Path("model/config.json").read_text())
    assert config["backbones"]["language_model"]["repo_id"] == "org/llama"


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


@pytest.mark.parametrize("what", ["training", "generation"])
def test_benchmark_of_shapes_counts_where_there_is_no_gpu(what, capsys, tmp_path, monkeypatch):
    flat = {name: vars(SHAPES["small"])[name] | {"num_hidden_layers": 1} for name in vars(SHAPES["small"])}
    monkeypatch.setitem(SHAPES, "small", type(SHAPES["small"])(**flat))
    output = tmp_path / "speed.json"
    out, _ = run(capsys, "benchmark", what, "--shapes", "small", "--device", "cpu", "--output", output)
    figures = json.loads(output.read_text())
    assert json.loads(out) == figures and (figures["what"], figures["device"]) == (what, "cpu")
    ours = figures["host_counts"]["step" if what == "training" else "vikdf"]
    assert ours["aten_ops"] > 100 and figures["host_counts"]["language_model"]["aten_ops"] > 10


def test_settings_of_a_benchmark_that_would_be_ignored_are_refused(capsys):
    assert "pass --shapes" in fails(capsys, "benchmark", "training", "--device", "cpu")
    assert "pass either" in fails(capsys, "benchmark", "generation", "--shapes", "small", "--model", "folder")


# ---- the command itself ----


def test_every_command_explains_itself(capsys):
    for argv in (["--help"], *([command, "--help"] for command in ("chat", "new", "convert", "benchmark"))):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 0
        assert "usage: vikdf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["--help"], 0), (["chat", "--help"], 0), (["version"], None), (["evalute"], 2), (["chat", "--mesage", "a"], 2)],
)
def test_what_needs_no_model_imports_neither_torch_nor_transformers(argv, code):
    script = f"""
import sys
from vikdf_cli import main
code = None
try:
    main({argv})
except SystemExit as end:
    code = end.code
assert code == {code}, code
assert not {{"torch", "transformers", "numpy", "modeling_vikdf"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], env=in_process(), check=True, capture_output=True)


def test_the_package_is_a_command_too():
    for module in ("modeling_vikdf", "modeling_vikdf.cli", "vikdf_cli"):
        command = [sys.executable, "-m", module, "version"]
        result = subprocess.run(command, env=in_process(), check=True, capture_output=True, text=True)
        assert result.stdout == modeling_vikdf.__version__ + "\n"


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["evalute"], "evaluate"),
        (["chat", "--mesage", "a"], "--message"),
        (["evaluate", "--dta", "a", "--output", "b"], "--data"),
        (["evaluate", "--data", "a", "--output", "b", "--knowledge", "shufled"], "shuffled"),
        (["benchmark", "trainin"], "training"),
        (["distill", "--cofnig=smollm2/distill"], "--config"),
    ],
)
def test_a_typo_names_the_nearest(argv, meant, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2 and f"did you mean {meant!r}?" in capsys.readouterr().err


def test_what_is_near_to_nothing_or_follows_two_dashes_is_left_alone(capsys):
    for argv in (["sing"], ["chat", "--loudness", "11"], ["distill", "--", "--cofnig"]):
        with pytest.raises(SystemExit):
            main(argv)
        assert "did you mean" not in capsys.readouterr().err


def test_the_environment_is_told_without_secrets(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("VIKDF_API_KEY", "api_secret")
    monkeypatch.setenv("VIKDF_BACKBONES", str(tmp_path / "somebody" / "backbones"))
    for name in ("all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"):
        (tmp_path / "somebody" / "backbones" / name).mkdir(parents=True)
    out, _ = run(capsys, "env")
    told = dict(line.split(": ", 1) for line in out.splitlines())
    assert told["torch"] == torch.__version__ and told["modeling_vikdf"].startswith(modeling_vikdf.__version__)
    assert {"python", "platform", "transformers", "huggingface_hub", "accelerate", "peft", "datasets"} <= set(told)
    assert {"accelerators", "AVX-512"} <= set(told)
    assert told["context_encoder sentence-transformers/all-MiniLM-L6-v2"] == "~/backbones/all-MiniLM-L6-v2"
    assert told["vision_encoder facebook/dinov2-small"] == "not found"
    assert "secret" not in out and "somebody" not in out


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (SimpleNamespace(get_device_name=lambda index: f"Brand {index}"), "cuda:0 Brand 0, cuda:1 Brand 1"),
        (SimpleNamespace(), "cuda:0, cuda:1"),
    ],
)
def test_the_environment_names_every_accelerator(module, told, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert describe_environment()["accelerators"] == told


NOT_FOR_A_REPLY = """
for name in ("data", "training", "evaluation", "cards", "server", "benchmark"):
    assert f"modeling_vikdf.{name}" not in sys.modules, name
for name in ("datasets", "nltk", "gradio", "fastapi", "peft", "trl", "matplotlib", "sklearn", "scipy", "pandas"):
    assert name not in sys.modules, name
for name in ("torchvision", "torch.utils.tensorboard", "transformers.trainer"):
    assert name not in sys.modules, name
for name in ("clip", "siglip", "t5", "mt5", "umt5", "dinov2"):  # the towers of other models
    assert f"transformers.models.{name}.modeling_{name}" not in sys.modules, name
"""


def test_importing_the_package_imports_no_library_of_an_extra():
    script = f"import sys\nimport modeling_vikdf\n{NOT_FOR_A_REPLY}"
    subprocess.run([sys.executable, "-c", script], env=in_process(), check=True, capture_output=True)


def test_a_reply_imports_nothing_that_it_does_not_need(checkpoint):
    command = ["chat", "--model", str(checkpoint), "--message", "It rained.", "--max-new-tokens", "2"]
    script = f"import sys\nfrom vikdf_cli import main\nmain({command})\n{NOT_FOR_A_REPLY}"
    result = subprocess.run([sys.executable, "-c", script], env=in_process(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_command_starts_without_looking_for_garbage_among_what_it_imports():
    script = """
import gc
full = []
gc.callbacks.append(lambda phase, info: full.append(1) if phase == "start" and info["generation"] == 2 else None)
from vikdf_cli import main
main(["env"])
assert len(full) <= 2, len(full)
assert gc.isenabled() and gc.get_freeze_count() > 100_000
"""
    result = subprocess.run([sys.executable, "-c", script], env=in_process(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_shrinking_needs_no_library_for_training():
    script = """
import sys
sys.modules["accelerate"] = sys.modules["peft"] = None  # as where only the extra `eval` is installed
import modeling_vikdf.training.shrinking
"""
    subprocess.run([sys.executable, "-c", script], env=in_process(), check=True, capture_output=True)


def test_completion(tmp_path):
    pytest.importorskip("argcomplete")
    for line, expected in (("vikdf evalu", "evaluate "), ("vikdf evaluate --know", "--knowledge ")):
        env = in_process(_ARGCOMPLETE="1", COMP_LINE=line, COMP_POINT=str(len(line)), IFS="\v")
        env["_ARGCOMPLETE_STDOUT_FILENAME"] = str(tmp_path / "completions")
        subprocess.run([sys.executable, "-m", "vikdf_cli"], env=env, check=True)
        assert (tmp_path / "completions").read_text() == expected


@pytest.mark.parametrize("argv", [[], ["sing"], ["chat", "--volume", "11"], ["benchmark", "singing"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2 and "usage: vikdf" in capsys.readouterr().err
