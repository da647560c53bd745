"""Sharing: what a repository holds, one commit to the Hub and back, remote code, and what goes wrong on the way.

The Hub is tests/hub_server.py. tests/data/frozen_checkpoint must stay loadable; it was made in this folder, with
transformers 5.23, by:

    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from tiny_models import speak_up
    from tiny_tokenizers import bert_tokenizer, image_processor, qwen_tokenizer
    from transformers import GenerationConfig
    from modeling_vikdf import VikdfConfig, VikdfForConditionalGeneration, VikdfProcessor

    block = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = {"vocab_size": 448, "max_position_embeddings": 128, **block}
    processor = VikdfProcessor.from_backbones(
        qwen_tokenizer(), bert_tokenizer(), image_processor(), vocab_size=448, num_knowledge_tokens=4,
        max_context_length=128, system_prompt="Answer in one short sentence.",
    )
    config = VikdfConfig(
        text_config={"model_type": "qwen2", "tie_word_embeddings": True, "intermediate_size": 32, **vocabulary,
                     "num_key_value_heads": 1, "initializer_range": 0.5},
        context_config={"model_type": "bert", "intermediate_size": 32, **vocabulary},
        vision_config={"model_type": "dinov2", "image_size": 32, "patch_size": 16, **block},
        iqformer_config={"intermediate_size": 32, **block},
        num_knowledge_tokens=4, knowledge_token_id=processor.knowledge_token_id, matching_dim=16, project_inputs=True,
    )
    torch.manual_seed(0)
    model = speak_up(VikdfForConditionalGeneration(config).eval())
    model.generation_config = GenerationConfig(max_new_tokens=8, eos_token_id=2, pad_token_id=0, do_sample=False)
    model.save_pretrained("data/frozen_checkpoint")
    processor.save_pretrained("data/frozen_checkpoint")
    chat = [{"role": "user", "content": "What is your dog doing?"}]
    inputs = processor(chat, images=Image.new("RGB", (32, 32), "red"))
    reply = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    expected = {"logits": model(**inputs).logits[:, -1], "reply": reply}
    save_file({**inputs, **expected}, "data/frozen_checkpoint/expected.safetensors")
"""

import ast
import graphlib
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, Repository
from huggingface_hub import HfApi, constants, snapshot_download
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import pictures, speak_up
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, GenerationConfig, pipeline
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils.hub import hf_api

import modeling_vikdf
from modeling_vikdf import VikdfConfig, VikdfForConditionalGeneration, VikdfProcessor, sharing
from modeling_vikdf.backbones import BackboneNotFoundError
from modeling_vikdf.building import new_model
from modeling_vikdf.cli import main
from modeling_vikdf.data.collators import DialogueCollator
from modeling_vikdf.sharing import export, push_to_hub
from modeling_vikdf.training.trainer import VikdfTrainer, VikdfTrainingArguments


PACKAGE_ROOT = Path(modeling_vikdf.__file__).parents[1]
CHAT = [{"role": "user", "content": "What is your dog doing?"}]
CODE = {
    f"{name}.py"
    for name in (
        "atomic_saving",
        "chats_vikdf",
        "configuration_vikdf",
        "modeling_checkpointing",
        "modeling_compilation",
        "modeling_distillation",
        "modeling_candidates",
        "modeling_generation",
        "modeling_iqformer",
        "modeling_objectives",
        "modeling_prefix",
        "modeling_pretrained",
        "modeling_saving",
        "modeling_vikdf",
        "pictures_vikdf",
        "pipeline_vikdf",
        "processing_vikdf",
        "sharing",
        "text_vikdf",
    )
}
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
PROCESSOR = {
    "chat_template.jinja",
    "context_tokenizer/tokenizer.json",
    "context_tokenizer/tokenizer_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
CARD = {"README.md", "vikdf.svg"}
ROLES = ("language_model.", "context_encoder.", "vision_encoder.")


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def hub(backbones, tmp_path_factory):
    """The Hub that huggingface_hub talks to, with the backbones' repositories on it, and an empty cache."""
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(hf_api(), "endpoint", server.url)
        patch.setenv("HF_TOKEN", server.add_user("org"))
        for name in ("llama", "bert", "dinov2"):
            server.add_repository(f"org/{name}", files_of(backbones / name))
        yield server


@pytest.fixture(scope="module")
def built(hub):
    """A model around the backbones on the Hub, and its processor. Shared: tests change models of their own."""
    torch.manual_seed(1)
    model, processor = new_model(
        "org/llama",
        "org/bert",
        "org/dinov2",
        num_knowledge_tokens=4,
        iqformer_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        project_inputs=True,
    )
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, do_sample=False, max_new_tokens=8)
    return speak_up(model), processor


@pytest.fixture(scope="module")
def pipe(built):
    model, processor = built
    return pipeline("vikdf-dialogue", model=model, processor=processor)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    """Model and processor in a folder, as training leaves them: beside things that are nobody's business."""
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    for name in ("training_args.bin", "optimizer.pt", "notes.txt"):
        (folder / name).write_bytes(b"private")
    return folder


