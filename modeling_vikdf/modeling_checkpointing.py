"""Gradient checkpointing of a frozen LLM: its layers keep only their input and are recomputed in the backward pass.

transformers' own switch has no effect on layers in evaluation mode, as a frozen LLM's always are, and it disables
reading the cache of earlier tokens. This module finds the layers with the switch on, and applies it in a context.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpointed_layers(language_model: nn.Module) -> list[nn.Module]:
    """
    The LLM's layers for which gradient checkpointing is enabled.

    Raises:
        ValueError: if it is enabled, but no layer supports it.
    """
    if getattr(language_model.base_model, "gradient_checkpointing", None) is False:
        return []  # the switch sets all modules that have it, so that one of them answers for the others
    modules = [part for part in language_model.modules() if getattr(part, "gradient_checkpointing", False)]
    layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    if modules and not layers:
        raise ValueError(
            f"Gradient checkpointing is enabled, but {type(language_model).__name__} has no layers of "
            "transformers' GradientCheckpointingLayer, so it would do nothing in the LLM: disable it."
        )
    return layers


def unwritten_cache(language_model: PreTrainedModel) -> "ReadOnlyCache | None":
    """An empty cache that stays empty; `None` for linear attention, which overwrites the states in its cache."""
    layers = DynamicCache(config=language_model.config.get_text_config(decoder=True)).layers
    return ReadOnlyCache(layers) if all(isinstance(layer, DynamicLayer) for layer in layers) else None


@contextlib.contextmanager
def checkpointing(layers: list[GradientCheckpointingLayer]) -> Iterator[None]:
    """
    Within this context the layers keep no activations but their input.

    By themselves they checkpoint in training mode only, which has dropout and is never used for a frozen LLM, and
    they would not read the cache of earlier tokens.
    """
    own = {layer: vars(layer).get("forward") for layer in layers}  # set on the instance, by accelerate for example
    for layer in layers:
        layer.forward = functools.partial(_checkpoint, layer._gradient_checkpointing_func, layer.forward)
    try:
        yield
    finally:
        for layer, forward in own.items():
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _checkpoint(checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(functools.partial(forward, **kwargs), *args)  # reentrant checkpointing takes no keywords


class ReadOnlyCache(Cache):
    """
    A cache that is read but never written, so that a recomputed layer finds it unchanged.

    With an empty one the LLM copies no keys and values, and needs not ask positions whether they are those of several
    sequences in a row.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, heads, P + T, d_head] of the cached and the new tokens; the cache keeps the old ones."""
        if not self.layers[layer_idx].get_seq_length():
            return key_states, value_states
        return copy.copy(self.layers[layer_idx]).update(key_states, value_states, *args, **kwargs)


__all__ = ["ReadOnlyCache", "checkpointed_layers", "checkpointing", "unwritten_cache"]
