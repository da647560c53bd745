"""What a training step and a decoding step ask of the host is counted, and stays within limits."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import load_script
from tiny_training import ALL, dialogue_model, dialogues, pairs, pretraining_model, processor
from torch import nn

from modeling_vikdf import benchmark_shapes, modeling_prefix
from modeling_vikdf.benchmark_shapes import SHAPES, count_generation, count_training
from modeling_vikdf.configuration_vikdf import OBJECTIVES
from modeling_vikdf.data.collators import DialogueCollator, JointCollator, PreTrainingCollator
from modeling_vikdf.host_counts import count_host_work, count_python_calls


# ---- the counts ----


def test_counts_by_hand():
    x, mask, linear = torch.ones(3), torch.tensor([True, False, True]), nn.Linear(2, 2)
    assert count_host_work(lambda: x + x) == {
        "aten_ops": 1,
        "launches": 1,
        "item": 0,
        "nonzero": 0,
        "parameters": 0,
    }
    assert count_host_work(lambda: x[:2])["launches"] == 0
    assert count_host_work(lambda: bool(x.sum() > 1))["item"] == 1
    for call in (lambda: x[mask], lambda: mask.nonzero(), lambda: x.masked_select(mask)):
        assert count_host_work(call)["nonzero"] == 1
    assert count_host_work(lambda: x[torch.tensor([0, 1])])["nonzero"] == 0
    assert count_host_work(lambda: list(linear.parameters()))["parameters"] == 2
    weight = linear.weight
    assert count_host_work(lambda: (weight * 2).sum().backward())["launches"] > 2  # of the backward pass, too


def test_python_calls_by_hand():
    def inner():
        return len("two")

    calls = count_python_calls(lambda: None)
    assert count_python_calls(lambda: (inner(), inner())) == calls + 4


# ---- a training step ----


def joint_batch(model: nn.Module) -> dict:
    collators = DialogueCollator(processor()), PreTrainingCollator(processor(), model.config)
    return JointCollator(*collators, pairs(4))(dialogues(4))


STEPS = {
    "pairs": (
        lambda towers: pretraining_model(ALL, towers=towers),
        lambda model: PreTrainingCollator(processor(), model.config, image_knowledge_share=0.5)(pairs(4)),
    ),
    "dialogues": (lambda towers: dialogue_model(towers=towers), lambda _: DialogueCollator(processor())(dialogues(4))),
    "joint": (lambda towers: pretraining_model({**ALL, "reply": 1.0}, towers=towers), joint_batch),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", STEPS)
def test_a_training_step_waits_for_nothing(kind, checkpointing):
    """With what the collator found; neither in the frozen encoders nor in the LLM is a value read."""
    make, collate = STEPS[kind]
    model = make("separate")
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    batch = collate(model)
    model(**batch).loss.backward()
    counts = count_host_work(lambda: model(**batch).loss.backward())
    assert counts["item"] == counts["nonzero"] == 0
    assert counts["parameters"] <= 6  # the first of each encoder, for its dtype


@pytest.mark.parametrize("kind", STEPS)
def test_the_last_token_of_the_longest_prompt_is_not_read(kind):
    """Nothing is predicted from it, and reading it costs the LLM's activations of a token in every row."""
    make, collate = STEPS[kind]
    model = make("separate")
    batch = collate(model)
    prompts = {"pairs": [batch], "dialogues": [batch], "joint": [batch, batch.get("dialogues")]}[kind]
    masks = [[each[name] for name in ("attention_mask", "draw_attention_mask") if name in each] for each in prompts]
    longest = [max(int(mask.sum(1).max()) for mask in of_a_pass) for of_a_pass in masks]
    widths = []
    model.language_model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model(**batch)
    assert widths == [length - 1 for length in longest]


@pytest.fixture
def shallow():
    """Deep enough that the LLM's layers are most of the work, as they are in any LLM."""
    depths = {"llm": 12, "text": 2, "vision": 2, "iqformer": 2}
    parts = {name: {**getattr(SHAPES["small"], name), "num_hidden_layers": depth} for name, depth in depths.items()}
    return replace(SHAPES["small"], **parts)


