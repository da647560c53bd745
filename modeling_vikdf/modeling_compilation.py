"""Compiled decoding: caches of few sizes, so that what was compiled and recorded for one chat serves the next.

    prompts, new tokens -> `next_size`: rows and length, rounded up
                        -> `StaticCaches.borrow`: an empty cache of that size, at the address that it had before
                        -> transformers compiles the decoding step; `pad_rows` fills the rows that are no prompt's
    `warm_up` does all of it once, before anybody waits.
    `compile_layers` is for training, where prompts have any length and gradients flow.

transformers compiles by itself where it decodes on a static cache on a GPU; the rest, and what a compiled step costs,
follows from sizes that change: a new graph for two or three of them, a new recording of its kernels for each.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from transformers import CompileConfig, MaxLengthCriteria, PreTrainedModel, StaticCache, StoppingCriteriaList
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.logging import tqdm


SHORTEST = 256  # tokens of the smallest cache; longer ones double it
WARM_UP_TOKENS = 4  # the first step compiles, the second records its kernels
KEPT_TOKENS = 32_768  # of all caches that wait for the next chat of their size, padding included


def next_size(size: int, smallest: int = 1) -> int:
    """The smallest power of two times `smallest` that is not below `size`."""
    while smallest < size:
        smallest *= 2
    return smallest


def pad_rows(tensor: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """A tensor [B, ...] with its last row repeated up to `rows` rows; `None` for none."""
    if tensor is None or len(tensor) >= rows:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])])


def keep_rows(outputs: ModelOutput, rows: int) -> ModelOutput:
    """A model's outputs without the rows behind the first ones; copied, for the next step may reuse their memory."""
    return change_rows(outputs, lambda tensor: tensor[:rows].clone())


def change_rows(outputs: ModelOutput, change: Callable[[torch.Tensor], torch.Tensor]) -> ModelOutput:
    """A model's outputs, whose logits and hidden states have other rows."""
    outputs.logits = change(outputs.logits)
    if outputs.hidden_states is not None:
        states = outputs.hidden_states
        outputs.hidden_states = tuple(state if state is None else change(state) for state in states)
    return outputs


def selects_outputs(forward: Callable) -> Callable:
    """
    Decorates a model's `forward` to return only some of its outputs.

    It takes `rows`, behind which the batch is padding; or `placed`, the indices of its rows in a larger batch, and
    that one's size: outputs are 0 in the others. As `output_hidden_states` it also takes a list of those to keep;
    `None` stands for the others. transformers takes such a list, too, but numbers the states otherwise before 5.23.
    """

    @functools.wraps(forward)
    def select(
        self: Any, *args: Any, rows: int | None = None, placed: tuple[torch.Tensor, int] | None = None, **kwargs: Any
    ) -> ModelOutput:
        if listed := isinstance(kept := kwargs.get("output_hidden_states"), list):
            kwargs["output_hidden_states"] = True
        outputs = forward(self, *args, **kwargs)
        if listed:
            states = enumerate(outputs.hidden_states)
            outputs.hidden_states = tuple(state if index in kept else None for index, state in states)
        if placed is not None:
            return change_rows(outputs, lambda tensor: _place(tensor, *placed))
        return outputs if rows is None else keep_rows(outputs, rows)

    return select


