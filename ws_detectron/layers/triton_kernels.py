"""The WS operation on CUDA: the filters of any number of weights in one launch per direction.

Filters are small (R-50: 147 to 4,608 values), so launching a kernel per weight takes a GPU longer
than moving the bytes. Here each program standardizes one filter, which it looks up in a table.

Shape letters: n values in one filter, R filters in all weights together.
"""
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (parameters of Triton kernels are pointers and numbers of Triton's own types)

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _denominator(variance, n, eps, UNBIASED: tl.constexpr, EPS_UNDER_ROOT: tl.constexpr):
    """`standardize._denominator` of one filter."""
    ratio = 1.0
    if UNBIASED:
        ratio = n / tl.maximum(n - 1, 1).to(tl.float32)
    square = variance * ratio
    if EPS_UNDER_ROOT:
        square += eps
    root = tl.sqrt(square)
    slope = tl.where(root > 0, 0.5 * ratio / tl.where(root > 0, root, 1.0), 0.0)
    if not EPS_UNDER_ROOT:
        root += eps
    return root, slope


@triton.jit
def _forward_kernel(
    filters, result, statistics, rows, eps,
    UNBIASED: tl.constexpr, EPS_UNDER_ROOT: tl.constexpr, AFFINE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    weight = tl.load(filters + row).to(tl.pointer_type(tl.float32))
    target = result + tl.load(filters + rows + row)
    n = tl.load(filters + 2 * rows + row).to(tl.int32)
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, STEPS * BLOCK, BLOCK):
        sums += tl.load(weight + start + columns, mask=start + columns < n, other=0.0)
    mean = tl.sum(sums, axis=0) / n
    rests = tl.zeros([BLOCK], dtype=tl.float32)  # corrects the rounding error of the first sum
    for start in range(0, STEPS * BLOCK, BLOCK):
        inside = start + columns < n
        w = tl.load(weight + start + columns, mask=inside, other=0.0)
        rests += tl.where(inside, w - mean, 0.0)
    mean += tl.sum(rests, axis=0) / n
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, STEPS * BLOCK, BLOCK):
        inside = start + columns < n
        w = tl.load(weight + start + columns, mask=inside, other=0.0)
        centred = tl.where(inside, w - mean, 0.0)
        squares += centred * centred
    variance = tl.sum(squares, axis=0) / n
    denominator, slope = _denominator(variance, n, eps, UNBIASED, EPS_UNDER_ROOT)
    inverse = 1.0 / denominator
    scale = inverse
    shift = 0.0
    if AFFINE:
        scale *= tl.load(tl.load(filters + 3 * rows + row).to(tl.pointer_type(tl.float32)))
        shift = tl.load(tl.load(filters + 4 * rows + row).to(tl.pointer_type(tl.float32)))
    for start in range(0, STEPS * BLOCK, BLOCK):
        inside = start + columns < n
        w = tl.load(weight + start + columns, mask=inside, other=0.0)
        tl.store(target + start + columns, (w - mean) * scale + shift, mask=inside)
    tl.store(statistics + row, mean)
    tl.store(statistics + rows + row, scale)
    tl.store(statistics + 2 * rows + row, 2.0 * slope * inverse * scale / n)


@triton.jit
def _backward_kernel(
    filters, gradient, result, statistics, rows, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    weight = tl.load(filters + row).to(tl.pointer_type(tl.float32))
    offset = tl.load(filters + rows + row)
    n = tl.load(filters + 2 * rows + row).to(tl.int32)
    mean = tl.load(statistics + row)
    scale = tl.load(statistics + rows + row)
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    dots = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, STEPS * BLOCK, BLOCK):
        inside = start + columns < n
        g = tl.load(gradient + offset + start + columns, mask=inside, other=0.0)
        w = tl.load(weight + start + columns, mask=inside, other=0.0)
        sums += g
        dots += g * tl.where(inside, w - mean, 0.0)
    g_mean = tl.sum(sums, axis=0) / n
    through_deviation = tl.sum(dots, axis=0) * tl.load(statistics + 2 * rows + row)
    for start in range(0, STEPS * BLOCK, BLOCK):
        inside = start + columns < n
        g = tl.load(gradient + offset + start + columns, mask=inside, other=0.0)
        w = tl.load(weight + start + columns, mask=inside, other=0.0)
        value = (g - g_mean) * scale - (w - mean) * through_deviation
        tl.store(result + offset + start + columns, value, mask=inside)


