"""Gradient checkpointing of a frozen LLM: its layers keep their input alone and are computed again for the gradient.

transformers' own switch does nothing for layers in evaluation mode, which a frozen LLM is always in, and leaves the
cache of what comes before unread. Here are the layers that it is switched on for, and a context in which they obey.
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
    The LLM's layers that are computed again in the backward pass: those for which gradient checkpointing is on.

    Raises:
        ValueError: if it is on, but no layer supports it.
    """
    modules = [part for part in language_model.modules() if getattr(part, "gradient_checkpointing", False)]
    layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    if modules and not layers:
        raise ValueError(
            f"Gradient checkpointing is enabled, but {type(language_model).__name__} has no layers of "
            "transformers' GradientCheckpointingLayer, so it would do nothing in the LLM: disable it."
        )
    return layers


def rereads_its_cache(language_model: PreTrainedModel) -> bool:
    """Whether a layer of the LLM can be computed twice from one cache; linear attention writes its states over."""
    layers = DynamicCache(config=language_model.config.get_text_config(decoder=True)).layers
    return all(isinstance(layer, DynamicLayer) for layer in layers)


@contextlib.contextmanager
def checkpointing(layers: list[GradientCheckpointingLayer]) -> Iterator[None]:
    """
    Within, these layers keep no activations but their input. By themselves they do so in training mode alone, which
    has dropout, and which a frozen LLM is never in; and they would leave the cache of what comes before unread.
    """
    own = {layer: vars(layer).get("forward") for layer in layers}  # one that is in the way, such as accelerate's
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
    return checkpoint(functools.partial(forward, **kwargs), *args)  # the reentrant kind takes no keyword arguments


class ReadOnlyCache(Cache):
    """A cache that is read but never written to, so that a layer that is computed again finds it as it was."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return copy.copy(self.layers[layer_idx]).update(key_states, value_states, *args, **kwargs)


__all__ = ["ReadOnlyCache", "checkpointed_layers", "checkpointing", "rereads_its_cache"]
