"""Training: a batch in parts is the whole batch, an interrupted run is the uninterrupted one, faults are survived."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import distributed_training
import pytest
import torch
import yaml
from conftest import load_script
from distributed_training import KINDS, RUNS
from safetensors.torch import load_file
from tiny_training import (
    ALL,
    arguments,
    dialogue_model,
    dialogues,
    logged_losses,
    make_trainer,
    pairs,
    pretraining_model,
    processor,
    trained_weights,
    write_shard,
)
from transformers import TrainerCallback

from modeling_vikdf import VikdfConfig, VikdfForConditionalGeneration, VikdfForPreTraining, VikdfProcessor
from modeling_vikdf.building import new_model
from modeling_vikdf.cli import main
from modeling_vikdf.data import load_image_text_pairs
from modeling_vikdf.data.collators import DialogueCollator, PreTrainingCollator
from modeling_vikdf.data.preferences import PreferenceCollator
from modeling_vikdf.training import recipe as recipe_module
from modeling_vikdf.training.checkpoints import last_checkpoint
from modeling_vikdf.training.recipe import check_recipe
from modeling_vikdf.training.stages import run_stage
from modeling_vikdf.training.trainer import VikdfTrainer, VikdfTrainingArguments, freeze_unused


# ---- a batch in parts ----


class Gradients(TrainerCallback):
    """Keeps the gradients of every step, as the optimizer gets them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def gradients_of_steps(folder, objectives, dtype=torch.float32, **kwargs):
    kept = Gradients()
    trainer = make_trainer(folder, objectives, optim="sgd", max_grad_norm=0, max_steps=2, callbacks=[kept], **kwargs)
    trainer.model.to(dtype)
    trainer.train()
    return kept.steps, logged_losses(trainer)


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors as one vector."""
    assert one.keys() == other.keys() != set()
    difference = sum((one[key] - other[key].view_as(one[key])).double().square().sum() for key in one)
    return float((difference / sum(value.double().square().sum() for value in one.values())).sqrt())


@pytest.mark.parametrize(
    ("objectives", "dtype"),
    [
        (ALL, torch.float32),
        (None, torch.float32),
        # one by one in double precision: what little gradient matching has here is as small as float32's rounding
        *(({name: 1.0}, torch.float64) for name in ALL),
    ],
    ids=str,
)
def test_accumulated_batches_are_one_batch(objectives, dtype, tmp_path):
    """4 x 2 accumulated gives the losses and gradients of 8."""
    whole, losses = gradients_of_steps(tmp_path, objectives, dtype, per_device_train_batch_size=8)
    parts, part_losses = gradients_of_steps(
        tmp_path, objectives, dtype, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert relative_difference(whole[0], parts[0]) < 1e-6
    for step, part in zip(losses, part_losses, strict=True):
        assert part == pytest.approx(step, abs=5e-6)


def test_the_last_step_of_an_epoch_may_be_short(tmp_path):
    """11 examples as 8 + 3, or as 2 + 2 + 2 + 2 and 2 + 1."""
    whole, losses = gradients_of_steps(tmp_path, ALL, train=pairs(11), per_device_train_batch_size=8)
    parts, part_losses = gradients_of_steps(
        tmp_path, ALL, train=pairs(11), per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    # rounding of the first step is in the second's weights
    assert relative_difference(whole[1], parts[1]) < 1e-5
    assert part_losses[1] == pytest.approx(losses[1], abs=1e-5)


def test_part_of_the_rows_masked_is_part_of_the_rows_in_parts(tmp_path):
    settings = {"collator": {"masked_share": 0.4}}
    whole, _ = gradients_of_steps(tmp_path, ALL, per_device_train_batch_size=8, **settings)
    parts, _ = gradients_of_steps(
        tmp_path, ALL, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings
    )
    assert relative_difference(whole[0], parts[0]) < 1e-6


def test_dropout_is_the_same_in_both_passes_over_a_micro_batch(tmp_path):
    """
    What a micro-batch is contrasted with was computed with the dropout that these examples then have in their own
    step: with the two passes' embeddings equal, the parts' losses add up to one loss of one batch.
    """
    trainer = make_trainer(
        tmp_path,
        {"text_image_matching": 1.0},
        dropout=0.3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    seen = []
    step = trainer.compute_loss

    def watched(model, inputs, return_outputs=False, num_items_in_batch=None):
        others = inputs["other_text"]
        loss, outputs = step(model, inputs, return_outputs=True)
        seen.append((others, outputs.text_embeddings.detach()))
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = watched
    trainer.train()
    (first_others, first), (second_others, second) = seen
    assert torch.equal(first_others, second) and torch.equal(second_others, first)


@pytest.fixture(scope="module")
def two_processes(backbones, tmp_path_factory):
    """The folder in which two processes left what they made of `RUNS`, and of a stage on shards of unequal length."""
    folder = tmp_path_factory.mktemp("distributed")
    shards = [str(write_shard(folder / f"{i}.tar", pairs(8)[: 5 - 2 * i])) for i in range(2)]
    recipe = {
        "model": model_section(backbones),
        "data": {"train": shards, "validation": shards, "shuffle_buffer": 2},
        "training": training_section(
            folder / "stage", per_device_train_batch_size=2, gradient_accumulation_steps=2, ddp_backend="gloo"
        ),
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(tests / "distributed_training.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(name, two_processes, tmp_path):
    """The same losses, evaluation and weights by DDP and by FSDP2 as on one process; and both resume exactly."""
    one = distributed_training.steps(name, tmp_path)
    start = trained_weights(make_trainer(tmp_path, RUNS[name][0]).model)
    update = {key: value - start[key] for key, value in one["weights"].items()}
    for kind in KINDS:
        two = json.loads((two_processes / f"{kind}-{name}.json").read_text())
        assert {"ddp": "DistributedDataParallel", "fsdp2": "FSDP"}[kind] in two["wrapper"]
        for step, other in zip(one["losses"], two["losses"], strict=True):
            assert other == pytest.approx(step, abs=1e-5)
        assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
        weights = load_file(two_processes / f"{kind}-{name}.safetensors")
        other_update = {key: value.view_as(start[key]) - start[key] for key, value in weights.items()}
        # in float32 an update is known to about 1e-7 of the weight that it is added to
        assert relative_difference(update, other_update) < 1e-4
        assert two.get("resumed", 0) == 0


def test_checkpoints_of_several_processes_load_as_any_other(two_processes):
    """FSDP's too: the temperature is a scalar again, and there is no second file of all weights, frozen ones too."""
    for kind in KINDS:
        folder = two_processes / kind / "all" / "checkpoint-2"
        if kind == "ddp" and not distributed_training.RESTORES_ON_CPUS:
            continue
        assert load_file(folder / "model.safetensors")["matching_head.logit_scale"].shape == ()
        weights = [path.name for path in folder.iterdir() if path.stat().st_size > 100_000]
        assert sorted(weights) == ["model.safetensors", "optimizer.bin" if kind == "fsdp2" else "optimizer.pt"]
        VikdfForPreTraining.from_pretrained(folder)