@pytest.fixture(scope="module")
def shared(hub, pipe) -> str:
    """A repository with the model, for tests that only read."""
    pipe.push_to_hub("org/shared")
    return "org/shared"


@torch.no_grad()
def logits(model, processor) -> torch.Tensor:
    inputs = processor(CHAT)
    assert (inputs["input_ids"] == model.config.knowledge_token_id).sum() == 4
    return model(**inputs).logits


def reply(pipe) -> str:
    return pipe(CHAT, return_full_text=False)[0]["generated_text"]


def state(repository: Repository | None) -> tuple | None:
    return repository and (len(repository.messages), dict(repository.refs), repository.files)


# ---- to the Hub and back ----


def push_by_cli(repo_id: str, pipe, saved: Path) -> None:
    main(["push", "--model", str(saved), "--repo-id", repo_id])


WAYS = {
    "pipe": lambda repo_id, pipe, saved: pipe.push_to_hub(repo_id),
    "model": lambda repo_id, pipe, saved: pipe.model.push_to_hub(repo_id, processor=pipe.processor),
    "cli": push_by_cli,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_push_is_one_commit_of_all_that_others_need(hub, pipe, saved, way):
    repo_id = f"org/by-{way}"
    WAYS[way](repo_id, pipe, saved)
    repository = hub.repositories[repo_id]
    assert len(repository.messages) == 2  # the first is the Hub's own
    assert set(repository.files) == MODEL | PROCESSOR | CODE | CARD | {".gitattributes"}
    text = b"".join(content for name, content in repository.files.items() if name.endswith((".json", ".md", ".py")))
    assert str(saved).encode() not in text and b"/tmp" not in text
    assert repo_id in repository.files["README.md"].decode()

    folder = snapshot_download(repo_id)
    with safe_open(Path(folder, "model.safetensors"), framework="pt") as weights:
        assert not [name for name in weights.keys() if name.startswith(ROLES)]
    for source in (folder, repo_id):
        loaded = pipeline("vikdf-dialogue", model=source)  # and nobody asks for trust
        assert type(loaded.model) is VikdfForConditionalGeneration
        assert torch.equal(logits(loaded.model, loaded.processor), logits(pipe.model, pipe.processor))
        assert reply(loaded) == reply(pipe) != ""
        assert torch.equal(loaded.model.get_image_knowledge(pictures()), pipe.model.get_image_knowledge(pictures()))


def test_a_trainer_pushes_as_a_model_does(hub, pipe, tmp_path):
    trainer = trainer_of(pipe, tmp_path, hub_model_id="org/trained")
    trainer.push_to_hub()
    repository = hub.repositories["org/trained"]
    assert set(repository.files) == MODEL | PROCESSOR | CODE | CARD | {".gitattributes"}
    assert repository.messages[1:] == ["End of training"]
    trainer.push_to_hub(commit_message="later", blocking=False, revision="next").result()
    assert repository.messages[2:] == [] and set(repository.refs) == {"main", "next"}  # nothing new to commit


def test_checkpoints_are_pushed_while_it_trains(hub, built, shared, tmp_path, caplog):
    model = VikdfForConditionalGeneration.from_pretrained(shared)
    pipe = pipeline("vikdf-dialogue", model=model, processor=built[1])
    settings = {"max_steps": 2, "save_steps": 1, "push_to_hub": True, "hub_model_id": "org/in-progress"}
    trainer = trainer_of(pipe, tmp_path, save_strategy="steps", hub_token=os.environ["HF_TOKEN"], **settings)
    hub.fail("POST", "/commit/", 500)  # and is not ended by a push that fails
    trainer.train()
    repository = hub.repositories["org/in-progress"]
    assert repository.messages[1:] == ["Training in progress, step 2"]
    assert set(repository.files) == MODEL | PROCESSOR | CODE | CARD | {".gitattributes"}
    assert [record for record in caplog.messages if "Pushing to 'org/in-progress' failed" in record]


def trainer_of(pipe, folder: Path, **kwargs) -> VikdfTrainer:
    arguments = VikdfTrainingArguments(output_dir=folder / "run", report_to=[], use_cpu=True, **kwargs)
    dialogues = [{"messages": [*CHAT, {"role": "assistant", "content": "He is running."}]}]
    return VikdfTrainer(
        model=pipe.model,
        args=arguments,
        train_dataset=dialogues,
        data_collator=DialogueCollator(pipe.processor),
        processing_class=pipe.processor,
    )


def test_parts_are_pushed_alone(hub, built):
    model, processor = built
    processor.push_to_hub("org/parts")
    repository = hub.repositories["org/parts"]
    assert set(repository.files) == PROCESSOR | CODE | {".gitattributes"}
    model.push_to_hub("org/parts")
    assert set(repository.files) == PROCESSOR | CODE | MODEL | CARD | {".gitattributes"}
    assert len(repository.messages) == 3
    loaded = pipeline("vikdf-dialogue", model="org/parts")
    assert torch.equal(logits(loaded.model, loaded.processor), logits(model, processor))


def test_where_to_push(hub, saved, capsys):
    commit = push_to_hub("mine", model=saved, private=True)  # in the namespace of the token's owner
    mine = hub.repositories["org/mine"]
    assert mine.private and commit.oid == mine.refs["main"]
    main(["push", "--model", str(saved), "--repo-id", "org/new", "--private", "--revision", "experiment"])
    new = hub.repositories["org/new"]
    assert new.private and set(new.files) == {".gitattributes"}
    assert "model.safetensors" in new.commits[new.refs["experiment"]]
    assert capsys.readouterr().out == f"{hub.url}/org/new/commit/{new.refs['experiment']}\n"

    theirs = hub.add_repository("others/model", {".gitattributes": b"", "README.md": b"theirs"})
    main(["push", "--model", str(saved), "--repo-id", "others/model", "--create-pr"])
    assert theirs.files["README.md"] == b"theirs"
    assert theirs.commits[theirs.refs["refs/pr/1"]]["README.md"] != b"theirs"
    assert capsys.readouterr().out == f"{hub.url}/others/model/discussions/1\n"


def test_pushing_the_same_again_changes_nothing(hub, saved):
    push_to_hub("org/same", model=saved)
    before, asked = state(hub.repositories["org/same"]), len(hub.requests)
    push_to_hub("org/same", model=saved)
    assert state(hub.repositories["org/same"]) == before
    assert [request for request in hub.requests[asked:] if request[0] == "PUT"] == []


def test_weights_of_an_earlier_version_go_with_it(hub, pipe, saved, tmp_path):
    pipe.model.save_pretrained(tmp_path, max_shard_size="60KB")
    pipe.processor.save_pretrained(tmp_path)
    push_to_hub("org/shards", model=tmp_path)
    repository = hub.repositories["org/shards"]
    assert "model.safetensors.index.json" in repository.files and "model.safetensors" not in repository.files
    loaded = pipeline("vikdf-dialogue", model="org/shards")
    assert torch.equal(logits(loaded.model, loaded.processor), logits(pipe.model, pipe.processor))
    push_to_hub("org/shards", model=saved)
    assert [name for name in repository.files if name.startswith("model.")] == ["model.safetensors"]
    assert not [name for name in repository.files if re.match("model-|model.safetensors.index", name)]


def test_progress_is_shown(hub, saved, tmp_path, capfd):
    push_to_hub("org/progress", model=changed(saved, tmp_path))
    assert re.search(r"100%.*\d+(\.\d+)?k?/\d+", capfd.readouterr().err)


def test_evaluation_results_go_with_the_model(hub, saved, tmp_path):
    report = tmp_path / "dialogues.json"
    report.write_text(json.dumps(REPORT))
    main(["push", "--model", str(saved), "--repo-id", "org/evaluated", "--results", str(report)])
    files = hub.repositories["org/evaluated"].files
    assert json.loads(files["dialogues.json"]) == REPORT and b"12.3" in files["README.md"]
    report.rename(tmp_path / "config.json")
    with pytest.raises(ValueError, match="config.json is called like a file of the model"):
        push_to_hub("org/evaluated", model=saved, results=[tmp_path / "config.json"])


REPORT = {
    "data": "dialogues.jsonl",
    "data_sha256": "0" * 64,
    "num_dialogues": 3,
    "limit": None,
    "all_references": False,
    "system_prompt": None,
    "seed": 0,
    "knowledge": "own",
    "metrics": {"perplexity": 12.3},
    "confidence_95": {"perplexity": [11.0, 13.0]},
}


def changed(saved: Path, tmp_path: Path, by: float = 1.0) -> Path:
    """A copy with other weights."""
    folder = shutil.copytree(saved, tmp_path / f"changed-by-{by}")
    weights = load_file(folder / "model.safetensors")
    weights["knowledge_gate"] += by
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


# ---- a folder ----


def test_export_writes_what_a_push_commits(hub, saved, tmp_path, capsys):
    push_to_hub("org/both", model=saved)
    main(["export", "--model", str(saved), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'out'}\n"
    pushed, exported = hub.repositories["org/both"].files, files_of(tmp_path / "out")
    assert set(exported) == set(pushed) - {".gitattributes"}
    assert {name for name in exported if exported[name] != pushed[name]} == {"README.md"}  # which names the repository
    export("org/both", tmp_path / "again")
    again = files_of(tmp_path / "again")
    assert set(again) == set(exported)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "context_tokenizer/tokenizer.json"):
        assert again[name] == exported[name]


def test_export_of_the_packaged_checkpoint(hub, tmp_path):
    main(["export", "--output", str(tmp_path / "out")])
    packaged, exported = files_of(modeling_vikdf.DEFAULT_CHECKPOINT), files_of(tmp_path / "out")
    assert set(packaged) | CODE | CARD == set(exported)
    packaged, exported = (
        load_file(folder / "model.safetensors") for folder in (modeling_vikdf.DEFAULT_CHECKPOINT, tmp_path / "out")
    )
    assert packaged.keys() == exported.keys()
    assert all(torch.equal(packaged[name].float(), exported[name]) for name in packaged)  # packaged in half precision


@pytest.mark.parametrize("there", ["a file", "a folder with something in it"])
def test_export_overwrites_nothing(saved, tmp_path, there):
    output = tmp_path / "out"
    if there == "a file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine").write_text("mine")
    with pytest.raises(SystemExit, match="exists and is not an empty folder"):
        main(["export", "--model", str(saved), "--output", str(output)])
    assert (output if output.is_file() else output / "mine").read_text() == "mine"


