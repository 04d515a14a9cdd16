"""Weight Standardization (WS) of convolution weights, as pure functions.

Qiao, Wang, Liu, Shen, Yuille, "Weight Standardization" (arXiv:1903.10520), section 3, eq. (2)-(4).
Affine WS: Qiao, Chen, Yuille, "DetectoRS" (arXiv:2006.02334), and mmcv's ConvAWS2d.

Shape letters: O filters (output channels), I input channels, g groups, kh x kw kernel,
n = (I/g)*kh*kw values in one filter (its fan-in).
"""

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch

# The bucket size of DistributedDataParallel: gradients of one launch become ready together, and
# those of the last layers should be all-reduced while the rest of the backward runs.
LAUNCH_BYTES = 25 * 2**20

Affine = tuple[torch.Tensor, torch.Tensor]
"""gamma and beta of affine WS, each (O, 1, ..., 1) with as many dimensions as the weight."""

# A deviation below its root, 1e-18, counts as 0. The reciprocal of 1e-18 does not overflow float32.
_LEAST_SQUARE = 1e-36


def ws_modes() -> dict[str, tuple[bool, bool]]:
    """Mode -> (whether the variance is the unbiased one, whether eps is added under the root).

    A function, because TorchScript cannot read a global dict.
    """
    return {
        "paper": (False, False),
        "official": (True, False),
        "bit": (False, True),
        "aws": (True, True),
    }


WS_MODES = tuple(ws_modes())
"""The published variants; `standardize_weight` says how they differ."""


def check_ws_arguments(eps: float, mode: str) -> None:
    """Checks the two arguments that every WS function and module takes.

    Raises:
        ValueError: `mode` is not one of `WS_MODES`, or `eps` is not a positive number, which would
            turn constant filters (deviation 0) into NaN.
    """
    if mode not in WS_MODES:
        raise ValueError(f"WS mode must be one of {', '.join(WS_MODES)}; got {mode!r}")
    if not eps > 0:
        raise ValueError(f"WS eps must be a number > 0; got {eps!r}")


def standardize_weight(
    weight: torch.Tensor,
    eps: float = 1e-5,
    mode: str = "paper",
    affine: Optional[Affine] = None,
) -> torch.Tensor:
    r"""Standardizes every filter of `weight` to zero mean and unit standard deviation.

    With the n values of filter o, their mean mu = (1/n) sum_j W[o,j] and their population variance
    v = (1/n) sum_j (W[o,j] - mu)^2:

    ============  =================================  =========================================
    mode          W_hat[o,j] = (W[o,j] - mu) / ...   used by
    ============  =================================  =========================================
    `"paper"`     sqrt(v) + eps                      arXiv:1903.10520 eq. (2)-(4)
    `"official"`  sqrt(v * n/(n-1)) + eps            the authors' PyTorch code, mmcv, and the
                                                     weights that they and mmdetection publish
    `"bit"`       sqrt(v + eps)                      BiT (arXiv:1912.11370), timm StdConv2d
    `"aws"`       sqrt(v * n/(n-1) + eps)            mmcv ConvAWS2d (DetectoRS), with `affine`
    ============  =================================  =========================================

    The modes are not interchangeable: at usual deviations (0.003 to 0.01), the position of `eps`
    changes W_hat by several %, and differently for each filter.

    Constant and one-element filters have deviation 0. They give W_hat = 0 and a finite gradient:
    the unbiased variance of one value (0/0) counts as 0, and so does the gradient of the
    deviation, which is multiplied by W - mu = 0.

    With `affine`, the result is gamma * W_hat + beta, which is `weight` itself if `affine` is
    `affine_of(weight, eps, mode)`.

    float16 and bfloat16 weights are standardized in float32, also under autocast, and returned in
    their own dtype. Twice differentiable and scriptable. The result keeps the memory format.

    Args:
        weight: (O, I/g, kh, kw), or (O, ...) with any number of further dimensions.
        eps: keeps the denominator away from 0.
        mode: one of `WS_MODES`. The default is the formula of the paper; `WSConv2d` and the config
            key MODEL.WS.MODE default to "official".
        affine: gamma and beta, which get no gradient.

    Returns:
        W_hat, or its affine form, with the shape, dtype and device of `weight`.

    Raises:
        ValueError: `mode` or `eps` is not allowed (`check_ws_arguments`), or `weight` is not a
            floating-point tensor of at least two dimensions.
    """
    if torch.jit.is_scripting():  # which compiles neither f"{x!r}" nor autograd functions
        return _by_formula(weight, eps, mode, affine)
    else:
        check_ws_arguments(eps, mode)
        if weight.dim() < 2 or not weight.is_floating_point():
            raise ValueError(
                "WS needs a floating-point weight (O, I/g, ...); "
                f"got {weight.dim()} dimension(s) of type {weight.dtype}"
            )
        return _standardize(weight, eps, mode, affine)


