"""The filters of several convs in one launch, on a GPU.

A detector at one image per GPU waits for its host, which starts thousands of small kernels: on an
H200, R-50 Mask R-CNN computes for 28 of 75 ms. There a launch for every conv and direction, small
as it is, makes a step of GN+WS a quarter longer than one of GN. So the first conv of a group that
is called in a forward standardizes the filters of all.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from .standardize import (
    differentiable_gradient,
    from_rows,
    in_memory_order,
    in_one_piece,
    triton_kernels_for,
)

# As DistributedDataParallel's own buckets, so that gradients leave while the backward goes on:
# those of one launch are there all at once.
LAUNCH_BYTES = 25 * 2**20

Tables = dict[tuple[int, ...], Any]
"""Addresses of the weights of a launch -> their `FilterTable`."""


class _Ready(NamedTuple):
    weight: torch.Tensor
    version: int
    address: int
    settings: tuple[float, str]
    standardized: torch.Tensor


class LaunchGroup:
    """Convs that are usually called one after the other, each once, in every forward.

    They join by being called, so the group knows their order, and its first one begins a forward:
    it standardizes the filters of all, which the others then take. What is wrong for a conv is
    never taken: it then standardizes its own filters, as it does outside a group. That is so where
    its weight was written to in between, and where it is called again. A conv whose filters nobody
    took leaves the group until it is called again.

    The gradients of one launch, of `LAUNCH_BYTES` or less, reach the weights together.

    Never copied and never saved: a copied model starts with an empty group.
    """

    def __init__(self) -> None:
        self._members: list[weakref.ref] = []
        self._ready: dict[int, _Ready] = {}
        self._tables: Tables = {}

    def __reduce__(self) -> tuple[type, tuple]:
        return LaunchGroup, ()

    def take(self, conv: Any) -> Optional[torch.Tensor]:
        """The standardized filters of a conv for one call, in the graph of autograd.

        Args:
            conv: a `WSConv2d` whose weight needs a gradient.

        Returns:
            (O, I/g, kh, kw), or None: the conv has to standardize by itself.
        """
        weight, settings = conv.weight, (conv.ws_eps, conv.ws_mode)
        if not _can_join(weight):
            return None
        ready = self._ready.pop(id(conv), None)
        if ready is not None and _fits(ready, weight, settings):
            return ready.standardized
        members = [member for member in (ref() for ref in self._members) if member is not None]
        trained = [member for member in members if member.weight.requires_grad]
        if not trained or trained[0] is not conv:
            if all(member is not conv for member in members):
                self._members.append(weakref.ref(conv))
            return None
        # what is still ready was not called in the last forward
        called = [member for member in members if id(member) not in self._ready]
        self._members = [weakref.ref(member) for member in called]
        self._launch(conv, called, settings)
        return self._ready.pop(id(conv)).standardized

    def _launch(self, first: Any, convs: list, settings: tuple[float, str]) -> None:
        """Makes ready what can share a launch with the first conv, itself included."""
        weights = {
            id(conv): conv.weight
            for conv in convs
            if (conv.ws_eps, conv.ws_mode) == settings
            and conv.weight.requires_grad
            and conv.weight.device == first.weight.device
            and _can_join(conv.weight)
        }
        results, self._tables = standardize_together(
            list(weights.values()), *settings, self._tables
        )
        self._ready = {
            name: _Ready(weight, weight._version, weight.data_ptr(), settings, result)
            for (name, weight), result in zip(weights.items(), results)
        }


def standardize_together(
    weights: Sequence[torch.Tensor], eps: float, mode: str, tables: Tables
) -> tuple[list[torch.Tensor], Tables]:
    """`standardize_weight` of several weights in few launches.

    Args:
        weights: float32, on one GPU, each in one piece.
        eps, mode: of `standardize_weight`.
        tables: of the last call; what it says of weights that lie where they lay is used again.

    Returns:
        W_hat of every weight, and the tables.
    """
    kernels = triton_kernels_for(weights[0])
    assert kernels is not None
    results: list[torch.Tensor] = []
    used: Tables = {}
    for part in _launches(weights):
        addresses = tuple(weight.data_ptr() for weight in part)
        used[addresses] = tables.get(addresses) or kernels.FilterTable(part)
        results += _StandardizeTogether.apply(used[addresses], eps, mode, *part)
    return results, used


class _StandardizeTogether(torch.autograd.Function):
    """`standardize_weight` of several weights.

    Graphs that share nothing but this launch may be gone through one after the other, so nothing is
    saved by `save_for_backward`, which the first of them would free.
    """

    @staticmethod
    def forward(
        ctx: Any, table: Any, eps: float, mode: str, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        result, statistics = table.forward(eps, mode)
        ctx.weights, ctx.versions = weights, [weight._version for weight in weights]
        ctx.table, ctx.statistics, ctx.eps, ctx.mode = table, statistics, eps, mode
        ctx.set_materialize_grads(False)
        return tuple(
            from_rows(part, weight) for part, weight in zip(result.split(table.sizes), weights)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Optional[torch.Tensor]) -> tuple[Any, ...]:
        weights = ctx.weights
        for weight, version in zip(weights, ctx.versions):
            if weight._version != version:
                raise RuntimeError(
                    f"a WS weight of shape {list(weight.shape)} was modified by an inplace "
                    f"operation after the forward: it is at version {weight._version}, the "
                    f"backward needs version {version}"
                )
        if torch.is_grad_enabled():  # asked to be differentiated again
            results = [
                None if g is None else differentiable_gradient(weight, g, ctx.eps, ctx.mode)
                for g, weight in zip(gradients, weights)
            ]
            return None, None, None, *results
        rows = [
            weight.new_zeros(weight.numel()) if g is None else in_memory_order(g, weight)
            for g, weight in zip(gradients, weights)
        ]
        parts = ctx.table.backward(torch.cat(rows), ctx.statistics).split(ctx.table.sizes)
        results = [
            None if g is None else from_rows(part, weight)
            for g, part, weight in zip(gradients, parts, weights)
        ]
        return None, None, None, *results


def _can_join(weight: Any) -> bool:
    """An ordinary parameter that the kernels take; not what sharding or `torch.func` put there."""
    return (
        type(weight) is nn.Parameter
        and in_one_piece(weight)
        and triton_kernels_for(weight) is not None
    )


def _fits(ready: _Ready, weight: torch.Tensor, settings: tuple[float, str]) -> bool:
    return (
        ready.weight is weight
        and ready.version == weight._version
        and ready.address == weight.data_ptr()
        and ready.settings == settings
    )


def _launches(weights: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """In order, as many together as `LAUNCH_BYTES` hold, and at least one."""
    part: list[torch.Tensor] = []
    held = 0
    for weight in weights:
        size = weight.numel() * weight.element_size()
        if part and held + size > LAUNCH_BYTES:
            yield part
            part, held = [], 0
        part.append(weight)
        held += size
    if part:
        yield part