def test_a_failed_export_leaves_nothing(saved, tmp_path):
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(SystemExit, match="report.json"):
        main(["export", "--model", str(saved), "--output", f"{tmp_path}/out", "--results", f"{tmp_path}/report.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_saved_pipeline_keeps_its_settings(hub, built, shared, tmp_path):
    model = VikdfForConditionalGeneration.from_pretrained(shared)
    processor = VikdfProcessor.from_pretrained(shared, system_prompt="Answer in one short sentence.")
    processor.chat_template = processor.tokenizer.chat_template = processor.chat_template + "{{ '' }}"
    model.generation_config.update(max_new_tokens=5, repetition_penalty=1.5)
    pipe = pipeline("vikdf-dialogue", model=model, processor=processor)
    pipe.save_pretrained(tmp_path)
    loaded = pipeline("vikdf-dialogue", model=str(tmp_path))
    assert loaded.processor.system_prompt == processor.system_prompt
    assert loaded.processor.chat_template == processor.chat_template
    assert loaded.model.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert reply(loaded) == reply(pipe) != reply(pipeline("vikdf-dialogue", model=model, processor=built[1]))


def test_a_checkpoint_of_the_past_still_loads():
    folder = Path(__file__).with_name("data") / "frozen_checkpoint"
    expected = load_file(folder / "expected.safetensors")
    loaded = pipeline("vikdf-dialogue", model=str(folder))
    inputs = loaded.processor(CHAT, images=Image.new("RGB", (32, 32), "red"))
    assert set(inputs) == set(expected) - {"logits", "reply"}
    for name, value in inputs.items():
        torch.testing.assert_close(value, expected[name])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**inputs).logits[:, -1], expected["logits"], atol=1e-4, rtol=1e-4)
    assert torch.equal(loaded.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :], expected["reply"])
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 300_000