def _place(tensor: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    """A tensor [r, ...] at the given rows [r] of a batch [size, ...], in which all else is 0."""
    return tensor.new_zeros(size, *tensor.shape[1:]).index_copy_(0, rows, tensor)


class StaticCaches:
    """
    Static caches, kept from one generation to the next, because kernels are recorded with their addresses.

    Those that nobody uses hold `KEPT_TOKENS` tokens at most; the ones that waited longest go first.
    """

    def __init__(self):
        self._waiting: dict[tuple, StaticCache] = {}

    @contextmanager
    def borrow(self, language_model: PreTrainedModel, rows: int, length: int) -> Iterator[StaticCache]:
        """An empty cache for `rows` rows of `length` tokens; no other thread has it meanwhile."""
        size = (rows, length, language_model.dtype, language_model.device)
        cache = self._waiting.pop(size, None)
        if cache is None:
            config = language_model.config.get_text_config(decoder=True)
            cache = StaticCache(config=config, max_cache_len=length)
        cache.reset()
        yield cache
        self._waiting[size] = cache
        while sum(size[0] * size[1] for size in self._waiting) > KEPT_TOKENS and len(self._waiting) > 1:
            del self._waiting[next(iter(self._waiting))]


def compile_config_for(model: PreTrainedModel, compile: bool | CompileConfig) -> CompileConfig | None:
    """
    How the decoding steps of a model are compiled; `None` if they are not.

    Args:
        model: a `VikdfForConditionalGeneration`.
        compile: whether to compile, or how; `True` leaves that to transformers.

    Raises:
        ValueError: if the LLM does not decode on a static cache, or cannot be compiled.
    """
    if not compile:
        return None
    if not can_compile(model):
        raise ValueError(
            f"compile=True, but {type(model.language_model).__name__} cannot be compiled: transformers has no static "
            "cache for it, or its quantisation or offloading forbids it. Leave compile out."
        )
    config = CompileConfig() if compile is True else copy.copy(compile)
    config._compile_all_devices = True  # transformers has no public name for it, and skips a CPU otherwise
    return config


def compile_layers(language_model: PreTrainedModel, **how: Any) -> None:
    """
    Compiles each of an LLM's layers, in place; they share one graph, and hooks and checkpointing stay outside of it.

    Args:
        language_model: the LLM.
        how: for `torch.compile`.

    Raises:
        ValueError: if it has no layers of transformers' `GradientCheckpointingLayer`.
    """
    layers = [part for part in language_model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"torch_compile would do nothing: {type(language_model).__name__} has no layers of transformers' "
            "GradientCheckpointingLayer. Leave it out."
        )
    for layer in layers:
        layer.forward = torch.compile(layer.forward, **how)
    language_model.layers_are_compiled = True


def has_compiled_layers(language_model: PreTrainedModel) -> bool:
    """Whether `compile_layers` has compiled the LLM's layers."""
    return getattr(language_model, "layers_are_compiled", False)


def can_compile(model: PreTrainedModel) -> bool:
    """Whether the model's decoding steps can be compiled, on any device."""
    language_model = model.language_model
    quantizer = getattr(language_model, "hf_quantizer", None)
    devices = {str(device) for device in getattr(language_model, "hf_device_map", {}).values()}
    offloaded = len(devices) > 1 and devices & {"cpu", "disk"}
    static = language_model._can_compile_fullgraph  # what transformers' models declare
    return static and not offloaded and (quantizer is None or quantizer.is_compileable)


def compiles_by_default(model: PreTrainedModel) -> bool:
    """Whether commands compile without being asked: on CUDA, where it makes replies several times as fast."""
    return model.device.type == "cuda" and can_compile(model)


def warm_up(
    model: PreTrainedModel,
    processor: Any,
    batches: Sequence[int],
    compile_config: CompileConfig,
    max_tokens: int | None = None,
) -> None:
    """
    Replies to a short chat in all ways that batches differ in, so that nothing is left to compile.

    Args:
        model: a `VikdfForConditionalGeneration`.
        processor: its own processor.
        batches: numbers of chats that are answered together.
        compile_config: from [`compile_config_for`].
        max_tokens: the most that a cache may hold, rows times length.
    """
    config = model.generation_config
    ways = [{"num_candidates": 1, "num_beams": 1}]
    number = getattr(config, "num_candidates", None) or 1
    if number > 1 and config.do_sample and (config.num_beams or 1) == 1:
        ways.append({"num_candidates": number, "processor": processor})
    # lengths change with rows, so that both are soon compiled as variables
    sizes = list(product(ways, batches, (SHORTEST, 2 * SHORTEST)))
    if max_tokens is not None:
        sizes = [size for size in sizes if next_size(size[0]["num_candidates"] * size[1]) * size[2] <= max_tokens]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        for way, rows, length in tqdm(sizes, desc="Compiling", unit=" sizes"):
            inputs = processor([[{"role": "user", "content": "Hello"}]] * rows).to(model.device)
            prompt = inputs["input_ids"].shape[1]
            model.generate(
                **inputs,
                **way,
                cache_implementation="static",
                compile_config=compile_config,
                max_new_tokens=max(length - prompt, WARM_UP_TOKENS),
                stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(prompt + WARM_UP_TOKENS)]),
            )


__all__ = [
    "StaticCaches",
    "can_compile",
    "change_rows",
    "compile_config_for",
    "compile_layers",
    "compiles_by_default",
    "has_compiled_layers",
    "keep_rows",
    "next_size",
    "pad_rows",
    "selects_outputs",
    "warm_up",
]
