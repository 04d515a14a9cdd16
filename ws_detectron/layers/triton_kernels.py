"""The WS operation on CUDA in one launch per direction, written in Triton.

Filters are small (R-50: 147 to 4,608 values), so a GPU spends more time on starting kernels than on
moving bytes. Here one program reads one filter into registers, and so each direction needs a single
launch, where layer norm and the operations on its statistics need about a dozen.

Shape letters: O filters, n values in one filter.
"""
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# (the parameters of a Triton kernel are pointers and numbers of its own language)

import math

import torch
import triton
import triton.language as tl

# A longer filter would not fit into the registers of one program.
LARGEST_FILTER = 16384

_MODES = {"paper": 0, "official": 1, "bit": 2}


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