# ---- without the package ----

# Without this package and what transformers does without, in a process of its own with empty caches.
WITHOUT_PACKAGE = """
import json, os, sys
for name in ("modeling_vikdf", "accelerate", "datasets", "evaluate", "gguf", "gradio", "peft", "scipy"):
    sys.modules[name] = None  # cannot be imported

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForPreTraining, AutoProcessor, pipeline

source, output, repo_id = sys.argv[1:]
chat = [{"role": "user", "content": "What is your dog doing?"}]

def refused(load, *args, **kwargs):
    try:
        load(*args, **kwargs)
    except (ValueError, OSError) as error:
        return str(error)

def run(model, processor):
    with torch.no_grad():
        return model(**processor(chat)).logits.contiguous()

def reply(pipe):
    return pipe(chat, return_full_text=False)[0]["generated_text"]

loaders = (AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor)
report = {"refused": [refused(each.from_pretrained, source) for each in loaders]}
report["refused"].append(refused(pipeline, "vikdf-dialogue", model=source))
report["canary"] = [os.path.exists("canary")]

config = AutoConfig.from_pretrained(source, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
tensors = {"causal": run(model, processor)}
tensors["model"] = run(AutoModel.from_pretrained(source, trust_remote_code=True), processor)
tensors["image"] = model.get_image_knowledge(torch.zeros(1, 3, 32, 32)).detach().contiguous()
pipe = pipeline("vikdf-dialogue", model=source, trust_remote_code=True)
report["reply"] = reply(pipe)

pipe.save_pretrained(output + "/by-pipe")
model.save_pretrained(output + "/by-parts")
processor.save_pretrained(output + "/by-parts")
for name in ("by-pipe", "by-parts"):
    again = pipeline("vikdf-dialogue", model=output + "/" + name, trust_remote_code=True)
    report[name], tensors[name] = reply(again), run(again.model, again.processor)

if repo_id:
    pipe.push_to_hub(repo_id, include_backbones="all" in repo_id)
    again = pipeline("vikdf-dialogue", model=repo_id, trust_remote_code=True)
    report["pushed"], tensors["pushed"] = reply(again), run(again.model, again.processor)
report["canary"].append(os.path.exists("canary"))
report["modules"] = sorted({type(each).__module__.split(".")[0] for each in (config, processor, model, pipe, again)})
save_file(tensors, output + "/tensors.safetensors")
print("REPORT" + json.dumps(report))
"""


def with_canary(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same files, but the code leaves a trace in the working directory when it runs."""
    return {
        name: content + b"\nopen('canary', 'a').close()\n" if name.endswith(".py") else content
        for name, content in files.items()
    }


def run_without_package(hub, tmp_path: Path, source: str, repo_id: str = "") -> tuple[dict, dict]:
    """What `WITHOUT_PACKAGE` found out."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_PACKAGE, source, str(tmp_path), repo_id],
        env=env,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.split("REPORT")[1])
    return report, load_file(tmp_path / "tensors.safetensors")