def affine_of(weight: torch.Tensor, eps: float, mode: str) -> Affine:
    """gamma and beta with which `standardize_weight` returns `weight` itself, without a gradient:
    the denominator of `mode` and the mean of each filter."""
    w = weight.detach()
    if w.dtype in (torch.float16, torch.bfloat16):
        w = w.float()
    filter_dims = list(range(1, w.dim()))
    variance, mean = torch.var_mean(w, dim=filter_dims, unbiased=False, keepdim=True)
    denominator, _ = _denominator(variance, w[0].numel(), eps, mode)
    return denominator.to(weight.dtype), mean.to(weight.dtype)


def standardize_weights(
    weights: Sequence[torch.Tensor], eps: float, mode: str, affines: Sequence[Affine] = ()
) -> list[torch.Tensor]:
    """`standardize_weight` of several weights; on CUDA, one kernel launch per `LAUNCH_BYTES`.

    Gradients equal those of separate calls. The backward of a launch visits the autograd nodes of
    all its weights, and passes None to those of unused ones.

    Args:
        weights, eps, mode: as for `standardize_weight`.
        affines: empty, or one for each weight.
    """
    tensors = [*weights, *itertools.chain.from_iterable(affines)]
    if not tensors or not all(map(_runs_in_triton, tensors)) or not _triton_is_ready():
        each: Sequence[Optional[Affine]] = affines or [None] * len(weights)
        return [_standardize(weight, eps, mode, affine) for weight, affine in zip(weights, each)]
    rest = iter(affines)
    launches = (
        _StandardizeByTriton.apply(eps, mode, [*itertools.islice(rest, len(launch))], *launch)
        for launch in _launches(weights)
    )
    return [result for launch in launches for result in launch]


def _standardize(
    weight: torch.Tensor, eps: float, mode: str, affine: Optional[Affine]
) -> torch.Tensor:
    if weight.dtype in (torch.float16, torch.bfloat16):
        return _standardize(weight.float(), eps, mode, affine).to(weight.dtype)
    # Tracers and compilers get the formula, which they can fuse and export.
    if in_graph_capture() or not has_contiguous_filters(weight):
        return _by_formula(weight, eps, mode, affine)
    affines = [affine] if affine else []
    if all(map(_runs_in_triton, (weight, *(affine or ())))) and _triton_is_ready():
        return _StandardizeByTriton.apply(eps, mode, affines, weight)[0]
    return _StandardizeByLayerNorm.apply(weight, eps, mode, *(affine or (None, None)))


def _by_formula(
    weight: torch.Tensor, eps: float, mode: str, affine: Optional[Affine] = None
) -> torch.Tensor:
    """`standardize_weight` in plain torch operations."""
    w = weight
    if w.dtype == torch.float16 or w.dtype == torch.bfloat16:
        w = w.float()
    fan_in = w.numel() // max(w.size(0), 1)
    filter_dims = list(range(1, w.dim()))
    variance, mean = torch.var_mean(w, dim=filter_dims, unbiased=False, keepdim=True)
    denominator, _ = _denominator(variance, fan_in, eps, mode)
    result = (w - mean) / denominator
    if affine is not None:
        gamma, beta = affine
        result = result * gamma + beta
    return result.to(weight.dtype)