def test_a_training_step_costs_little_more_than_its_parts(shallow):
    counts = count_training(shallow)
    assert counts["step_over_parts"] <= 1.15
    for name in ("step", "step_with_cached_states", "step_with_gradient_checkpointing"):
        assert counts[name]["item"] == counts[name]["nonzero"] == 0, name
    assert counts["step"]["aten_ops"] > counts["step_with_cached_states"]["aten_ops"]


# ---- a decoding step ----


def test_a_decoding_step_costs_what_the_llms_does():
    """At the depth of SmolLM2-135M: what is asked once a step weighs more in an LLM of fewer layers."""
    counts = count_generation(replace(SHAPES["small"], text=SHAPES["small"].text | {"num_hidden_layers": 1}))
    assert max(counts["ratios"].values()) <= 1.03
    assert counts["vikdf"]["parameters"] == counts["language_model"]["parameters"]
    assert counts["vikdf"]["item"] == counts["language_model"]["item"]


# ---- the command ----


def test_a_gpu_that_is_not_there_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark_shapes.choose_device() == "cpu"
    with pytest.raises(ValueError, match='no GPU: pass device "cpu"'):
        benchmark_shapes.benchmark_shapes("training", "small", "cuda")


def test_the_figures_are_written_and_plotted(tmp_path, monkeypatch):
    script = load_script("speed/shapes")
    flat = {name: part | {"num_hidden_layers": 1} for name, part in vars(SHAPES["small"]).items()}
    monkeypatch.setitem(SHAPES, "small", replace(SHAPES["small"], **flat))
    monkeypatch.delitem(SHAPES, "paper")
    monkeypatch.setattr(script, "SWEEPS", {"batch": (1, 2), "context_tokens": (32,)})
    output = tmp_path / "speed.json"
    monkeypatch.setattr(sys, "argv", ["shapes.py", "--device", "cpu", "--repeats", "1", "--output", str(output)])
    script.main()
    report = json.loads(output.read_text())
    assert report["speed"].keys() == {"small"} and report["speed"]["small"].keys() == {"training", "generation"}
    assert [point["batch"] for point in report["sweeps"]["batch"]] == [1, 2]
    assert all(point["ratio"] > 0 for points in report["sweeps"].values() for point in points)
    assert "<svg" in output.with_suffix(".svg").read_text()


# ---- memory ----


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(modeling_prefix, "WORTH_APART", {})  # as on a GPU
    return load_script("speed/memory")


def test_live_bytes_by_hand(memory):
    with memory.LiveBytes() as counted:
        whole = torch.zeros(1000)
        part, other = whole[:10], whole + 1
        del other
        part = part + 1
    assert (counted.live, counted.peak) == (4040, 8000)


def test_the_memory_of_a_step_without_a_gpu(memory, tmp_path, monkeypatch):
    two = {name: part | {"num_hidden_layers": 2} for name, part in vars(SHAPES["small"]).items()}
    flat = replace(SHAPES["small"], **two)
    monkeypatch.setitem(SHAPES, "small", flat)
    # what a layer keeps of a token: SwiGLU, both norms, attention and its sums
    expected = 2 * 3 * 1536 + 4 * 2 * 576 + 4 * 2 + 2 * (2 * 576 + 2 * 192) + 4 * 9
    assert memory.kept_by_layer(flat, compiled=False) == expected
    monkeypatch.setattr(memory, "kept_by_layer", lambda shapes, compiled: 0)
    output = tmp_path / "memory.json"
    argv = ["memory.py", "--shapes", "small", "--batches", "2", "8", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    memory.main()
    report = json.loads(output.read_text())
    plain, checkpointed = report["memory"]["one_pass"], report["memory"]["gradient_checkpointing"]
    assert plain["batch_2"]["weights"] < plain["batch_2"]["peak"] < plain["batch_8"]["peak"]
    assert checkpointed["batch_8"]["peak"] < plain["batch_8"]["peak"]
    model = benchmark_shapes.training_model(flat, OBJECTIVES, torch.bfloat16, "meta")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert plain["batch_2"]["weights"] == pytest.approx(weights / 1e9, rel=1e-3)  # and buffers