def check_without_package(report: dict, tensors: dict, pipe) -> None:
    expected = logits(pipe.model, pipe.processor)
    assert all(torch.equal(each, expected) for name, each in tensors.items() if name != "image")
    with torch.no_grad():
        assert torch.equal(tensors["image"], pipe.model.get_image_knowledge(torch.zeros(1, 3, 32, 32)))
    assert {report[name] for name in ("reply", "by-pipe", "by-parts", "pushed")} == {reply(pipe)}
    assert report["modules"] == ["transformers_modules"]
    assert all("trust_remote_code" in message for message in report["refused"])
    assert report["canary"] == [False, True]  # before and after the code was trusted


def test_from_the_hub_without_the_package(hub, pipe, tmp_path):
    pipe.push_to_hub("org/remote")
    repository = hub.repositories["org/remote"]
    repository.commit("main", with_canary(repository.files), "canary")
    report, tensors = run_without_package(hub, tmp_path, "org/remote", "org/remote-again")
    check_without_package(report, tensors, pipe)
    first, again = (hub.repositories[name].files for name in ("org/remote", "org/remote-again"))
    assert set(again) == set(first) - CARD and again["model.safetensors"] == first["model.safetensors"]
    assert len(hub.repositories["org/remote-again"].messages) == 2


def test_from_a_folder_without_the_package(hub, pipe, saved, tmp_path):
    """Self-contained, and named like nothing that Python could import."""
    folder = tmp_path / "1 model.of-mine"
    export(saved, folder, include_backbones=True)
    for name, content in with_canary(files_of(folder)).items():
        (folder / name).write_bytes(content)
    report, tensors = run_without_package(hub, tmp_path, str(folder), "org/remote-all")
    check_without_package(report, tensors, pipe)


def test_with_the_package_its_own_code_runs(hub, pipe, tmp_path, monkeypatch):
    """And no other, not even when that is trusted."""
    monkeypatch.chdir(tmp_path)
    pipe.push_to_hub("org/canary")
    repository = hub.repositories["org/canary"]
    repository.commit("main", with_canary(repository.files), "canary")
    for trust in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        assert type(AutoConfig.from_pretrained("org/canary", **trust)) is VikdfConfig
        assert type(AutoModel.from_pretrained("org/canary", **trust)) is VikdfForConditionalGeneration
        assert type(AutoModelForCausalLM.from_pretrained("org/canary", **trust)) is VikdfForConditionalGeneration
        assert type(AutoProcessor.from_pretrained("org/canary", **trust)) is VikdfProcessor
        loaded = pipeline("vikdf-dialogue", model="org/canary", **trust)
        assert type(loaded) is modeling_vikdf.VikdfDialoguePipeline
    assert list(tmp_path.iterdir()) == []
    pipeline("vikdf-dialogue", model="org/canary").save_pretrained(tmp_path / "again")
    assert "custom_pipelines" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_what_ships_needs_nothing_else():
    """Imports of the shipped files at top level, and their relative imports."""
    for name in CODE:
        text = (PACKAGE_ROOT / "modeling_vikdf" / name).read_text()
        top_level = {match for match in re.findall(r"^(?:from|import) ([\w.]+)", text, flags=re.MULTILINE)}
        known = {"PIL", "huggingface_hub", "safetensors", "torch", "transformers", ""} | set(sys.stdlib_module_names)
        assert {each.split(".")[0] for each in top_level} <= known
        for module in re.findall(r"^\s*from \.(\S*) import", text, flags=re.MULTILINE):
            assert f"{module}.py" in CODE


def imported_by(name: str) -> set[str]:
    """The shipped files that a shipped file imports, anywhere in it."""
    tree = ast.parse((PACKAGE_ROOT / "modeling_vikdf" / f"{name}.py").read_text())
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}


def test_what_ships_is_what_the_shared_classes_import_and_no_circle():
    shared = {name.split(".")[0] for name in (*sharing.AUTO_CLASSES.values(), sharing.PIPELINE)}
    imports, new = {}, shared
    while new:
        imports |= {name: imported_by(name) for name in new}
        new = set().union(*imports.values()) - set(imports)
    assert set(imports) == set(sharing.SHIPPED) == {name.removesuffix(".py") for name in CODE}
    assert set(graphlib.TopologicalSorter(imports).static_order()) == set(sharing.SHIPPED)  # raises for a circle


@pytest.mark.parametrize("name", [sharing.DIALOGUE_MODEL, sharing.PRETRAINING_MODEL, sharing.PROCESSOR])
def test_whoever_loads_one_class_gets_the_code_of_all(name):
    """As transformers finds what to copy from a repository."""
    path = PACKAGE_ROOT / "modeling_vikdf" / f"{name.split('.')[0]}.py"
    copied = {Path(each).stem for each in (path, *get_relative_import_files(path))}
    assert copied == set(sharing.SHIPPED)


# ---- what is not shared ----


