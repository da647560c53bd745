"""The same steps of training on one process or several, by DDP and by FSDP2; what test_training.py compares.

Example run: torchrun --nproc_per_node 2 tests/distributed_training.py FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from packaging.version import Version
from safetensors.torch import save_file
from tiny_training import ALL, dialogues, logged_losses, make_trainer, mixed, pairs, trained_weights

from modeling_vikdf.training.stages import run_stage


BATCH, STEPS = 8, 2
# name -> objectives (`None`: dialogues), number of accumulated micro-batches
RUNS = {"all": (ALL, 2), "dialogues": (None, 2), "preferences": ("preferences", 2)}
# older ones ask torch for the device "cpu:0" when they load an optimizer in one of several processes on a CPU
RESTORES_ON_CPUS = Version(transformers.__version__) >= Version("5.23")
WRAPPED = ["Qwen2DecoderLayer", "Dinov2Layer", "BertLayer", "Blip2QFormerLayer"]
KINDS = {
    "ddp": {"ddp_backend": "gloo"},
    "fsdp2": {
        "ddp_backend": "gloo",
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": WRAPPED},
    },
}


def shard_on_cpus() -> None:
    """accelerate shards nothing on CPUs, though torch does: let it take them for what it shards on."""
    initialise = AcceleratorState.__init__

    def as_on_gpus(self, *args, fsdp_plugin=None, **kwargs):
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)

    AcceleratorState.__init__ = as_on_gpus


def steps(name: str, folder: Path, **kwargs: Any) -> dict[str, Any]:
    """The losses of each step and of an evaluation, and the weights, for `BATCH` examples whatever the processes."""
    objectives, accumulated = RUNS[name]
    world = dist.get_world_size() if dist.is_initialized() else 1
    trainer = make_trainer(
        folder,
        objectives,
        evaluation={"all": pairs, "dialogues": dialogues, "preferences": mixed}[name](8),
        per_device_train_batch_size=BATCH // world // accumulated,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=accumulated,
        max_steps=STEPS,
        optim="sgd",  # Adam would divide tiny gradients by themselves, and blow up what rounding does to them
        max_grad_norm=0,
        **kwargs,
    )
    trainer.train()
    wrapper = type(trainer.model_wrapped).__name__
    metrics = {key: value for key, value in trainer.evaluate().items() if key.startswith("eval_loss")}
    weights = trained_weights(trainer.model)
    return {"wrapper": wrapper, "losses": logged_losses(trainer), "metrics": metrics, "weights": weights}


def resumed(name: str, folder: Path, **kwargs: Any) -> float:
    """The largest difference of any weight between a run and one that goes on from a checkpoint of it."""
    objectives, accumulated = RUNS[name]
    weights = []
    for checkpoint in (None, str(folder / "checkpoint-1")):
        trainer = make_trainer(
            folder,
            objectives,
            dropout=0.1,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
            **kwargs,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        weights.append(trained_weights(trainer.model))
    return max(float((value - weights[1][key]).abs().max()) for key, value in weights[0].items())


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    metrics = run_stage("distill", json.loads((folder / "recipe.json").read_text()))
    if dist.get_rank() == 0:
        (folder / "stage.json").write_text(json.dumps(metrics))
    shard_on_cpus()
    for kind, settings in KINDS.items():
        for name in RUNS:
            result = steps(name, folder / kind / name, **settings)
            if kind == "fsdp2" or RESTORES_ON_CPUS:
                result["resumed"] = resumed(name, folder / kind / name, **settings)
            if dist.get_rank() == 0:
                save_file(result.pop("weights"), folder / f"{kind}-{name}.safetensors")
                (folder / f"{kind}-{name}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    os._exit(0)  # all is written; at an ordinary end a thread of gloo's aborts the process now and then