def standardize(
    weights: Sequence[torch.Tensor],
    eps: float,
    unbiased: bool,
    eps_under_root: bool,
    affines: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_hat = gamma * (W - mu)/d + beta of every filter, with the denominator d of
    `standardize.ws_modes`.

    Args:
        weights: float32, (O, ...), not empty, with contiguous filters, all on one device.
        affines: gamma and beta of each weight, float32, O values in one piece of memory; empty for
            1 and 0.

    Returns:
        W_hat of all weights, flat, concatenated, each in its memory order; and the statistics for
        the gradient, (3, R): mu, gamma/d, and gamma * 2/n * dd/dv / d^2.
    """
    filters, steps = _table(weights, affines)
    rows = filters.size(1)
    result = weights[0].new_empty(sum(w.numel() for w in weights))
    statistics = weights[0].new_empty(3, rows)
    with torch.cuda.device_of(filters):
        _forward_kernel[(rows,)](
            filters, result, statistics, rows, eps, unbiased, eps_under_root, bool(affines),
            steps, _BLOCK,
        )  # fmt: skip
    return result, statistics


def standardize_backward(
    weights: Sequence[torch.Tensor], gradient: torch.Tensor, statistics: torch.Tensor
) -> torch.Tensor:
    """dL/dW = gamma * ((g - mean(g))/d - (W - mu) * sum(g*(W - mu)) * (2/n * dd/dv / d^2)).

    Args:
        weights: as passed to `standardize`.
        gradient: dL/dW_hat, in the layout in which `standardize` returned W_hat.
        statistics: as returned by `standardize`.
    """
    filters, steps = _table(weights)
    rows = filters.size(1)
    result = torch.empty_like(gradient)
    with torch.cuda.device_of(filters):
        _backward_kernel[(rows,)](filters, gradient, result, statistics, rows, steps, _BLOCK)
    return result


def _table(
    weights: Sequence[torch.Tensor], affines: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
) -> tuple[torch.Tensor, int]:
    """Address, offset in the result, n, and with `affines` the addresses of gamma and beta of each
    filter, (3, R) or (5, R); and the steps of the longest.

    All programs loop over the same number of steps; the masks of short filters are empty.
    """
    device = weights[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    pointers = [[t.data_ptr() for t in affine] for affine in affines] or [[]] * len(weights)
    layout = tuple(
        (w.data_ptr(), w.size(0), w.numel(), *more) for w, more in zip(weights, pointers)
    )
    return _table_of(device, stream, layout)  # written on the stream that reads it


@functools.lru_cache(maxsize=256)
def _table_of(
    device: torch.device, stream: int, layout: tuple[tuple[int, ...], ...]
) -> tuple[torch.Tensor, int]:
    addresses, counts, sizes, *affine = torch.tensor(layout).unbind(1)
    fan_ins = sizes // counts

    def offsets(lengths: torch.Tensor) -> torch.Tensor:
        return lengths.cumsum(0) - lengths

    weight = torch.arange(len(layout)).repeat_interleave(counts)
    number = torch.arange(len(weight)) - offsets(counts)[weight]  # in its weight
    begins = number * fan_ins[weight]
    columns = [addresses[weight] + 4 * begins, offsets(sizes)[weight] + begins, fan_ins[weight]]
    columns += [first[weight] + 4 * number for first in affine]
    return torch.stack(columns).to(device), triton.cdiv(int(fan_ins.max()), _BLOCK)
