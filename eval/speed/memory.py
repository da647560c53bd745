"""What a training step at the paper's shapes takes of a GPU's memory, without one: fake tensors, their bytes counted.

The step is that of a GPU: the LLM and the encoders in bfloat16, both directions in one pass. Counted is what tensors
hold at once, not what an allocator keeps beside it. The optimizer is AdamW in float32.

Example run (a few minutes on one core; the model takes no memory):
    python eval/speed/memory.py --output eval/results/memory.json
"""

import argparse
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # there is no public name for it
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaModel

from modeling_vikdf import modeling_prefix
from modeling_vikdf.benchmark_shapes import SHAPES, Shapes, training_batch, training_model, training_step
from modeling_vikdf.configuration_vikdf import OBJECTIVES
from modeling_vikdf.environment import versions
from modeling_vikdf.modeling_compilation import compile_layers


RESULTS = Path(__file__).parents[1] / "results"
LAYER_TOKENS = 8


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations inside the context make, as long as anything refers to it."""

    def __init__(self):
        super().__init__()
        self.storages, self.live, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self._add(output.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self.storages:
            return
        self.storages.add(id(storage))
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, id(storage), storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self.storages.remove(key)
        self.live -= size


def step_memory(shapes: Shapes, rows: int, checkpointing: bool = False) -> dict[str, float]:
    """
    Memory in GB (10^9 bytes) of a training step of all five objectives that encodes captions and pictures.

    Args:
        shapes: of the model.
        rows: pairs in the batch.
        checkpointing: whether with gradient checkpointing.

    Returns:
        `weights`, frozen and trained; `peak` of forward and backward pass, these, the batch and gradients among it;
        `optimizer`, the two moments of what is trained, which come on top.
    """
    # a CPU's fused attention, which keeps what a GPU's does, has no dropout
    shapes = replace(shapes, iqformer=shapes.iqformer | {"attention_probs_dropout_prob": 0.0})
    model = training_model(shapes, OBJECTIVES, torch.bfloat16, "meta")
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    batch = training_batch(model.config, rows)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, LiveBytes() as memory:
        batch = {name: fake.from_tensor(tensor) + 0 for name, tensor in batch.items()}  # counted as made here
        before = memory.live
        model = model.to_empty(device="cpu")
        model.language_model.tie_weights()
        weights = memory.live - before
        training_step(model, batch)
    return {"weights": weights / 1e9, "peak": memory.peak / 1e9, "optimizer": 2 * 4 * trained / 1e9}


def kept_by_layer(shapes: Shapes, compiled: bool) -> float:
    """Bytes that one frozen layer of the LLM keeps of a token for its backward pass, in bfloat16."""
    config = LlamaConfig(**shapes.llm | {"num_hidden_layers": 1, "vocab_size": 8})
    with torch.device("meta"):
        model = LlamaModel(config)
    model = model.to(torch.bfloat16).requires_grad_(False).to_empty(device="cpu")
    if compiled:
        compile_layers(model, backend="aot_eager")  # which divides forward from backward as the default does
    embeds = torch.zeros(1, LAYER_TOKENS, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    layer = model.layers[0]
    positions = model.rotary_emb(embeds, torch.arange(LAYER_TOKENS)[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = embeds + 0
        layer(states, position_embeddings=positions)
    shared = {tensor.untyped_storage().data_ptr() for tensor in positions}
    return sum(size for key, (size, _) in kept.items() if key not in shared) / LAYER_TOKENS


def main() -> None:
    """Prints the figures, and writes them."""
    parser = argparse.ArgumentParser(description="Memory of a training step, computed without a GPU.")
    parser.add_argument("--shapes", choices=SHAPES, default="paper")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    args = parser.parse_args()

    modeling_prefix.WORTH_APART.clear()  # as on a GPU
    shapes = SHAPES[args.shapes]
    settings = {"one_pass": {}, "gradient_checkpointing": {"checkpointing": True}}
    report: dict[str, Any] = {
        "memory": {
            name: {f"batch_{rows}": step_memory(shapes, rows, **setting) for rows in args.batches}
            for name, setting in settings.items()
        },
        "bytes_per_token_and_layer": {
            name: kept_by_layer(shapes, compiled) for name, compiled in (("eager", False), ("torch_compile", True))
        },
        "shapes": args.shapes,
    }
    text = json.dumps(report | {"versions": versions()}, indent=1)
    print(text)
    args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