def test_backbones_are_shared_only_when_asked_for(hub, pipe, saved, tmp_path):
    export(saved, tmp_path / "all", include_backbones=True)
    with safe_open(tmp_path / "all" / "model.safetensors", framework="pt") as weights:
        assert {name.split(".")[0] + "." for name in weights.keys()} >= set(ROLES)
    model, processor = (
        each.from_pretrained(tmp_path / "all") for each in (VikdfForConditionalGeneration, VikdfProcessor)
    )
    for push in (
        lambda **kwargs: model.push_to_hub("org/all", processor=processor, **kwargs),
        lambda **kwargs: push_to_hub("org/all", model=tmp_path / "all", **kwargs),
    ):
        hub.repositories.pop("org/all", None)
        with pytest.raises(ValueError, match="holds frozen backbones.*--include-backbones"):
            push()
        assert "org/all" not in hub.repositories
        push(include_backbones=True)
        loaded = pipeline("vikdf-dialogue", model="org/all")
        assert loaded.model.config.backbones == {}
        assert torch.equal(logits(loaded.model, loaded.processor), logits(pipe.model, pipe.processor))


@pytest.mark.parametrize("how", ["model", "folder"])
def test_an_llm_that_was_trained_is_shared(hub, saved, tmp_path, how):
    """It is no frozen backbone: the model would not be the same without it. The encoders stay where they are."""
    peft = pytest.importorskip("peft")
    model, processor = (each.from_pretrained(saved) for each in (VikdfForConditionalGeneration, VikdfProcessor))
    lora = peft.LoraConfig(target_modules=r"language_model\..*\.q_proj", init_lora_weights=False)
    model = peft.get_peft_model(model, lora).merge_and_unload()
    if how == "model":
        model.push_to_hub("org/merged", processor=processor)
    else:
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        push_to_hub("org/merged", model=tmp_path)
    loaded = pipeline("vikdf-dialogue", model="org/merged")
    assert set(loaded.model.config.backbones) == {"context_encoder", "vision_encoder"}
    assert torch.equal(logits(loaded.model, loaded.processor), logits(model, processor))


@pytest.mark.parametrize("how", ["model", "folder"])
def test_an_adapter_is_shared_with_the_model(hub, saved, tmp_path, how, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18")  # 5.24's is not released yet
    model, processor = (each.from_pretrained(saved) for each in (VikdfForConditionalGeneration, VikdfProcessor))
    model.add_adapter(peft.LoraConfig(target_modules=r"language_model\..*\.q_proj", init_lora_weights=False))
    if how == "model":
        model.push_to_hub("org/adapted", processor=processor)
    else:
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        push_to_hub("org/adapted", model=tmp_path)
    loaded = pipeline("vikdf-dialogue", model="org/adapted")
    assert torch.equal(logits(loaded.model, loaded.processor), logits(model, processor))
    push_to_hub("org/adapted", model=saved)
    assert not [name for name in hub.repositories["org/adapted"].files if name.startswith("adapter/")]


def test_backbones_in_folders_of_this_machine(hub, saved, backbones, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "local")
    set_backbone(folder, "context_encoder", repo_id=str(backbones / "bert"))
    model = VikdfForConditionalGeneration.from_pretrained(folder)
    for push in (lambda: model.push_to_hub("org/local"), lambda: push_to_hub("org/local", model=folder)):
        with pytest.raises(
            ValueError, match=r"context_encoder is '.*bert', a folder of this machine.*include_backbones"
        ):
            push()
    assert "org/local" not in hub.repositories
    export(folder, tmp_path / "out", include_backbones=True)
    loaded = VikdfForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert loaded.config.backbones == {}


def set_backbone(folder: Path, role: str, **source) -> None:
    """Changes what a saved configuration says of a backbone's source."""
    config = json.loads((folder / "config.json").read_text())
    config["backbones"][role].update(source)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "fault", ["truncated", "missing", "a shard missing", "no configuration", "no processor", "nothing"]
)
def test_what_cannot_be_loaded_is_not_pushed(hub, saved, tmp_path, fault):
    folder = shutil.copytree(saved, tmp_path / "broken")
    weights = folder / "model.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif fault == "missing":
        weights.unlink()
    elif fault == "a shard missing":
        index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif fault == "no configuration":
        (folder / "config.json").unlink()
    elif fault == "no processor":
        (folder / "processor_config.json").unlink()
    else:
        folder = tmp_path / "nothing"
    message = {
        "truncated": "model.safetensors is truncated or damaged",
        "missing": "no model.safetensors to share",
        "a shard missing": "no model-00001-of-00002.safetensors to share",
        "no configuration": "config.json",
        "no processor": "processor",
        "nothing": "nothing",
    }[fault]
    before = len(hub.requests)
    with pytest.raises(SystemExit, match=f"vikdf: (.|\\n)*{message}"):
        main(["push", "--model", str(folder), "--repo-id", "org/broken"])
    assert "org/broken" not in hub.repositories
    assert [request for request in hub.requests[before:] if request[0] != "HEAD"] == []


# ---- what goes wrong on the way ----