def _denominator(
    variance: torch.Tensor,
    fan_in: int,
    eps: float,
    mode: str,
    least: float = _LEAST_SQUARE,  # an argument, because TorchScript cannot read globals
) -> tuple[torch.Tensor, torch.Tensor]:
    """The denominator d of a mode and its slope dd/dv, which counts as 0 at deviation 0.

    Args:
        variance: v, the population variance of each filter.
        fan_in: n.
    """
    unbiased, eps_under_root = ws_modes()[mode]
    ratio = fan_in / max(fan_in - 1, 1) if unbiased else 1.0
    square = variance * ratio if unbiased else variance
    if eps_under_root:
        square = square + eps
    # The slope of sqrt is infinite at 0; that of clamp below its minimum is 0.
    root = square.clamp(min=least).sqrt()
    slope = (square > least) * (0.5 * ratio / root)
    return root if eps_under_root else root + eps, slope


class _StandardizeByLayerNorm(torch.autograd.Function):
    """WS by torch's layer-norm kernels, which read each filter from memory only once.

    With C = W - mu, the denominator d(v) and its slope d':

        W_hat = C/d
        dL/dW = (g - mean(g))/d - C * mean(g*C) * 2d'/d^2

    Layer norm over a filter gives C/sqrt(v + floor), which is W_hat up to a factor per filter. Its
    backward computes r*(g - mean(g)) - C * mean(g*C) * r^3 for any r; with r^2 = 2d'/d, this is
    dL/dW up to the factor 1/(r*d). gamma is a further factor of both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        eps: float,
        mode: str,
        gamma: Optional[torch.Tensor],
        beta: Optional[torch.Tensor],
    ) -> torch.Tensor:
        rows = _to_rows(weight, weight)
        fan_in = rows.size(1)
        # Keeps constant filters from dividing by 0; subtracted from v again below.
        floor = max((1e-4 * eps) ** 2, _LEAST_SQUARE)
        result, mean, inverse = torch.native_layer_norm(rows, [fan_in], None, None, floor)
        variance = inverse.pow(-2).sub_(floor).clamp_(min=0)
        denominator, slope = _denominator(variance, fan_in, eps, mode)
        result.div_(inverse * denominator)
        # 2d'/d is at least 1/d^2, except for constant filters, where it is 0.
        r = torch.maximum(2 * slope / denominator, denominator.pow(-2)).sqrt_()
        factor = denominator.mul_(r).reciprocal_()
        if gamma is not None and beta is not None:
            result.mul_(gamma.view(-1, 1)).add_(beta.view(-1, 1))
            factor.mul_(gamma.view(-1, 1))
        ctx.save_for_backward(weight, mean, r, factor, gamma, beta)
        ctx.eps, ctx.mode = eps, mode
        return _from_rows(result, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        weight, mean, r, factor, gamma, beta = ctx.saved_tensors
        if torch.is_grad_enabled():
            affine = None if gamma is None else (gamma, beta)
            result = _differentiable_gradient(weight, gradient, ctx.eps, ctx.mode, affine)
            return result, None, None, None, None
        rows = _to_rows(weight, weight)
        result, _, _ = torch.ops.aten.native_layer_norm_backward(
            _to_rows(gradient, weight), rows, [rows.size(1)], mean, r, None, None,
            [True, False, False],
        )  # fmt: skip
        return _from_rows(result.mul_(factor), weight), None, None, None, None


class _StandardizeByTriton(torch.autograd.Function):
    """WS of several weights by one launch of `triton_kernels`.

    Nothing is saved by `save_for_backward`: graphs that share only this launch may run their
    backwards one after another, and the first would free what the others need.
    """

    @staticmethod
    def forward(
        ctx: Any, eps: float, mode: str, affines: Sequence[Affine], *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        result, ctx.statistics = _kernels().standardize(weights, eps, *ws_modes()[mode], affines)
        ctx.weights, ctx.affines = weights, affines
        ctx.versions = [0 if w.is_inference() else w._version for w in weights]
        ctx.eps, ctx.mode = eps, mode
        ctx.set_materialize_grads(False)
        results = _split(result, weights)
        frozen = [r for r, needed in zip(results, ctx.needs_input_grad[3:]) if not needed]
        ctx.mark_non_differentiable(*frozen)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Optional[torch.Tensor]) -> tuple[Any, ...]:
        weights = ctx.weights
        for g, weight, version in zip(gradients, weights, ctx.versions):
            if g is not None and (weight._version != version or weight.shape != g.shape):
                raise RuntimeError(
                    f"a WS weight of shape {list(g.shape)} was modified by an inplace operation "
                    f"between forward and backward: version {weight._version}, shape "
                    f"{list(weight.shape)}; expected version {version}"
                )
        if torch.is_grad_enabled():
            form = ctx.eps, ctx.mode
            affines = ctx.affines or [None] * len(weights)
            results = [
                None if g is None else _differentiable_gradient(weight, g, *form, affine)
                for g, weight, affine in zip(gradients, weights, affines)
            ]
            return None, None, None, *results
        flat = [
            weight.new_zeros(weight.numel()) if g is None else _to_rows(g, weight).view(-1)
            for g, weight in zip(gradients, weights)
        ]
        result = _kernels().standardize_backward(weights, torch.cat(flat), ctx.statistics)
        parts = zip(gradients, _split(result, weights))
        return None, None, None, *(None if g is None else part for g, part in parts)


def _split(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    parts = flat.split([weight.numel() for weight in like])
    return [_from_rows(part, weight) for part, weight in zip(parts, like)]


def _launches(weights: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Splits weights, in order, into launches on one device of at most `LAUNCH_BYTES` each.

    A weight that is larger gets a launch of its own.
    """
    launch: list[torch.Tensor] = []
    total = 0
    for weight in weights:
        size = weight.nbytes
        if launch and (total + size > LAUNCH_BYTES or weight.device != launch[0].device):
            yield launch
            launch, total = [], 0
        launch.append(weight)
        total += size
    if launch:
        yield launch


