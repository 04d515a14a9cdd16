"""The WS operation on CUDA in one launch per direction, written in Triton.

Filters are small (R-50: 147 to 4,608 values), so a GPU spends more time on starting kernels than on
moving bytes. Here one program reads one filter, and so each direction needs a single launch, where
layer norm and the operations on its statistics need about a dozen: for one weight
(`standardize_rows`, which keeps a filter in registers), or for many (`FilterTable`).

Shape letters: O filters, n values in one filter, T weights, R filters of all of them together.
"""
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (the parameters of a Triton kernel are pointers and numbers of its own language)

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# A longer filter would not fit into the registers of one program.
LARGEST_FILTER = 16384

_MODES = {"paper": 0, "official": 1, "bit": 2}
_TABLE_BLOCK = 1024


@triton.jit
def _forward_kernel(
    weight,
    result,
    means,
    inverses,
    factors,
    n,
    eps,
    bessel,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    offsets = row.to(tl.int64) * n + columns
    w = tl.load(weight + offsets, mask=inside, other=0.0)
    mean = tl.sum(w, axis=0) / n
    mean += tl.sum(tl.where(inside, w - mean, 0.0), axis=0) / n  # what the first sum rounded off
    centred = tl.where(inside, w - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / n
    if MODE == 2:
        denominator = tl.sqrt(variance + eps)
        factor = 1.0 / (n * denominator * denominator * denominator)
    else:
        deviation = tl.sqrt(variance)
        denominator = deviation * bessel + eps
        # constant filters: the gradient of their deviation is taken as 0
        divisor = tl.where(deviation > 0, n * deviation * denominator * denominator, 1.0)
        factor = tl.where(deviation > 0, bessel / divisor, 0.0)
    inverse = 1.0 / denominator
    tl.store(result + offsets, centred * inverse, mask=inside)
    tl.store(means + row, mean)
    tl.store(inverses + row, inverse)
    tl.store(factors + row, factor)


@triton.jit
def _backward_kernel(gradient, weight, means, inverses, factors, result, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    offsets = row.to(tl.int64) * n + columns
    g = tl.load(gradient + offsets, mask=inside, other=0.0)
    w = tl.load(weight + offsets, mask=inside, other=0.0)
    centred = tl.where(inside, w - tl.load(means + row), 0.0)
    g_mean = tl.sum(g, axis=0) / n
    dot = tl.sum(g * centred, axis=0)
    through_mean = (g - g_mean) * tl.load(inverses + row)
    through_deviation = centred * (dot * tl.load(factors + row))
    tl.store(result + offsets, through_mean - through_deviation, mask=inside)


@triton.jit
def _table_forward_kernel(
    addresses, fan_ins, firsts, starts, owners, result, statistics, rows, eps,
    MODE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    owner = tl.load(owners + row)
    n = tl.load(fan_ins + owner)
    place = (row - tl.load(firsts + owner)).to(tl.int64) * n
    weight = tl.load(addresses + owner).to(tl.pointer_type(tl.float32)) + place
    target = result + tl.load(starts + owner) + place
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, STEPS * BLOCK, BLOCK):
        sums += tl.load(weight + start + columns, mask=start + columns < n, other=0.0)
    mean = tl.sum(sums, axis=0) / n
    rests = tl.zeros([BLOCK], dtype=tl.float32)  # what the first sum rounded off
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
    if MODE == 2:
        denominator = tl.sqrt(variance + eps)
        factor = 1.0 / (n * denominator * denominator * denominator)
    else:
        bessel = 1.0
        if MODE == 1:
            bessel = tl.sqrt(n / tl.maximum(n - 1, 1).to(tl.float32))
        deviation = tl.sqrt(variance)
        denominator = deviation * bessel + eps
        divisor = tl.where(deviation > 0, n * deviation * denominator * denominator, 1.0)
        factor = tl.where(deviation > 0, bessel / divisor, 0.0)
    inverse = 1.0 / denominator
    for start in range(0, STEPS * BLOCK, BLOCK):
        inside = start + columns < n
        w = tl.load(weight + start + columns, mask=inside, other=0.0)
        tl.store(target + start + columns, (w - mean) * inverse, mask=inside)
    tl.store(statistics + row, mean)
    tl.store(statistics + rows + row, inverse)
    tl.store(statistics + 2 * rows + row, factor)


@triton.jit
def _table_backward_kernel(
    addresses, fan_ins, firsts, starts, owners, gradient, statistics, result, rows,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    owner = tl.load(owners + row)
    n = tl.load(fan_ins + owner)
    place = (row - tl.load(firsts + owner)).to(tl.int64) * n
    weight = tl.load(addresses + owner).to(tl.pointer_type(tl.float32)) + place
    offset = tl.load(starts + owner) + place
    mean = tl.load(statistics + row)
    inverse = tl.load(statistics + rows + row)
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
        value = (g - g_mean) * inverse - (w - mean) * through_deviation
        tl.store(result + offset + start + columns, value, mask=inside)


def standardize_rows(
    rows: torch.Tensor, eps: float, mode: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """W_hat = (W - mu)/d of every row, d as `standardize_weight` defines it for `mode`.

    Args:
        rows: (O, n) float32, contiguous, n at most `LARGEST_FILTER`.

    Returns:
        W_hat (O, n), and what the gradient needs, each (O,): mu, 1/d, and (dd/dW)/(W - mu)/d^2,
        which is c/(n*s*d^2), or 1/(n*d^3) for "bit", with the population deviation s and c^2 the
        correction n/(n-1) of "official" (1 for "paper").
    """
    filters, fan_in = rows.shape
    result = torch.empty_like(rows)
    statistics = rows.new_empty(3, filters)
    bessel = math.sqrt(fan_in / max(fan_in - 1, 1)) if mode == "official" else 1.0
    with torch.cuda.device_of(rows):
        _forward_kernel[(filters,)](
            rows, result, *statistics, fan_in, eps, bessel, _MODES[mode], **_block(fan_in)
        )
    mean, inverse, factor = statistics
    return result, mean, inverse, factor


def standardize_rows_backward(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    factor: torch.Tensor,
) -> torch.Tensor:
    """dL/dW = (g - mean(g))/d - (W - mu) * sum(g*(W - mu)) * factor, (O, n).

    Args:
        gradient: dL/dW_hat, (O, n), contiguous.
        rows, mean, inverse, factor: as `standardize_rows` took and gave them.
    """
    result = torch.empty_like(rows)
    filters, fan_in = rows.shape
    with torch.cuda.device_of(rows):
        _backward_kernel[(filters,)](
            gradient, rows, mean, inverse, factor, result, fan_in, **_block(fan_in)
        )
    return result


def _block(fan_in: int) -> dict[str, int]:
    """The power of 2 that holds a filter, and a warp (32 threads) for each 256 values of it."""
    block = triton.next_power_of_2(fan_in)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


class FilterTable:
    """Where the filters of several weights lie, on their device.

    It is of no use once a weight has got other memory.

    Args:
        weights: float32, each in one piece, (O, ...), all on one device.
        addresses: of their memory.
    """

    def __init__(self, weights: Sequence[torch.Tensor], addresses: Sequence[int]) -> None:
        device = weights[0].device
        filters = [weight.size(0) for weight in weights]
        self.sizes = [weight.numel() for weight in weights]
        fan_ins = [size // count for size, count in zip(self.sizes, filters)]
        self.rows = sum(filters)
        firsts = [sum(filters[:i]) for i in range(len(weights))]
        starts = [sum(self.sizes[:i]) for i in range(len(weights))]
        counts = torch.tensor(filters, device=device)
        # the same for every filter, as a loop of the kernel: the masks of the short ones are empty
        self._steps = {"STEPS": triton.cdiv(max(fan_ins), _TABLE_BLOCK), "BLOCK": _TABLE_BLOCK}
        self._columns = (
            torch.tensor(addresses, device=device),
            torch.tensor(fan_ins, dtype=torch.int32, device=device),
            torch.tensor(firsts, dtype=torch.int32, device=device),
            torch.tensor(starts, device=device),
            torch.arange(len(weights), dtype=torch.int32, device=device).repeat_interleave(counts),
        )

    def forward(self, eps: float, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        """W_hat of every filter.

        Returns:
            W_hat of all weights, one after the other in the order in which each lies in memory,
            and the statistics of `standardize_rows` as (3, R).
        """
        device = self._columns[0].device
        result = torch.empty(sum(self.sizes), device=device, dtype=torch.float32)
        statistics = torch.empty(3, self.rows, device=device, dtype=torch.float32)
        with torch.cuda.device_of(result):
            _table_forward_kernel[(self.rows,)](
                *self._columns, result, statistics, self.rows, eps, _MODES[mode], **self._steps
            )
        return result, statistics

    def backward(self, gradient: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
        """dL/dW of every filter, as `standardize_rows_backward` has it.

        Args:
            gradient: dL/dW_hat of all weights, in the order of `forward`'s W_hat.
            statistics: of `forward`.
        """
        result = torch.empty_like(gradient)
        with torch.cuda.device_of(result):
            _table_backward_kernel[(self.rows,)](
                *self._columns, gradient, statistics, result, self.rows, **self._steps
            )
        return result