FAULTS = {
    "the repository cannot be made": ("POST", "/api/repos/create", 500, 1),
    "the connection is lost while asking": ("POST", "/preupload/", "drop", 9),
    "the Hub fails": ("POST", "/preupload/", 500, 9),
    "the upload breaks off": ("PUT", "/storage/", "drop", 9),
    "the upload is damaged": ("PUT", "/storage/", "corrupt", 9),
    "the upload is not confirmed": ("POST", "/verify", 422, 1),
    "the commit fails": ("POST", "/commit/", 500, 1),
    "the connection is lost at the commit": ("POST", "/commit/", "drop", 1),
    "somebody else was faster": ("POST", "/commit/", 409, 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_interrupted_push_can_be_repeated(hub, saved, tmp_path, monkeypatch, fault):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    repo_id = "org/interrupted"
    push_to_hub(repo_id, model=saved)
    before, local = state(hub.repositories[repo_id]), changed(saved, tmp_path, 1 + list(FAULTS).index(fault))
    content = files_of(local)
    hub.fail(*FAULTS[fault])
    with pytest.raises(SystemExit, match=f"vikdf: Pushing to '{repo_id}' failed: .*(.|\\n)*push again"):
        main(["push", "--model", str(local), "--repo-id", repo_id])
    assert state(hub.repositories[repo_id]) == before and files_of(local) == content
    hub.faults.clear()
    push_to_hub(repo_id, model=local)
    assert hub.repositories[repo_id].files["model.safetensors"] == content["model.safetensors"]
    push_to_hub(repo_id, model=saved)


def test_two_pushes_at_once_are_not_mixed(hub, saved, tmp_path, monkeypatch):
    """Between the look at what is there and the commit, somebody else commits."""
    commit, others = HfApi.create_commit, [changed(saved, tmp_path / "first", 200)]

    def late(self, *args, **kwargs):
        while others:
            push_to_hub("org/busy", model=others.pop())
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    theirs, ours = files_of(others[0]), changed(saved, tmp_path / "second", 300)
    with pytest.raises(OSError, match="412(.|\\n)*A commit has happened since(.|\\n)*push again"):
        push_to_hub("org/busy", model=ours)
    assert hub.repositories["org/busy"].files["model.safetensors"] == theirs["model.safetensors"]
    push_to_hub("org/busy", model=ours)
    assert hub.repositories["org/busy"].files["model.safetensors"] == files_of(ours)["model.safetensors"]


def test_a_passing_fault_is_not_noticed(hub, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("POST", "/preupload/", 500)
    hub.fail("PUT", "/storage/", 503)
    push_to_hub("org/passing", model=changed(saved, tmp_path, 100))
    assert hub.faults[-1].times == hub.faults[-2].times == 0
    hub.faults.clear()


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("others/closed", None, "403.*no right"),
        ("org/closed", "hf_wrong", "401 Unauthorized(.|\\n)*Invalid credentials"),
        ("org/a b", None, "Repo id must"),
        ("closed", "hf_wrong", "Invalid user token"),
    ],
)
def test_pushes_that_are_refused(hub, saved, monkeypatch, repo_id, token, message):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match=f"vikdf: (.|\\n)*{message}") as refusal:
        main(["push", "--model", str(saved), "--repo-id", repo_id])
    assert "hf_" not in str(refusal.value)
    assert not [name for name in hub.repositories if "closed" in name or " " in name]


def test_a_broken_download_goes_on(hub, pipe, shared, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("GET", "/storage/", "drop")
    model = VikdfForConditionalGeneration.from_pretrained(shared, cache_dir=tmp_path)
    assert hub.faults.pop().times == 0
    assert torch.equal(logits(model, pipe.processor), logits(pipe.model, pipe.processor))


def test_downloads_that_are_refused(hub, saved, tmp_path):
    push_to_hub("org/secret", model=saved, private=True)
    load = VikdfForConditionalGeneration.from_pretrained
    load("org/secret")
    for kwargs, message in (
        ({"token": False}, "org/secret is not a local folder|private"),
        ({"revision": "nowhere"}, "nowhere is not a valid git identifier"),
    ):
        with pytest.raises(OSError, match=message):
            load("org/secret", cache_dir=tmp_path, **kwargs)
    with pytest.raises(OSError, match="org/nothing"):
        load("org/nothing")


# ---- safety ----


def test_revisions_can_be_pinned(hub, pipe, saved, tmp_path):
    expected = logits(pipe.model, pipe.processor)
    first = push_to_hub("org/pinned", model=saved).oid
    push_to_hub("org/pinned", model=changed(saved, tmp_path))
    loaded = pipeline("vikdf-dialogue", model="org/pinned", revision=first)
    assert torch.equal(logits(loaded.model, loaded.processor), expected)
    loaded = pipeline("vikdf-dialogue", model="org/pinned")
    assert not torch.equal(logits(loaded.model, loaded.processor), expected)


def test_revisions_of_backbones_can_be_pinned(hub, pipe, saved, backbones, tmp_path):
    expected, before = logits(pipe.model, pipe.processor), state(hub.repositories["org/llama"])
    llama = AutoModelForCausalLM.from_pretrained(backbones / "llama")
    llama.lm_head.weight.data.mul_(-1)
    llama.save_pretrained(tmp_path / "llama")
    repository = hub.repositories["org/llama"]
    pinned = repository.refs["main"]
    repository.commit("main", repository.files | files_of(tmp_path / "llama"), "another")
    try:
        for revision in (pinned, None):
            folder = shutil.copytree(saved, tmp_path / str(revision))
            set_backbone(folder, "language_model", revision=revision)
            push_to_hub("org/pins", model=folder)
            loaded = pipeline("vikdf-dialogue", model="org/pins")
            assert torch.equal(logits(loaded.model, loaded.processor), expected) == (revision == pinned)
    finally:
        repository.refs["main"] = before[1]["main"]


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "a"))