def _runs_in_triton(weight: torch.Tensor) -> bool:
    return weight.is_cuda and weight.dtype == torch.float32 and has_contiguous_filters(weight)


def _triton_is_ready() -> bool:
    """False also while a CUDA graph is captured, which would outlive the table of filters."""
    return (
        not in_graph_capture()
        and not torch.cuda.is_current_stream_capturing()
        and _kernels() is not None
    )


@functools.cache
def _kernels() -> Any:
    """The module `triton_kernels`, or None after one warning if Triton cannot build a kernel."""
    try:
        from . import triton_kernels

        sample = torch.arange(8.0, device="cuda").view(2, 4)
        result, statistics = triton_kernels.standardize([sample], 1e-5, False, False)
        triton_kernels.standardize_backward([sample], result, statistics)
    except Exception as error:  # of any type: Triton calls a C compiler
        logging.getLogger(__name__).warning(
            "Triton cannot be used (%s: %s); WS uses torch's layer norm kernels on CUDA instead, "
            "which need more launches",
            type(error).__name__,
            error,
        )
        return None
    return triton_kernels


def _differentiable_gradient(
    weight: torch.Tensor, gradient: torch.Tensor, eps: float, mode: str, affine: Optional[Affine]
) -> torch.Tensor:
    """The gradient with a graph, for a second derivative."""
    result = _by_formula(weight, eps, mode, affine)
    (second,) = torch.autograd.grad(result, weight, gradient, create_graph=True)
    return second


def has_contiguous_filters(weight: torch.Tensor) -> bool:
    """Whether the values of each filter are contiguous in memory."""
    return weight.numel() > 0 and (
        weight.is_contiguous()
        or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    )


def _to_rows(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` as one row per filter, in the memory order of `like`."""
    if not like.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(tensor.size(0), -1)


def _from_rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `_to_rows`."""
    if like.is_contiguous():
        return values.view_as(like)
    filters, channels, height, width = like.shape
    return values.view(filters, height, width, channels).permute(0, 3, 1, 2)


def in_graph_capture() -> bool:
    """Whether a tracer or compiler records the operations."""
    return torch.jit.is_tracing() or _is_compiling()


def _is_compiling() -> bool:
    is_compiling = getattr(torch.compiler, "is_compiling", None)  # from torch 2.3 on
    return is_compiling is not None and is_compiling()