def test_a_stage_on_shards_of_unequal_length(two_processes):
    """Eight pairs, five of them for one process: its epochs end elsewhere than the other's, and no one waits."""
    metrics = json.loads((two_processes / "stage.json").read_text())
    state = json.loads((two_processes / "stage" / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and metrics["eval_loss"] > 0
    assert (two_processes / "stage" / "skipped.txt").read_text() == "Skipped nothing.\n"
    VikdfForPreTraining.from_pretrained(two_processes / "stage")


# ---- interrupted and resumed ----


class Kill(TrainerCallback):
    """SIGKILL in the middle of a step: the gradients are there, the weights not yet moved."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, kind: str, shards: list[str] | None = None, resume: bool = False, **kwargs) -> VikdfTrainer:
    """Seven steps with dropout over shuffled data, a checkpoint after each even one; the data ends in between."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    if kind == "stream":
        settings["train"] = load_image_text_pairs(shards, shuffle_buffer=4, seed=1)
    trainer = make_trainer(
        folder,
        None if kind == "dialogues" else ALL,
        dropout=0.1,
        **{"max_steps": 7, "save_strategy": "steps", "save_steps": 2, **settings, **kwargs},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def in_another_process(function, *args) -> int:
    """The exit code of a function run in a fresh process, forked off a server that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_training"])
    process = context.Process(target=function, args=args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, sys.path)))  # for the server, which starts with the first
        process.start()
    process.join(120)
    return process.exitcode


def run_until_killed(folder, kind, shards, step):
    run(folder, kind, shards, callbacks=[Kill(step)])


def run_into_a_fault(folder, kind, shards, name, checkpoint, half):
    """Killed when the file is written into that checkpoint, perhaps with half of it on the disk."""

    def fault(path):
        if str(path).endswith(name) and f"checkpoint-{checkpoint}" in str(path):
            if half:
                Path(path).write_bytes(b'{"epoch": 1.0, ')
            os.kill(os.getpid(), signal.SIGKILL)

    save, replace = torch.save, os.replace
    torch.save = lambda data, path, *args, **kwargs: (fault(path), save(data, path, *args, **kwargs))
    os.replace = lambda source, target: (fault(target), replace(source, target))
    from transformers import TrainerState

    to_json = TrainerState.save_to_json
    TrainerState.save_to_json = lambda self, path: (fault(path), to_json(self, path))
    run(folder, kind, shards)


def assert_same_run(resumed: VikdfTrainer, whole: VikdfTrainer) -> None:
    """Bit for bit: weights, optimizer, schedule and the losses of all steps."""
    assert resumed.state.global_step == whole.state.global_step == 7
    assert logged_losses(resumed) == logged_losses(whole)
    weights, expected = trained_weights(resumed.model), trained_weights(whole.model)
    assert weights.keys() == expected.keys()
    assert [key for key in weights if not torch.equal(weights[key], expected[key])] == []
    state, expected = resumed.optimizer.state_dict(), whole.optimizer.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    for number, moments in expected["state"].items():
        assert all(torch.equal(state["state"][number][key], value) for key, value in moments.items())
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[str]:
    """Ten pairs in two shards: no whole number of steps."""
    root = tmp_path_factory.mktemp("shards")
    return [str(write_shard(root / f"{i}.tar", pairs(10)[5 * i : 5 * i + 5])) for i in range(2)]


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory) -> dict[str, VikdfTrainer]:
    kinds = ("pairs", "dialogues", "stream")
    return {kind: run(tmp_path_factory.mktemp(kind), kind, shards) for kind in kinds}


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("kind", ["pairs", "dialogues", "stream"])
def test_a_run_killed_in_a_step_goes_on_as_if_nothing_had_been(kind, step, uninterrupted, shards, tmp_path):
    """In the first epoch and in a later one (pairs and dialogues: four steps an epoch, the stream: two and a half)."""
    assert in_another_process(run_until_killed, tmp_path, kind, shards, step) == -signal.SIGKILL
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step // 2 * 2}")
    assert_same_run(run(tmp_path, kind, shards, resume=True), uninterrupted[kind])


@pytest.mark.parametrize(
    ("name", "half"),
    [("model.safetensors", False), ("optimizer.pt", True), ("rng_state.pth", False), ("trainer_state.json", True)],
)
def test_a_run_killed_in_a_save_goes_on_from_the_checkpoint_before(name, half, uninterrupted, shards, tmp_path):
    assert in_another_process(run_into_a_fault, tmp_path, "pairs", shards, name, 4, half) == -signal.SIGKILL
    assert (tmp_path / "checkpoint-4").is_dir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert_same_run(run(tmp_path, "pairs", shards, resume=True), uninterrupted["pairs"])


def test_an_evaluation_in_between_changes_nothing(uninterrupted, tmp_path):
    """It neither draws from the run's random numbers nor leaves the model in evaluation mode."""
    trainer = run(tmp_path, "pairs", eval_strategy="steps", eval_steps=1, evaluation=pairs(4))
    assert_same_run(trainer, uninterrupted["pairs"])


@pytest.mark.parametrize("kind", ["pairs", "stream"])
def test_resuming_a_finished_run_changes_nothing(kind, uninterrupted, shards):
    """Also when it ended in the middle of an epoch: transformers makes one step more."""
    folder = Path(uninterrupted[kind].args.output_dir)
    again = run(folder, kind, shards, resume=True)
    assert_same_run(again, uninterrupted[kind])


def test_a_longer_run_goes_on_from_a_finished_one(uninterrupted, shards, tmp_path):
    run(tmp_path, "pairs", max_steps=4)
    assert_same_run(run(tmp_path, "pairs", resume=True), uninterrupted["pairs"])


def test_workers_change_nothing(uninterrupted, tmp_path):
    """Nor do workers that outlive an epoch."""
    for settings in ({}, {"dataloader_persistent_workers": True}):
        trainer = run(tmp_path, "pairs", dataloader_num_workers=2, max_steps=7, save_strategy="no", **settings)
        assert_same_run(trainer, uninterrupted["pairs"])


@pytest.mark.parametrize("kind", ["pairs", "stream"])
def test_each_epoch_has_every_pair_once_in_another_order_masked_anew(kind, shards, tmp_path):
    data = pairs(10) if kind == "pairs" else load_image_text_pairs(shards, shuffle_buffer=4)
    trainer = make_trainer(tmp_path, ALL, train=data, per_device_train_batch_size=5, max_steps=5)
    order, masked = [], {}
    collate = type(trainer.data_collator).__call__

    class Watched(type(trainer.data_collator)):
        def __call__(self, examples):
            batch = collate(self, examples)
            for example, cells in zip(examples, batch["masked_cells"], strict=True):
                order.append(example["key"])
                masked.setdefault(example["key"], []).append(cells.tolist())
            return batch

    trainer.data_collator.__class__ = Watched
    trainer.train()
    assert len(set(order[:10])) == len(set(order[10:20])) == 10
    assert order[:10] != order[10:20]
    assert any(times[0] != times[1] for times in masked.values())


def test_processes_share_a_stream_without_repeats(shards, tmp_path):
    """Each process reads its own shards where these go round, and its own examples where they do not."""
    from modeling_vikdf.training.trainer import EndlessStream

    for files in (shards, shards[:1]):
        parts = []
        for rank in range(2):
            stream = iter(EndlessStream(load_image_text_pairs(files, shuffle_buffer=0), rank, 2))
            parts.append([next(stream) for _ in range(5)])
        keys = [{example["key"] for example in part if example["epoch"] == 0} for part in parts]
        assert not keys[0] & keys[1]
        assert len(keys[0] | keys[1]) == 5 * len(files)


def test_nothing_to_read_ends(tmp_path):
    from modeling_vikdf.training.trainer import EndlessStream

    assert list(EndlessStream([])) == []


# ---- checkpoints ----


def full_disk(monkeypatch, where: str, checkpoint: int) -> None:
    """From now on a write into that checkpoint fails as on a disk without room."""
    save = torch.save

    def no_room(data, path, *args, **kwargs):
        if where in str(path) and f"checkpoint-{checkpoint}" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return save(data, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", no_room)
    if where == "model.safetensors":
        import transformers.modeling_utils as modeling_utils

        write = modeling_utils.safe_save_file

        def no_room_for_weights(tensors, path, *args, **kwargs):
            if f"checkpoint-{checkpoint}" in str(path):
                from safetensors import SafetensorError

                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            return write(tensors, path, *args, **kwargs)

        monkeypatch.setattr(modeling_utils, "safe_save_file", no_room_for_weights)


@pytest.mark.parametrize("where", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_full_disk_says_so_and_loses_nothing(where, uninterrupted, shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, where, checkpoint=4)
        with pytest.raises(OSError, match=r"(?s)checkpoint-4 could not be written.*No space left.*checkpoint-2"):
            run(tmp_path, "pairs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert_same_run(run(tmp_path, "pairs", resume=True), uninterrupted["pairs"])


def test_a_finished_checkpoint_is_no_victim_of_what_comes_after(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError("not yours")

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", refuse)
    with pytest.raises(PermissionError, match="not yours"):
        run(tmp_path, "pairs")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_checkpoint_that_is_written_over_is_unfinished_until_it_is_done(tmp_path, monkeypatch):
    """A run that starts anew in the folder of an old one must not make one checkpoint of two."""
    run(tmp_path, "pairs", max_steps=4)
    shutil.rmtree(tmp_path / "checkpoint-2")
    kwargs = ("pairs", None, "optimizer.pt", 4, True)
    (tmp_path / "checkpoint-6").mkdir()
    assert in_another_process(run_into_a_fault, tmp_path, *kwargs) == -signal.SIGKILL
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_last_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None
    for name, state in (
        ("checkpoint-9", '{"global_step": 9}'),
        ("checkpoint-10", '{"global_step": 10}'),
        ("checkpoint-11", '{"global_'),
        ("checkpoint-12", ""),
        ("checkpoint-13", None),
        ("checkpoint-last", "{}"),
        ("other-20", "{}"),
    ):
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.fixture(scope="module")
def stages(backbones, tmp_path_factory) -> Path:
    """The three stages one after the other, each a recipe, around saved backbones; eight pairs, four dialogues."""
    root = tmp_path_factory.mktemp("stages")
    shard = str(write_shard(root / "pairs.tar", pairs(8)))
    lines = [json.dumps({"messages": dialogue["messages"]}) for dialogue in dialogues(4)]
    (root / "dialogues.jsonl").write_text("\n".join(lines))
    for stage, model in (
        ("distill", model_section(backbones)),
        ("integrate", {"checkpoint": str(root / "distill")}),
        ("tune", {"checkpoint": str(root / "integrate")}),
    ):
        data = str(root / "dialogues.jsonl") if stage == "tune" else shard
        recipe = {
            "model": model,
            "data": {"train": data, "validation": data},
            "training": training_section(root / stage, load_best_model_at_end=True, eval_strategy="steps"),
        }
        metrics = run_stage(stage, recipe)
        (root / f"{stage}.json").write_text(json.dumps(metrics))
    return root


def model_section(backbones: Path) -> dict:
    return {
        "language_model": str(backbones / "llama"),
        "context_encoder": str(backbones / "bert"),
        "vision_encoder": str(backbones / "dinov2"),
        "num_knowledge_tokens": 4,
        "project_inputs": True,
        "iqformer_config": {
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
        },
    }


def training_section(folder: Path, **kwargs) -> dict:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "error",
    }
    return {**defaults, **kwargs}


@pytest.mark.parametrize(
    ("stage", "losses"),
    [
        ("distill", {"text_image_matching", "masked_image", "masked_text"}),
        ("integrate", {"knowledge_to_text", "text_to_knowledge"}),
        ("tune", set()),
    ],
)
def test_checkpoints_hold_nothing_frozen(stage, losses, stages):
    """Of the backbones neither weights nor moments; and each checkpoint is a model that loads by itself."""
    metrics = json.loads((stages / f"{stage}.json").read_text())
    assert {f"eval_loss_{name}" for name in losses} <= set(metrics) and metrics["eval_loss"] > 0
    cls = VikdfForConditionalGeneration if stage == "tune" else VikdfForPreTraining
    model = cls.from_pretrained(stages / stage)
    VikdfProcessor.from_pretrained(stages / stage)
    freeze_unused(model, pictures=stage == "distill")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for folder in (stages / stage, stages / stage / "checkpoint-4"):
        names = load_file(folder / "model.safetensors")
        assert not any(name.startswith(("language_model", "context_encoder", "vision_encoder")) for name in names)
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(trained)
    held = sum(moments["exp_avg"].numel() for moments in optimizer["state"].values())
    assert held == sum(parameter.numel() for parameter in trained)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "streamed"])
def test_pictures_stay_beside_dialogues(stages, tmp_path, cached):
    """Tuning with objectives: replies and pairs in every step, each counted, cached or not; resumed bit by bit."""
    shard, lines = str(stages / "pairs.tar"), str(stages / "dialogues.jsonl")
    recipe = {
        "model": {"checkpoint": str(stages / "integrate")},
        "objectives": {"knowledge_to_text": 0.5, "text_image_matching": 0.1},
        "data": {"train": lines, "validation": lines, "pairs": shard, "pairs_validation": shard},
        "collator": {"hide_context": 0.5, "image_knowledge_share": 0.5, "max_length": 300},
    }
    if cached:
        recipe["data"] |= {"feature_cache": str(tmp_path / "cache"), "pool_grid": 2}
    metrics = run_stage("tune", recipe | {"training": training_section(tmp_path / "whole")})
    parts = {name: metrics[f"eval_loss_{name}"] for name in ("reply", "knowledge_to_text", "text_image_matching")}
    assert metrics["eval_loss"] == pytest.approx(
        parts["reply"] + 0.5 * parts["knowledge_to_text"] + 0.1 * parts["text_image_matching"], rel=1e-5
    )
    # the replies are scored as by tuning on dialogues alone
    alone = run_stage(
        "tune",
        {
            "model": {"checkpoint": str(tmp_path / "whole")},
            "data": {"train": lines, "validation": lines},
            "training": training_section(tmp_path / "alone", max_steps=1, learning_rate=1e-12),
        },
    )
    assert alone["eval_loss"] == pytest.approx(parts["reply"], rel=1e-4)
    VikdfForConditionalGeneration.from_pretrained(tmp_path / "whole")
    # interrupted after two steps
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run_stage("tune", recipe | {"training": training_section(tmp_path / "resumed")})
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("joint", [False, True], ids=["dialogues", "with pictures"])
def test_dialogues_of_similar_length_may_be_read_together(backbones, stages, tmp_path, joint):
    """Sorted by length into parts a batch has less padding, and the loss and gradient that it has as a whole."""
    model = model_section(backbones) | {"dtype": "float32"}  # in half precision the parts would round differently
    model["iqformer_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    data = dict.fromkeys(("train", "validation"), str(stages / "dialogues.jsonl"))
    recipe = {"model": model, "data": data}
    if joint:
        pictures = dict.fromkeys(("pairs", "pairs_validation"), str(stages / "pairs.tar"))
        recipe |= {"objectives": {"knowledge_to_text": 0.5}, "data": data | pictures}
    logged = []
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    halves["train_sampling_strategy"] = "batch_rebalance"
    grouped = {"train_sampling_strategy": "group_by_length"}
    for name, parts in (("whole", {}), ("parts", halves), ("grouped", grouped)):
        # where a gradient is next to nothing, AdamW would make a whole step of how it is rounded
        training = training_section(tmp_path / name, max_steps=2, optim="sgd", **parts)
        run_stage("tune", recipe | {"training": training})
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        logged.append([[step["loss"], step["grad_norm"]] for step in state["log_history"] if "loss" in step])
    for other in logged[1:]:
        assert logged[0] == [pytest.approx(step, rel=1e-4) for step in other]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objectives": {"knowledge_to_text": 1.0}}, "name both what is to be learnt"),
        ({"data": {"train": "d.jsonl", "pairs": "p.tar"}}, "name both what is to be learnt"),
        (
            {
                "objectives": {"knowledge_to_text": 1.0},
                "data": {"train": "d.jsonl", "validation": "d.jsonl", "pairs": "p.tar"},
            },
            "data.pairs_validation",
        ),
    ],
)
def test_pictures_beside_dialogues_need_data_and_objectives(sections, message, stages, tmp_path):
    recipe = {
        "model": {"checkpoint": str(stages / "integrate")},
        "data": {"train": "d.jsonl"},
        "training": training_section(tmp_path / "out"),
    }
    with pytest.raises(ValueError, match=message):
        run_stage("tune", recipe | sections)


def test_the_recipes_of_all_stages_travel_with_a_checkpoint(stages, tmp_path):
    """Of files the names alone, and nothing secret."""
    history = list(yaml.safe_load_all((stages / "tune" / "recipe.yaml").read_text()))
    assert [recipe["stage"] for recipe in history] == ["distill", "integrate", "tune"]
    assert history[0]["data"]["train"].endswith("/pairs.tar")
    assert history[2]["model"]["checkpoint"].endswith("/integrate")
    text = (stages / "tune" / "recipe.yaml").read_text()
    assert str(stages) not in text
    recipe = {
        "model": {"checkpoint": str(stages / "integrate")},
        "data": {"train": str(stages / "dialogues.jsonl"), "sources": ["made up"]},
        "training": training_section(tmp_path, max_steps=1, hub_token="hf_secret"),
    }
    run_stage("tune", recipe)
    text = (tmp_path / "recipe.yaml").read_text()
    assert "hf_secret" not in text and "made up" in text


def test_stages_build_on_each_other(stages):
    weights = {stage: load_file(stages / stage / "model.safetensors") for stage in ("distill", "integrate", "tune")}
    assert "pixel_decoder.weight" in weights["distill"] and "knowledge_predictor.weight" in weights["integrate"]
    assert not any("predictor" in name or "decoder" in name or "block" in name for name in weights["tune"])
    # what a stage does not train it hands on as it was
    for name in ("matching_head.text_projection.weight", "iqformer.vision_projection.dense.weight"):
        assert torch.equal(weights["distill"][name], weights["integrate"][name])
        assert torch.equal(weights["distill"][name], weights["tune"][name])
    for one, other in (("distill", "integrate"), ("integrate", "tune")):
        assert not torch.equal(weights[one]["iqformer.query_tokens"], weights[other]["iqformer.query_tokens"])
    assert (stages / "tune" / "skipped.txt").read_text() == "Skipped nothing.\n"


@pytest.mark.parametrize("stage", ["distill", "tune"])
def test_the_best_checkpoint_is_kept(stage, stages):
    """`load_best_model_at_end` ends with the weights of the lowest validation loss, and their loss."""
    state = json.loads((stages / stage / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{best}"
    final = load_file(stages / stage / "model.safetensors")
    kept = load_file(stages / stage / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(final[name], kept[name]) for name in kept)
    assert json.loads((stages / f"{stage}.json").read_text())["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


WORST = {"load_best_model_at_end": True, "greater_is_better": True}  # of a loss: seldom the last


@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4]),
        ({"eval_strategy": "steps", "eval_steps": 3}, [3, 4]),
        ({"eval_strategy": "steps", "eval_steps": 2, **WORST}, [2, 4]),
        ({}, [4]),
    ],
    ids=["at the end", "before the end", "the best", "none"],
)
def test_a_stage_evaluates_no_weights_twice(settings, evaluations, stages, tmp_path, monkeypatch):
    """And returns the metrics of the weights that it leaves, also when it is started again after it was done."""
    evaluate, found = VikdfTrainer.evaluate, []

    def counted(self, *args, **kwargs):
        found.append((self.state.global_step, evaluate(self, *args, **kwargs)))
        return found[-1][1]

    monkeypatch.setattr(VikdfTrainer, "evaluate", counted)
    lines = str(stages / "dialogues.jsonl")
    recipe = {
        "model": {"checkpoint": str(stages / "integrate")},
        "data": {"train": lines, "validation": lines},
        "training": training_section(tmp_path / "out", max_steps=4, **{"eval_steps": None} | settings),
    }
    metrics = run_stage("tune", recipe)
    assert [step for step, _ in found] == evaluations
    losses = [evaluation["eval_loss"] for _, evaluation in found]
    expected = max(losses) if "load_best_model_at_end" in settings else losses[-1]
    assert metrics["eval_loss"] == expected and "step" not in metrics
    again = run_stage("tune", recipe)
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert evaluations != [2, 4] or len(found) == 2


def test_a_worse_end_does_not_win(tmp_path):
    """With a learning rate that ruins the model the first checkpoint is the best."""
    trainer = make_trainer(
        tmp_path,
        None,
        evaluation=dialogues(4),
        max_steps=3,
        learning_rate=1.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] != losses[-1]
    assert trainer.state.best_global_step == losses.index(min(losses)) + 1
    assert trainer.evaluate()["eval_loss"] == min(losses)


# ---- what is logged, and evaluation ----


def test_objectives_and_throughput_are_logged(tmp_path):
    trainer = make_trainer(tmp_path, ALL, max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        total = sum(weight * entry[f"loss_{name}"] for name, weight in ALL.items())
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert entry["pairs_per_s"] > 0 and entry["tokens_per_s"] > entry["pairs_per_s"]


def test_throughput_counts_pairs_and_real_tokens_but_neither_evaluations_nor_saves(tmp_path, monkeypatch):
    import modeling_vikdf.training.trainer as training

    clock = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    trainer = make_trainer(
        tmp_path, ALL, max_steps=3, logging_steps=3, eval_strategy="steps", eval_steps=1, evaluation=pairs(2)
    )
    batches = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock[0] += 2.0  # a step takes two seconds

        def on_evaluate(self, *args, **kwargs):
            clock[0] += 100.0

    trainer.add_callback(Clock)
    collate = type(trainer.data_collator).__call__

    class Watched(type(trainer.data_collator)):
        def __call__(self, examples):
            batches.append(collate(self, examples))
            return batches[-1]

    trainer.data_collator.__class__ = Watched
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["pairs_per_s"] == pytest.approx(12 / 6)
    training_batches = [batch for batch in batches if len(batch["labels"]) == 4][:3]
    tokens = sum(int(batch["attention_mask"].sum() + batch["draw_attention_mask"].sum()) for batch in training_batches)
    assert entry["tokens_per_s"] == pytest.approx(tokens / 6, abs=0.01)


@pytest.mark.parametrize("objectives", [ALL, None], ids=["pairs", "dialogues"])
def test_evaluation_is_the_same_each_time_however_it_is_cut(objectives, tmp_path):
    """
    Twice, in a later epoch and in other batches. Only matching, whose negatives are the batch, depends on its size.
    """
    data = dialogues(7) if objectives is None else pairs(7)
    losses = []
    for size in (7, 2):
        trainer = make_trainer(
            tmp_path, objectives, evaluation=data, per_device_eval_batch_size=size, learning_rate=0.0, max_steps=9
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        kept = {key for key in before if key.startswith("eval_loss")}
        assert {key: before[key] for key in kept} == {key: after[key] for key in kept}
        losses.append({key: before[key] for key in kept if "matching" not in key})
    if objectives is not None:
        assert losses[0].pop("eval_loss") != pytest.approx(losses[1].pop("eval_loss"), rel=1e-3)
        assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_eval_loss_of_dialogues_is_nats_a_token(tmp_path):
    trainer = make_trainer(tmp_path, None, evaluation=dialogues(5), per_device_eval_batch_size=2)
    model = trainer.model.eval()
    nats = tokens = 0
    for dialogue in dialogues(5):
        batch = DialogueCollator(processor())([dialogue])
        count = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            nats += model(**batch).loss.item() * count
        tokens += count
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)


# ---- what trains ----


def test_frozen_modules_stay_as_they_are(tmp_path):
    """In evaluation mode all the time, without gradient, and bit for bit the same weights."""

    class Watch(TrainerCallback):
        modes = set()

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            frozen = (model.language_model, model.context_encoder, model.vision_encoder)
            self.modes |= {module.training for part in frozen for module in part.modules()}
            assert all(p.grad is None and not p.requires_grad for part in frozen for p in part.parameters())
            assert model.iqformer.training

    trainer = make_trainer(tmp_path, ALL, callbacks=[Watch()], weight_decay=0.1, gradient_accumulation_steps=2)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert Watch.modes == {False}
    assert changed == {name for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_learning_rates(tmp_path):
    """The longest beginning counts; biases, norms, queries and base vectors do not decay; the default comes first."""
    rates = {"iqformer": 1e-3, "iqformer.query_tokens": 2e-3, "knowledge_": 5e-3, "knowledge_gate": 4e-3}
    trainer = make_trainer(tmp_path, ALL, learning_rate=1e-4, learning_rates=rates, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    found = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(found) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert found["iqformer.query_tokens"] == (2e-3, 0.0)
    assert found["iqformer.context_projection.dense.weight"] == (1e-3, 0.1)
    assert found["iqformer.context_projection.dense.bias"] == (1e-3, 0.0)
    assert found["iqformer.context_projection.norm_in.weight"] == (1e-3, 0.0)
    assert found["knowledge_predictor.weight"] == (5e-3, 0.1) and found["knowledge_gate"] == (4e-3, 0.0)
    assert found["caption_shift"] == (1e-4, 0.0)
    assert found["language_projection.weight"] == (1e-4, 0.1)
    assert found["matching_head.logit_scale"] == (1e-4, 0.0)
    assert groups[0]["lr"] == 1e-4  # the one that is logged

    trainer = make_trainer(tmp_path, None, learning_rate=1e-4, learning_rates=rates, weight_decay=0.1)
    groups, base = trainer.create_optimizer().param_groups, trainer.model.knowledge_base
    assert [(g["lr"], g["weight_decay"]) for g in groups if any(p is base for p in g["params"])] == [(5e-3, 0.0)]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without an accelerator")
def test_half_precision_needs_no_word_about_the_cpu(tmp_path):
    assert VikdfTrainingArguments(output_dir=str(tmp_path), bf16=True).device.type == "cpu"


def test_what_has_the_rate_zero_is_frozen(tmp_path):
    rates = {"iqformer": 0.0, "iqformer.query_tokens": 1e-3}
    trainer = make_trainer(tmp_path, ALL, learning_rate=1e-4, learning_rates=rates, max_steps=1)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {
        name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert {name for name in changed if name.startswith("iqformer")} == {"iqformer.query_tokens"}
    assert "language_projection.weight" in changed
    frozen = [parameter for name, parameter in trainer.model.named_parameters() if name.startswith("iqformer.qformer")]
    assert not any(parameter.requires_grad for parameter in frozen)


def test_learning_rates_of_nothing_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, ALL, learning_rates={"iqformers": 1e-3})
    with pytest.raises(ValueError, match=r"learning_rates names \['iqformers'\].*'iqformer'"):
        trainer.train()


def test_numbers_that_yaml_reads_as_text(tmp_path):
    """YAML 1.1 wants a decimal point: 1e-4 is a text to it."""
    args = VikdfTrainingArguments(
        output_dir=str(tmp_path), learning_rate="1e-4", weight_decay="5e-2", learning_rates='{"iqformer": "1e-3"}'
    )
    assert (args.learning_rate, args.weight_decay, args.learning_rates) == (1e-4, 0.05, {"iqformer": 1e-3})
    # and `no` as false
    off = VikdfTrainingArguments(output_dir=str(tmp_path), **yaml.safe_load("{eval_strategy: no, save_strategy: no}"))
    assert off.eval_strategy == off.save_strategy == "no"


@pytest.mark.parametrize("objectives", [ALL, None], ids=["pairs", "dialogues"])
def test_master_weights_are_float32_under_bfloat16(objectives, tmp_path):
    """Updates far below bfloat16's resolution are not lost, and the batch is still one batch in parts."""
    trainer = make_trainer(
        tmp_path,
        objectives,
        bf16=True,
        learning_rate=1e-5,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        evaluation=dialogues(3) if objectives is None else pairs(3),
    )
    trainer.model.language_model.to(torch.bfloat16)
    before = trained_weights(trainer.model)
    trainer.train()
    after = trained_weights(trainer.model)
    assert {value.dtype for value in after.values()} == {torch.float32}
    moved = [key for key in after if not torch.equal(after[key], before[key])]
    assert len(moved) == len(after)
    assert max(float((after[key] - before[key]).abs().max()) for key in after) < 1e-3
    state = trainer.optimizer.state_dict()["state"]
    assert {moment["exp_avg"].dtype for moment in state.values()} == {torch.float32}
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    assert trainer.evaluate()["eval_loss"] > 0


def test_gradient_checkpointing_changes_nothing(tmp_path):
    runs = [
        gradients_of_steps(tmp_path, ALL, gradient_accumulation_steps=2, gradient_checkpointing=on, dropout=0.1)
        for on in (False, True)
    ]
    assert relative_difference(runs[0][0][0], runs[1][0][0]) < 1e-6


def test_lora_is_trained_saved_and_resumed(tmp_path):
    """PEFT says what trains and what is saved; the loss is exact in parts for it too."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        target_modules=r"language_model\..*\.(q_proj|v_proj)", modules_to_save=["iqformer", "language_projection"]
    )

    # a sum of all would be so large that float32's rounding of it alone is above the bound
    objectives = {name: weight for name, weight in ALL.items() if name != "text_text_matching"}

    def trainer(name, model, **kwargs):
        torch.manual_seed(0)
        kwargs = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": 0, **kwargs}
        pretraining = isinstance(model, VikdfForPreTraining)
        collator = make_trainer(tmp_path, objectives if pretraining else None).data_collator
        return VikdfTrainer(
            model=peft.get_peft_model(model, settings),
            args=arguments(tmp_path / name, log_level="error", learning_rates={"language_projection": 1e-3}, **kwargs),
            train_dataset=pairs(16) if pretraining else dialogues(16),
            data_collator=collator,
            processing_class=processor(),
        )

    for name, make in (("tune", dialogue_model), ("joint", lambda: pretraining_model(objectives))):
        whole = trainer(name, make())
        whole.train()
        weights = trained_weights(whole.model)
        assert any("lora_B" in key for key in weights) and any("language_projection" in key for key in weights)
        saved = load_file(tmp_path / name / "checkpoint-1" / "adapter_model.safetensors")
        assert len(saved) == len(weights)  # all that trains, and nothing else
        resumed = trainer(name, make())
        resumed.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-1"))
        again = trained_weights(resumed.model)
        assert all(torch.equal(weights[key], again[key]) for key in weights)
        parts = trainer(f"{name}-parts", make(), per_device_train_batch_size=2, gradient_accumulation_steps=2)
        parts.train()
        for step, part in zip(logged_losses(whole), logged_losses(parts), strict=True):
            assert part == pytest.approx(step, abs=1e-5)


# ---- stages as recipes ----


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("destill", {}, "Unknown stage 'destill'"),
        ("distill", {"modle": {}}, "Unknown section 'modle'"),
        (
            "distill",
            {"model": {"num_knowledge_token": 4}},
            r"Unknown keys \['num_knowledge_token'\] in section 'model'",
        ),
        ("distill", {"objectives": {"matching": 1.0}}, r"Unknown keys \['matching'\] in section 'objectives'"),
        ("distill", {"data": {"trian": "x"}}, r"Unknown keys \['trian'\] in section 'data'"),
        ("distill", {"training": {"learning_rat": 1}}, r"Unknown keys \['learning_rat'\] in section 'training'"),
        ("distill", {"training": {"do_eval": True}}, r"Unknown keys \['do_eval'\] in section 'training'"),
        ("distill", {"training": {"resume_from_checkpoint": "x"}}, "Unknown keys.*'resume_from_checkpoint'"),
        ("distill", {"collator": {"max_length": 9}}, r"Unknown keys \['max_length'\].*'distill' knows.*masked_share"),
        ("tune", {"collator": {"masked_share": 1}}, r"Unknown keys \['masked_share'\].*'tune' knows.*max_length"),
        ("distill", {"collator": {"caption_as_picture": True}}, r"Unknown keys \['caption_as_picture'\]"),
        ("tune", {"collator": {"posterior_share": 0.3}}, r"Unknown keys \['posterior_share'\] in section 'collator'"),
        ("tune", {"objectives": {"masked_text": 1.0}}, "name both what is to be learnt"),
        ("distill", {"data": None}, "set data.train"),
        ("distill", {"data": ["a.tar"]}, "'data' must hold settings"),
        ("distill", {"model": {"language_model": "x"}}, "needs a checkpoint, or language_model and context_encoder"),
        ("distill", {"model": {"checkpoint": "x", "image_size": 64}}, "'image_size'.*would be ignored"),
        ("distill", {"data": {"train": "x", "pool_grid": 4}}, "'pool_grid'.*without data.feature_cache"),
        (
            "distill",
            {"data": {"train": "x", "feature_cache": "y", "probabilities": [1.0]}},
            "'probabilities'.*with data.feature_cache",
        ),
        ("tune", {"data": ["d.jsonl"]}, "'data' must hold settings"),
        (
            "distill",
            {"model": {"checkpoint": "x", "saved_in": "y"}},
            r"Unknown keys \['saved_in'\] in section 'model'",
        ),
        ("distill", {"data": {"train": "x", "seed": "one"}}, "data.seed must be int, not 'one'"),
        ("distill", {"data": {"train": "x", "seed": True}}, "data.seed must be int, not True"),
        ("distill", {"objectives": {"masked_text": "much"}}, "objectives.masked_text must be float, not 'much'"),
        ("tune", {"collator": {"earlier_replies": "nay"}}, "collator.earlier_replies must be bool, not 'nay'"),
        ("distill", {"model": {"knowledge_pooling": "last"}}, "must be 'first' or 'mean' or 'each', not 'last'"),
    ],
)
def test_recipes_that_cannot_be_meant(stage, change, message, tmp_path):
    recipe = {
        "model": {"language_model": "llm", "context_encoder": "text", "vision_encoder": "vision"},
        "data": {"train": "pairs.tar"},
        "training": {"output_dir": str(tmp_path)},
    }
    for section, settings in change.items():
        recipe[section] = {**recipe.get(section, {}), **settings} if section == "training" else settings
    with pytest.raises(ValueError, match=message):
        run_stage(stage, recipe)


def test_numbers_of_recipes_are_floats():
    """Whole numbers, and 1e-1, which YAML reads as text."""
    recipe = {"model": {"checkpoint": "x"}, "data": {"train": "x"}}
    recipe |= {"objectives": {"masked_text": "1e-1"}, "collator": {"masked_share": 1}}
    checked = check_recipe("distill", recipe)
    assert checked.objectives.given() == {"masked_text": 0.1} and checked.collator.given() == {"masked_share": 1.0}
    assert isinstance(checked.collator.masked_share, float)


def names(section: type) -> set[str]:
    return {setting.name for setting in fields(section)}


def test_settings_of_recipes_are_those_of_what_they_are_handed_to():
    """So that a setting can neither be offered that nothing takes nor be forgotten."""
    new = {*signature(new_model).parameters, *signature(VikdfForConditionalGeneration.from_backbones).parameters}
    new -= {"model_class", "model_settings", "config_kwargs", "processor"}
    of_saving = {"backbones", "backbone_dtypes", "adapter", "saved_in", "reward_layer", "tie_word_embeddings"}
    of_backbones = {"text_config", "context_config", "vision_config", "knowledge_token_id", "loss_weights"}
    config = {*VikdfConfig.__annotations__} - of_saving - of_backbones
    assert names(recipe_module.ModelSection) == {"checkpoint"} | new | config
    given = {"processor", "config", "seed", "report"}
    assert names(recipe_module.PairCollation) == {*signature(PreTrainingCollator).parameters} - given
    assert names(recipe_module.DialogueCollation) == {*signature(DialogueCollator).parameters} - given
    assert names(recipe_module.PreferenceCollation) == {*signature(PreferenceCollator).parameters} - given - {"beside"}


def test_recipes_of_the_repository_are_understood():
    recipes = sorted(Path(__file__).parents[1].glob("configs/**/*.yaml"))
    recipes = [path for path in recipes if path.parent.name != "accelerate" and path.name != "study.yaml"]
    assert len(recipes) >= 5
    for path in recipes:
        stage = re.search(r"vikdf (\w+) --config|cli (\w+) --config", path.read_text())
        stage = next(group for group in stage.groups() if group)
        recipe = yaml.safe_load(path.read_text())
        given = {"train": "given on the command line"}
        if stage == "tune" and "objectives" in recipe:
            given |= {"pairs": "given", "validation": "given", "pairs_validation": "given"}
        check_recipe(stage, recipe | {"data": given | recipe.get("data", {})})
        on_cpu = {"use_cpu": True, "bf16": False, "report_to": "none"}
        recipe_module.arguments_class(stage)(**recipe["training"] | on_cpu)


def test_a_missing_tracker_is_told_before_any_data_are_read(tmp_path, monkeypatch):
    from modeling_vikdf.training import arguments, stages

    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: [])
    monkeypatch.setattr(stages, "load_image_text_pairs", lambda *args, **kwargs: pytest.fail("data were read"))
    recipe = {
        "model": {"checkpoint": "nowhere"},
        "data": {"train": "pairs.tar"},
        "training": training_section(tmp_path, report_to="trackio"),
    }
    with pytest.raises(ImportError, match=r"report_to=\['trackio'\] is not installed.*track"):
        run_stage("distill", recipe)


def test_the_way_into_the_llm_is_trained_where_replies_are_the_only_objective_that_goes_there():
    model = pretraining_model({"text_image_matching": 1.0, "reply": 1.0})
    freeze_unused(model)
    assert model.language_projection.weight.requires_grad and model.knowledge_gate.requires_grad


def test_steps_of_the_study_are_understood(monkeypatch, tmp_path):
    """Every step trains, after its parents, from a recipe that its stage understands, and once."""
    import argparse

    root = Path(__file__).parents[1]
    study = load_script("study/train")
    steps = yaml.safe_load((root / "configs" / "study.yaml").read_text())["steps"]
    ran, shrunk, controlled = [], [], {}

    def check(stage, recipe, collators):
        checked = check_recipe(stage, recipe)
        if collators:
            controlled[recipe["training"]["output_dir"]] = {data: each.__name__ for data, each in collators.items()}
        parent = checked.model.checkpoint
        assert parent is None or parent in ran + shrunk
        ran.append(recipe["training"]["output_dir"])

    class Untrained:
        system_prompt = "as packaged"

        def save_pretrained(self, folder):
            Path(folder).mkdir(parents=True)
            (Path(folder) / "prompt").write_text(self.system_prompt)

    class Trained:
        shrunk = []

        def shrink_knowledge(self, mean, share):
            self.shrunk.append((mean, share))

    def save_stage(name, model, processor, source, output, stage):
        assert str(source) in ran and stage["share"] == model.shrunk[-1][1]
        output.mkdir()
        shrunk.append(str(output))

    monkeypatch.setattr(study, "run_stage", check)
    monkeypatch.setattr(study, "load_model", lambda folder: (Trained(), None))
    monkeypatch.setattr(study, "save_stage", save_stage)
    monkeypatch.setattr(study, "mean_knowledge", lambda model, processor, dialogues: dialogues)
    monkeypatch.setattr(study, "load_dialogues", lambda file: [file])
    monkeypatch.setattr(study, "new_model", lambda **settings: (argparse.Namespace(save_pretrained=str), Untrained()))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(f"line {i}\n" for i in range(16)), encoding="utf-8")
    args = argparse.Namespace(
        config=root / "configs" / "study.yaml", output=tmp_path, pairs="p.tar", dialogues="d.jsonl", features="cache"
    )
    args.few_shot, args.preferences = None, tmp_path / "pairs.jsonl"
    with pytest.raises(ValueError, match="few_shot_eighth .* --few-shot"):
        study.train("few_shot_eighth", 0, steps, args)
    args.few_shot = few
    for name in steps:
        study.train(name, 0, steps, args)
    shares = [(tmp_path / "seed0" / f"few_shot_{each}" / "few_shot.jsonl") for each in ("eighth", "quarter", "all")]
    drawn = [set(path.read_text().splitlines()) for path in shares]
    assert list(map(len, drawn)) == [2, 4, 16] and drawn[0] < drawn[2] == set(few.read_text().splitlines())
    folders = {name: tmp_path / "seed0" / name for name in steps}
    assert sorted(ran) == sorted(str(folder) for name, folder in folders.items() if "recipe" in steps[name])
    assert controlled == {str(folders[name]): step["collators"] for name, step in steps.items() if "collators" in step}
    assert Trained.shrunk == [(["d.jsonl"], step["shrink"]) for step in steps.values() if "shrink" in step]
    prompts = [(folders[f"language_model{each}"] / "prompt").read_text() for each in ("", "_best_prompt")]
    assert prompts[0] == "as packaged" and prompts[1] in (root / "configs" / "system_prompts.txt").read_text()
    assert all((Path(folder) / "finished.json").is_file() for folder in ran)


def test_corrupt_images_and_a_truncated_shard_are_skipped_and_told(backbones, tmp_path):
    """One image in ten is damaged and a shard ends in the middle: training sees the others, each once an epoch."""
    examples = pairs(20)
    write_shard(tmp_path / "0.tar", examples[:10])
    whole = write_shard(tmp_path / "1.tar", examples[10:])
    damaged = bytearray((tmp_path / "0.tar").read_bytes())
    for found in list(re.finditer(rb"\x89PNG\r\n", damaged))[3:4]:
        damaged[found.start() : found.start() + 40] = bytes(40)
    (tmp_path / "0.tar").write_bytes(damaged)
    cut = whole.read_bytes()
    third = [found.start() for found in re.finditer(rb"\x89PNG\r\n", cut)][3]
    whole.write_bytes(cut[: third + 20])
    left = 9 + 3
    recipe = {
        "model": model_section(backbones),
        "objectives": {"text_image_matching": 1.0},
        "data": {"train": [str(tmp_path / f"{i}.tar") for i in range(2)], "shuffle_buffer": 0},
        "training": training_section(tmp_path / "out", max_steps=4, per_device_train_batch_size=3),
    }
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        from modeling_vikdf.data.collators import PreTrainingCollator

        collate = PreTrainingCollator.__call__
        patch.setattr(
            PreTrainingCollator,
            "__call__",
            lambda self, rows: (seen.extend((row["epoch"], row["key"]) for row in rows), collate(self, rows))[1],
        )
        run_stage("distill", recipe)
    first = [key for epoch, key in seen if epoch == 0]
    assert len(first) == len(set(first)) == left
    told = (tmp_path / "out" / "skipped.txt").read_text()
    assert re.search(r"1 x corrupt image: 0/0003", told) and "1 x truncated shard: 1" in told


def test_dialogues_that_are_too_long_are_skipped_and_told(stages, tmp_path):
    (tmp_path / "d.jsonl").write_text(
        "\n".join(json.dumps({"turns": [text, "yes it is"]}) for text in ["rain " * 400, "a dog", "blue rain"])
    )
    recipe = {
        "model": {"checkpoint": str(stages / "integrate")},
        "data": {"train": str(tmp_path / "d.jsonl")},
        "collator": {"max_length": 100},
        "training": training_section(tmp_path / "out", per_device_train_batch_size=1, max_steps=3),
    }
    run_stage("tune", recipe)
    told = (tmp_path / "out" / "skipped.txt").read_text()
    assert re.search(r"1 x unusable dialogue: d:1 \(the system message, the newest turn", told)


def test_a_stage_trains_with_collators_of_ones_own(stages, tmp_path):
    """Beside the model is written which; and a checkpoint whose recipe has settings that are gone is trained on."""
    parent = shutil.copytree(stages / "integrate", tmp_path / "parent", ignore=shutil.ignore_patterns("checkpoint-*"))
    history = list(yaml.safe_load_all((parent / "recipe.yaml").read_text()))
    history[-1]["collator"] = {"caption_as_picture": True}
    (parent / "recipe.yaml").write_text(yaml.safe_dump_all(history))
    shard, lines = str(stages / "pairs.tar"), str(stages / "dialogues.jsonl")
    recipe = {
        "model": {"checkpoint": str(parent)},
        "objectives": {"knowledge_to_text": 0.5},
        "data": {"train": lines, "pairs": shard},
        "collator": {"max_length": 300, "other_caption": True},
        "training": training_section(tmp_path / "out", max_steps=1),
    }
    seen = []

    class WatchedPictures(PreTrainingCollator):
        def choose_pictures(self, examples, chosen, rngs):
            seen.append(("pictures", self.other_caption, len(examples), len(chosen), len(rngs)))
            return examples

    class NewestTurns(DialogueCollator):
        def choose_contexts(self, chats, rngs):
            seen.append(("contexts", self.max_length, len(chats), len(rngs)))
            return [chat[-2:] for chat in chats]

    run_stage("tune", recipe, {"pairs": WatchedPictures, "dialogues": NewestTurns})
    assert seen == [("pictures", True, 4, 4, 4), ("contexts", 300, 4, 4)]
    records = list(yaml.safe_load_all((tmp_path / "out" / "recipe.yaml").read_text()))
    assert records[:-1] == history
    assert records[-1]["collators"] == {"pairs": "WatchedPictures", "dialogues": "NewestTurns"}


@pytest.mark.parametrize(
    ("stage", "objectives", "data"),
    [
        ("distill", {}, "dialogues"),
        ("tune", {}, "pairs"),
        ("tune", {"knowledge_to_text": 1.0}, "pictures"),
        ("prefer", {}, "pairs"),
    ],
)
def test_a_collator_of_data_that_no_stage_reads_is_refused(stage, objectives, data, tmp_path):
    recipe = {
        "model": {"checkpoint": str(tmp_path / "nowhere")},
        "objectives": objectives,
        "data": {"train": "x", **({"pairs": "y"} if objectives else {})},
        "training": training_section(tmp_path),
    }
    with pytest.raises(ValueError, match=rf"collators of \['{data}'\], but '{stage}' .* reads"):
        run_stage(stage, recipe, {data: PreTrainingCollator})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without an accelerator")
@pytest.mark.parametrize(
    ("instructions", "bf16", "attention", "autocast", "dtype"),
    [
        ("AVX512", True, "eager", True, torch.bfloat16),
        ("AVX512", False, "sdpa", False, torch.bfloat16),
        ("AVX2", True, "sdpa", False, torch.float32),
    ],
)
def test_half_precision_on_a_cpu_is_used_as_it_is_fast_there(
    stages, tmp_path, monkeypatch, instructions, bf16, attention, autocast, dtype
):
    """PyTorch's fused attention has a slow backward pass in bfloat16; without AVX-512 all of bfloat16 is slow."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    (tmp_path / "d.jsonl").write_text(json.dumps({"turns": ["a dog", "blue rain"]}))
    recipe = {
        "model": {"checkpoint": str(stages / "integrate")},
        "data": {"train": str(tmp_path / "d.jsonl")},
        "training": training_section(tmp_path / "out", bf16=bf16),
    }
    seen = []

    def look(self, **_):
        parts = (self.model.language_model, self.model.iqformer.qformer)
        seen.extend(part.config._attn_implementation for part in parts)
        seen.extend((self.args.bf16, parts[0].dtype))

    monkeypatch.setattr(VikdfTrainer, "train", look)
    run_stage("tune", recipe)
    assert seen == [attention, attention, autocast, dtype]
    assert recipe["training"]["bf16"] == bf16, "the recipe is kept as it was written"


def test_a_stage_trains_on_cached_features(backbones, tmp_path):
    """The encoders are run once: the second time there is nothing to compute, and the result is the same."""
    shard = str(write_shard(tmp_path / "pairs.tar", pairs(8)))
    recipe = {
        "model": model_section(backbones),
        "objectives": {"text_image_matching": 1.0, "knowledge_to_text": 1.0},
        "data": {"train": shard, "validation": shard, "feature_cache": str(tmp_path / "cache"), "pool_grid": 2},
        "collator": {"image_knowledge_share": 0.5},
    }
    weights = []
    for name in ("first", "second"):
        metrics = run_stage("integrate", recipe | {"training": training_section(tmp_path / name)})
        assert {"eval_loss_text_image_matching", "eval_loss_knowledge_to_text"} <= set(metrics)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert sorted(path.name for path in (tmp_path / "cache" / "train").glob("*.safetensors")) == [
        "features-00000.safetensors"
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_pictures_are_masked_beside_cached_states(backbones, tmp_path):
    """They are seen anew, for the masked share alone; with all patch states the losses are those without a cache."""
    shard = str(write_shard(tmp_path / "pairs.tar", pairs(8)))
    losses = {}
    for name, data in (
        ("plain", {}),
        ("cached", {"feature_cache": str(tmp_path / "all")}),
        ("pooled", {"feature_cache": str(tmp_path / "some"), "pool_grid": 2}),
    ):
        recipe = {
            "model": model_section(backbones),
            "objectives": {"text_image_matching": 1.0, "masked_image": 1.0, "masked_text": 1.0},
            "data": {"train": shard, "validation": shard, **data},
            "collator": {"masked_share": 0.5},
        }
        training = training_section(tmp_path / name, learning_rate=0.0, seed=1)  # which masks something of both
        metrics = run_stage("distill", recipe | {"training": training})
        losses[name] = {key: value for key, value in metrics.items() if key.startswith("eval_loss_")}
    assert losses["cached"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["pooled"]["eval_loss_masked_image"] == pytest.approx(
        losses["plain"]["eval_loss_masked_image"], rel=1e-3
    )


def test_a_stage_goes_on_where_it_was_interrupted(backbones, tmp_path):
    """Started again by the same command; its streamed data go on too."""
    shards = [str(write_shard(tmp_path / f"{i}.tar", pairs(10)[5 * i : 5 * i + 5])) for i in range(2)]

    def stage(name, max_steps):
        recipe = {
            "model": model_section(backbones),
            "data": {"train": shards, "shuffle_buffer": 4},
            "training": training_section(tmp_path / name, max_steps=max_steps, lr_scheduler_type="constant"),
        }
        run_stage("distill", recipe)
        return load_file(tmp_path / name / "model.safetensors")

    whole = stage("whole", 6)
    stage("cut", 4)
    (tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").unlink()  # as a kill leaves it
    resumed = stage("cut", 6)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_command(backbones, tmp_path, capsys):
    """`vikdf distill --config tiny.yaml key=value`, the value in place of the recipe's."""
    shard = str(write_shard(tmp_path / "pairs.tar", pairs(4)))
    recipe = {
        "model": model_section(backbones),
        "data": {"train": "nowhere.tar", "validation": shard},
        "training": training_section(tmp_path / "out", max_steps=100, save_strategy="no"),
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    command = ["distill", "--config", str(tmp_path / "tiny.yaml")]
    main([*command, f"data.train={shard}", "max_steps=2", "learning_rate=1e-3", "objectives.masked_text=1e-1"])
    metrics = json.loads(capsys.readouterr().out[-2000:].rpartition("\n{")[2].join(["{", ""]))
    assert set(metrics) >= {"eval_loss", "eval_loss_masked_text"} and "eval_loss_masked_image" not in metrics
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2
    for override, message in (
        ("data.trian=x", "Unknown keys"),
        ("max_steps", "Expected section.key=value"),
        ("data.train=nowhere.tar", "nowhere.tar"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*command, override])