def test_pickled_weights_are_refused(hub, pipe, tmp_path):
    pipe.push_to_hub("org/pickled")
    pickled = pickle.dumps(Canary(tmp_path / "canary"))
    files = {
        name: content for name, content in hub.repositories["org/pickled"].files.items() if "safetensors" not in name
    }
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        hub.add_repository("org/pickled", files | {name: pickled})
        for load in (VikdfForConditionalGeneration.from_pretrained, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(
                OSError, match=f"'org/pickled' has its weights only as {name}.*pickle.*save_pretrained"
            ):
                load("org/pickled", cache_dir=tmp_path / name)
    assert not (tmp_path / "canary").exists()


def test_a_backbone_with_pickled_weights_is_refused(hub, saved, backbones, tmp_path):
    pickled = pickle.dumps(Canary(tmp_path / "canary"))
    files = {name: content for name, content in files_of(backbones / "llama").items() if "safetensors" not in name}
    hub.add_repository("org/pickled-llama", files | {"pytorch_model.bin": pickled})
    folder = shutil.copytree(saved, tmp_path / "model")
    local = shutil.copytree(backbones / "llama", tmp_path / "llama")
    (local / "model.safetensors").unlink()
    (local / "pytorch_model.bin").write_bytes(pickled)
    for name, error, message in (
        ("org/pickled-llama", BackboneNotFoundError, "pytorch_model.bin.*pickle"),
        (str(local), OSError, "only as pytorch_model.bin"),
    ):
        set_backbone(folder, "language_model", repo_id=name)
        with pytest.raises(error, match=message):
            VikdfForConditionalGeneration.from_pretrained(folder)
    assert not (tmp_path / "canary").exists()


def test_a_repository_reads_no_files_outside_of_it(hub, saved, backbones, tmp_path):
    push_to_hub("org/outside", model=saved)
    files = dict(hub.repositories["org/outside"].files)
    config = json.loads(files["config.json"])
    for path in (str(backbones / "llama"), "../llama", "~/llama"):
        config["backbones"]["language_model"]["repo_id"] = path
        hub.add_repository("org/outside", files | {"config.json": json.dumps(config).encode()})
        with pytest.raises(ValueError, match=f"names '{path}' as its language_model"):
            VikdfForConditionalGeneration.from_pretrained("org/outside")

    weights = files.pop("model.safetensors")
    for path in ("../model.safetensors", str(tmp_path / "model.safetensors"), "a/model.safetensors"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(saved / "model.safetensors"), path)}
        index = {"model.safetensors.index.json": json.dumps(index).encode()}
        hub.add_repository("org/outside", files | index)
        folder = shutil.copytree(saved, tmp_path / "folder", dirs_exist_ok=True)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_bytes(index["model.safetensors.index.json"])
        for source in ("org/outside", folder):
            with pytest.raises(ValueError, match=f"names '{path}', which is not beside it"):
                VikdfForConditionalGeneration.from_pretrained(source)


def test_tokens_are_neither_printed_nor_written(hub, pipe, saved, tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    token = hub.add_user("confidential")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pipe.push_to_hub("confidential/model", token=token)
    trainer = trainer_of(pipe, tmp_path, hub_model_id="confidential/trained", hub_token=token)
    trainer.push_to_hub()
    assert trainer.args.hub_token == token
    loaded = pipeline("vikdf-dialogue", model="confidential/model", token=token)
    loaded.save_pretrained(tmp_path / "again")
    monkeypatch.setenv("HF_TOKEN", token)
    main(["push", "--model", str(saved), "--repo-id", "confidential/model"])
    for fault in FAULTS.values():
        hub.fail(*fault)
        with pytest.raises(SystemExit) as failure:
            main(
                [
                    "push",
                    "--model",
                    str(changed(saved, tmp_path, torch.rand(()).item())),
                    "--repo-id",
                    "confidential/model",
                ]
            )
        hub.faults.clear()
        assert token not in str(failure.value)
    out, err = capfd.readouterr()
    assert token not in out + err and token not in caplog.text
    written = [files_of(tmp_path), files_of(Path(constants.HF_HUB_CACHE))]
    written += [files for repository in hub.repositories.values() for files in repository.commits.values()]
    assert not [name for files in written for name, content in files.items() if token.encode() in content]
    assert any("training_args.bin" in name for name in written[0])
