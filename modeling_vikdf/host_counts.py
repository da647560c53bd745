"""What a call asks of the host: operations, waits for a device, parameters walked over. No other load changes counts.

A GPU is waited for wherever the host reads a tensor's values (`item`) or makes a tensor whose size depends on them
(`nonzero`), and it idles wherever the host starts operations more slowly than they run. All this can be counted on a
CPU, with tiny layers, for none of it depends on their widths.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")  # with a mask they look for its nonzero elements


class _Operations(TorchDispatchMode):
    """Counts the operations that run inside the context, those of the backward pass among them."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name().partition(".")[0]
        masked = name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.counts["aten_ops"] += 1
        self.counts["launches"] += not func.is_view
        self.counts["item"] += name == "aten::_local_scalar_dense"
        self.counts["nonzero"] += masked or name in ("aten::nonzero", "aten::masked_select")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _walked_parameters() -> Iterator[list[int]]:
    """Inside the context counts the parameters that modules' `parameters` and `named_parameters` give out."""
    walked, original = [0], nn.Module.named_parameters

    def counting(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for parameter in original(*args, **kwargs):
            walked[0] += 1
            yield parameter

    nn.Module.named_parameters = counting
    try:
        yield walked
    finally:
        nn.Module.named_parameters = original


def count_host_work(call: Callable[[], Any]) -> dict[str, int]:
    """
    Counts what a call asks of the host. Call it once before: what runs only the first time is not meant.

    Returns:
        `aten_ops`; `launches`, those that are no views; `item` and `nonzero`, which wait for a GPU; `parameters`, how
        many were walked over.
    """
    with _walked_parameters() as walked, _Operations() as operations:
        call()
    names = ("aten_ops", "launches", "item", "nonzero")
    return {name: operations.counts[name] for name in names} | {"parameters": walked[0]}


def count_python_calls(call: Callable[[], Any]) -> int:
    """Counts the calls of Python functions and of C functions from Python."""
    calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return calls


__all__ = ["count_host_work", "count_python_calls"]
