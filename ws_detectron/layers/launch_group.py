"""The filters of several convs in one launch, on a GPU.

A detector at one image per GPU waits for its host, which starts thousands of small kernels. There a
launch for every conv and direction, small as it is, makes a step of GN+WS a quarter longer than one
of GN (R-50 on an H200, results/benchmark). So the first conv of a group that is called in a forward
standardizes the filters of all.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from .reuse import address
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

_MOST_TABLES = 64
_graph_task: Any = getattr(torch._C, "_current_graph_task_id", None)

Tables = dict[tuple, Any]
"""Where the weights of a launch lie, and their shapes -> their `FilterTable`."""


class _Ready(NamedTuple):
    weight: torch.Tensor
    state: tuple
    standardized: torch.Tensor


class LaunchGroup:
    """Convs that are usually called in one forward, each once.

    They join by being called. The first one that is called in a forward standardizes the filters of
    all, and the others take theirs. A forward ends with a backward through it, or where the conv
    that began it is called again. A conv standardizes its own filters, as it does outside a group,
    where it is called again in the same forward, or where its weight or the settings have changed
    since the launch. One change is not seen: a write in place by `.data`, which leaves no trace, by
    a hook within the forward, or between two forwards without a backward. A conv whose filters
    nobody took leaves the group until it is called again.

    Gradients come as those of single convs do, but for this: those of one launch, of `LAUNCH_BYTES`
    or less, reach their weights together, and lie in one piece of memory, which is freed when none
    of them is kept. What waits for them at autograd's accumulators is called for all weights of a
    launch, also for those without a gradient. So under DistributedDataParallel, the graphs of one
    launch have to be gone through by one backward.

    Never copied and never saved: a copied model starts with an empty group.
    """

    def __init__(self) -> None:
        self._members: list[weakref.ref] = []
        self._ready: dict[int, _Ready] = {}
        self._first: Optional[weakref.ref] = None
        self._missed: frozenset[int] = frozenset()
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
        ready = self._ready.pop(id(conv), None)
        if _should_wait(conv.weight):
            return None
        if ready is not None and ready.weight is conv.weight and ready.state == _state(conv):
            return ready.standardized
        if not _can_join(conv.weight):
            return None
        members = self._living_members()
        if all(member is not conv for member in members):
            self._members.append(weakref.ref(conv))
            return None
        first: Any = None if self._first is None else self._first()
        begun = any(member is first for member in members) and first.weight.requires_grad
        if begun and first is not conv:
            return None
        self.end_forward()
        members = [m for m in members if m is conv or id(m) not in self._missed]
        self._members = [weakref.ref(member) for member in members]
        return self._launch(conv, members)

    def end_forward(self) -> None:
        """What has not been taken is stale now, and the next conv begins another forward."""
        self._missed |= self._ready.keys()
        self._ready, self._first = {}, None

    def _living_members(self) -> list:
        members = (ref() for ref in self._members)
        return [m for m in members if m is not None and m.__dict__.get("_launch_group") is self]

    def _launch(self, first: Any, convs: list) -> torch.Tensor:
        """Standardizes what can share a launch with the first conv, and returns what is its own."""
        convs = [
            conv
            for conv in convs
            if _can_join(conv.weight)
            and conv.weight.requires_grad
            and conv.weight.device == first.weight.device
            and (conv.ws_eps, conv.ws_mode) == (first.ws_eps, first.ws_mode)
        ]
        results = standardize_together(
            [conv.weight for conv in convs], first.ws_eps, first.ws_mode, self._tables, self
        )
        ready = {
            id(conv): _Ready(conv.weight, _state(conv), result)
            for conv, result in zip(convs, results)
        }
        own = ready.pop(id(first))
        self._first, self._missed, self._ready = weakref.ref(first), frozenset(), ready
        return own.standardized


def standardize_together(
    weights: Sequence[torch.Tensor],
    eps: float,
    mode: str,
    tables: Tables,
    group: Optional[LaunchGroup] = None,
) -> list[torch.Tensor]:
    """`standardize_weight` of several weights in few launches.

    Args:
        weights: float32, on one GPU, each in one piece.
        eps, mode: of `standardize_weight`.
        tables: of earlier calls, to be used again for weights that lie where they lay; new ones are
            added.
        group: is told when a backward goes through it.

    Returns:
        W_hat of every weight.
    """
    results: list[torch.Tensor] = []
    if len(tables) > _MOST_TABLES:  # weights that get other memory all the time
        tables.clear()
    for part in _launches(weights):
        places = _places(part)
        if places not in tables:
            tables[places] = _table(part)
        results += _StandardizeTogether.apply(
            None if group is None else weakref.ref(group), tables[places], places, eps, mode, *part
        )
    return results


class _StandardizeTogether(torch.autograd.Function):
    """`standardize_weight` of several weights.

    Graphs that share nothing but this launch may be gone through one after the other, so nothing is
    saved by `save_for_backward`, which the first of them would free.
    """

    @staticmethod
    def forward(
        ctx: Any,
        group: Optional[weakref.ref],
        table: Any,
        places: tuple,
        eps: float,
        mode: str,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        result, statistics = table.forward(eps, mode)
        ctx.weights, ctx.versions = weights, [weight._version for weight in weights]
        ctx.table, ctx.places, ctx.statistics = table, places, statistics
        ctx.group, ctx.eps, ctx.mode = group, eps, mode
        ctx.set_materialize_grads(False)
        return tuple(
            from_rows(part, weight) for part, weight in zip(result.split(table.sizes), weights)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Optional[torch.Tensor]) -> tuple[Any, ...]:
        weights = ctx.weights
        for g, weight, version in zip(gradients, weights, ctx.versions):
            if g is not None and weight._version != version:
                raise RuntimeError(
                    f"a WS weight of shape {list(weight.shape)} was modified by an inplace "
                    f"operation after the forward: it is at version {weight._version}, the "
                    f"backward needs version {version}"
                )
        group = None if ctx.group is None else ctx.group()
        if group is not None:
            group.end_forward()
        if torch.is_grad_enabled():  # asked to be differentiated again
            results = [
                None if g is None else differentiable_gradient(weight, g, ctx.eps, ctx.mode)
                for g, weight in zip(gradients, weights)
            ]
            return None, None, None, None, None, *results
        table, places = ctx.table, _places(weights)
        if places != ctx.places:
            # the same values may have got other memory, as in sharded training between the passes
            _check_shapes(places, ctx.places)
            table = _table(weights)
        rows = [
            weight.new_zeros(weight.numel()) if g is None else in_memory_order(g, weight)
            for g, weight in zip(gradients, weights)
        ]
        parts = table.backward(torch.cat(rows), ctx.statistics).split(table.sizes)
        results = [
            None if g is None else from_rows(part, weight)
            for g, part, weight in zip(gradients, parts, weights)
        ]
        return None, None, None, None, None, *results


def _check_shapes(places: tuple, before: tuple) -> None:
    for (_, *found), (_, *expected) in zip(places[1:], before[1:]):
        if found != expected:
            raise RuntimeError(
                f"a WS weight got another shape or memory format after the forward: {[*found[0]]} "
                f"with strides {[*found[1]]}; it was {[*expected[0]]} with {[*expected[1]]}"
            )


def _can_join(weight: Any) -> bool:
    """An ordinary parameter that the kernels take; not what a parametrization or sharding made.

    A hook on a weight would be called without a gradient where its filters were not used.
    """
    return (
        type(weight) is nn.Parameter
        and in_one_piece(weight)
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
        and triton_kernels_for(weight) is not None
    )


def _should_wait(weight: torch.Tensor) -> bool:
    """Whether this is no plain forward: part of a backward, or recorded as a CUDA graph.

    A part that is computed again in a backward has a graph of its own, and a recorded launch would
    outlive its table.
    """
    if _graph_task is None or _graph_task() != -1:
        return True
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _state(conv: Any) -> tuple:
    """What differs where a launch of earlier does not fit any more."""
    weight = conv.weight
    stream = torch.cuda.current_stream(weight.device) if weight.is_cuda else None
    return weight._version, *_place(weight), conv.ws_eps, conv.ws_mode, stream


def _place(weight: torch.Tensor) -> tuple:
    return address(weight), weight.shape, weight.stride()


def _places(weights: Sequence[torch.Tensor]) -> tuple:
    return weights[0].device, *map(_place, weights)


def _table(weights: Sequence[torch.Tensor]) -> Any:
    kernels = triton_kernels_for(weights[0])
    assert kernels is not None
    return kernels.FilterTable(weights, [address(weight) for weight in weights])


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
