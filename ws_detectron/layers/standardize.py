"""Weight Standardization (WS) of a convolution weight, as a pure function.

Qiao, Wang, Liu, Shen, Yuille, "Weight Standardization" (arXiv:1903.10520), section 3, eq. (2)-(4).

Shape letters: O filters (output channels), I input channels, g groups, kh x kw kernel,
n = (I/g)*kh*kw values in one filter (its fan-in).
"""

import functools
import logging
import math
from types import ModuleType
from typing import Any, Optional

import torch

WS_MODES = ("paper", "official", "bit")
"""The published variants; `standardize_weight` says how they differ."""


def check_ws_arguments(eps: float, mode: str) -> None:
    """Checks the two arguments that every WS function and module takes.

    Raises:
        ValueError: `mode` is not one of `WS_MODES`, or `eps` is not a positive number. Without a
            positive `eps` a constant filter, whose deviation is 0, would become NaN.
    """
    if mode not in WS_MODES:
        raise ValueError(f"WS mode must be one of {', '.join(WS_MODES)}; got {mode!r}")
    if not eps > 0:
        raise ValueError(f"WS eps must be a number > 0; got {eps!r}")


def standardize_weight(
    weight: torch.Tensor, eps: float = 1e-5, mode: str = "paper"
) -> torch.Tensor:
    r"""Standardizes every filter of `weight` to zero mean and unit deviation.

    With the n values of filter o, their mean mu = (1/n) sum_j W[o,j] and their population variance
    v = (1/n) sum_j (W[o,j] - mu)^2:

    ============  =================================  =========================================
    mode          W_hat[o,j] = (W[o,j] - mu) / ...   used by
    ============  =================================  =========================================
    `"paper"`     sqrt(v) + eps                      arXiv:1903.10520 eq. (2)-(4)
    `"official"`  sqrt(v * n/(n-1)) + eps            the authors' PyTorch code, mmcv; their
                                                     weights and mmdetection's need this one
    `"bit"`       sqrt(v + eps)                      BiT (arXiv:1912.11370), timm StdConv2d
    ============  =================================  =========================================

    The modes are no approximations of each other: where deviations are small (0.003 to 0.01 is
    usual) the place of `eps` changes W_hat by several per cent, and differently for each filter.

    Constant and one-element filters have deviation 0. They give W_hat = 0 and a finite gradient:
    the unbiased variance of one value (0/0) is taken as 0, and the gradient of the deviation,
    which is multiplied by W - mu = 0 there, as 0.

    float16 and bfloat16 weights are standardized in float32 and returned in their own type;
    autocast does not lower the precision. Differentiable twice, scriptable, and independent of
    the memory format, which the result keeps.

    Args:
        weight: (O, I/g, kh, kw), or (O, ...) with any number of further dimensions.
        eps: what keeps the denominator away from 0.
        mode: one of `WS_MODES`. The default is the paper's text; that of `WSConv2d` and of the
            config key MODEL.WS.MODE is "official".

    Returns:
        W_hat, of the shape, type and device of `weight`.

    Raises:
        ValueError: `mode` or `eps` is not allowed (`check_ws_arguments`), or `weight` is not a
            floating-point tensor of at least two dimensions.
    """
    if torch.jit.is_scripting():  # neither messages with `!r` nor autograd functions compile
        return _standardize_by_formula(weight, eps, mode)
    else:
        check_ws_arguments(eps, mode)
        if weight.dim() < 2 or not weight.is_floating_point():
            raise ValueError(
                "WS needs a floating-point weight (O, I/g, ...); "
                f"got {weight.dim()} dimension(s) of type {weight.dtype}"
            )
    half = weight.dtype == torch.float16 or weight.dtype == torch.bfloat16
    w = weight.float() if half else weight
    # A tracer or compiler should see the formula: it can fuse that, and save or export it.
    if in_graph_capture() or not in_one_piece(w):
        return _standardize_by_formula(w, eps, mode).to(weight.dtype)
    kernels = triton_kernels_for(w)
    if kernels is not None:
        return _StandardizeOnCuda.apply(w, eps, mode, kernels).to(weight.dtype)
    return _Standardize.apply(w, eps, mode).to(weight.dtype)


def _standardize_by_formula(weight: torch.Tensor, eps: float, mode: str) -> torch.Tensor:
    """The formulas as they stand in `standardize_weight`, in differentiable torch operations."""
    w = weight
    if w.dtype == torch.float16 or w.dtype == torch.bfloat16:
        w = w.float()
    filter_dims = list(range(1, w.dim()))
    variance, mean = torch.var_mean(w, dim=filter_dims, unbiased=False, keepdim=True)
    if mode == "bit":
        denominator = torch.sqrt(variance + eps)
    else:
        if mode == "official":
            fan_in = w.numel() // max(w.size(0), 1)
            variance = variance * (fan_in / max(fan_in - 1, 1))
        # sqrt has an infinite gradient at 0: those filters take the square root of 1 instead,
        # and 0 of it, so that their deviation and its gradient are 0.
        varies = variance > 0
        deviation = torch.sqrt(torch.where(varies, variance, torch.ones_like(variance)))
        denominator = torch.where(varies, deviation, torch.zeros_like(variance)) + eps
    return ((w - mean) / denominator).to(weight.dtype)


class _Standardize(torch.autograd.Function):
    """The same values in few passes over memory: a layer norm over each filter, then its scale.

    With the population deviation s, d the denominator of the mode (c*s + eps, where c^2 is
    n/(n-1) for "official" and 1 for "paper"; sqrt(s^2 + eps) for "bit") and N = (W - mu)/s:

        W_hat = N * s/d
        dL/dW = (1/d) * (g - mean(g) - N * mean(g*N) * c*s/d)
        dL/dW = (1/d) * (g - mean(g) - W_hat * mean(g*W_hat))        for "bit"

    The gradient has the form of layer norm's, r * (g - mean(g) - C*r * mean(g*C*r)) with
    C = W - mu, for r^2 = c/(s*d), times 1/(r*d). So torch's fused kernels, which read a filter
    once and keep it in the cache, do both directions.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, eps: float, mode: str) -> torch.Tensor:
        rows = _to_rows(weight, weight)
        fan_in = rows.size(1)
        if mode == "bit":
            result, mean, inverse = torch.native_layer_norm(rows, [fan_in], None, None, eps)
            scale = None
        else:
            # Added to the variance under the root, so that constant filters divide by something;
            # what it does to the others is taken out of the deviation again.
            floor = max((1e-4 * eps) ** 2, 1e-36)
            result, mean, inverse = torch.native_layer_norm(rows, [fan_in], None, None, floor)
            bessel = math.sqrt(fan_in / max(fan_in - 1, 1)) if mode == "official" else 1.0
            deviation = inverse.pow(-2).sub_(floor).clamp_(min=0).sqrt_()
            denominator = deviation.mul_(bessel).add_(eps)
            result.mul_((inverse * denominator).reciprocal_())
            inverse = (bessel * inverse / denominator).sqrt_()
            scale = (inverse * denominator).reciprocal_()
        ctx.save_for_backward(weight, mean, inverse, scale)
        ctx.eps, ctx.mode = eps, mode
        return from_rows(result, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, mean, inverse, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # asked to be differentiated again
            return differentiable_gradient(weight, gradient, ctx.eps, ctx.mode), None, None
        rows = _to_rows(weight, weight)
        result, _, _ = torch.ops.aten.native_layer_norm_backward(
            _to_rows(gradient, weight),
            rows,
            [rows.size(1)],
            mean,
            inverse,
            None,
            None,
            [True, False, False],
        )
        if scale is not None:
            result.mul_(scale)
        return from_rows(result, weight), None, None


class _StandardizeOnCuda(torch.autograd.Function):
    """The same by the kernels of `triton_kernels`, which also states the formulas."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, eps: float, mode: str, kernels: ModuleType
    ) -> torch.Tensor:
        result, *statistics = kernels.standardize_rows(_to_rows(weight, weight), eps, mode)
        ctx.save_for_backward(weight, *statistics)
        ctx.eps, ctx.mode, ctx.kernels = eps, mode, kernels
        return from_rows(result, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        weight, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradient(weight, gradient, ctx.eps, ctx.mode), None, None, None
        rows = _to_rows(weight, weight)
        gradient_rows = _to_rows(gradient, weight)
        result = ctx.kernels.standardize_rows_backward(gradient_rows, rows, *statistics)
        return from_rows(result, weight), None, None, None


def triton_kernels_for(weight: torch.Tensor) -> Optional[ModuleType]:
    """The module `triton_kernels`, where it can run and its kernels serve this weight."""
    if not weight.is_cuda or weight.dtype != torch.float32:
        return None
    kernels = _load_triton_kernels()
    if kernels is None or weight.numel() > weight.size(0) * kernels.LARGEST_FILTER:
        return None
    return kernels


@functools.cache
def _load_triton_kernels() -> Optional[ModuleType]:
    """None, with one warning, where Triton is missing or cannot build a kernel."""
    try:
        from . import triton_kernels

        sample = torch.arange(8.0, device="cuda").view(2, 4)
        result, *statistics = triton_kernels.standardize_rows(sample, 1e-5, "paper")
        triton_kernels.standardize_rows_backward(result, sample, *statistics)
        table = triton_kernels.FilterTable([sample], [sample.data_ptr()])
        table.backward(*table.forward(1e-5, "paper"))
    except Exception as error:  # Triton calls a C compiler, and fails in as many ways as that can
        logging.getLogger(__name__).warning(
            "WS uses torch's layer norm kernels on CUDA, which need more launches: "
            "Triton cannot be used here (%s: %s)",
            type(error).__name__,
            error,
        )
        return None
    return triton_kernels


def differentiable_gradient(
    weight: torch.Tensor, gradient: torch.Tensor, eps: float, mode: str
) -> torch.Tensor:
    """The gradient with a graph of its own, for a second derivative."""
    result = _standardize_by_formula(weight, eps, mode)
    (second,) = torch.autograd.grad(result, weight, gradient, create_graph=True)
    return second


def in_one_piece(weight: torch.Tensor) -> bool:
    """Whether the values of each filter follow one another in memory, without gaps."""
    return weight.numel() > 0 and (
        weight.is_contiguous()
        or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    )


def _to_rows(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` as one row for each filter, in the order in which `like` lies in memory."""
    return in_memory_order(tensor, like).view(tensor.size(0), -1)


def in_memory_order(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The values of `tensor`, one after the other, as those of `like` lie in memory."""
    if not like.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)


def from_rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What `in_memory_order` or `_to_rows` gave, in the shape and memory format of `like`."""
    if like.is_contiguous():
        return values.view_as(like)
    filters, channels, height, width = like.shape
    return values.view(filters, height, width, channels).permute(0, 3, 1, 2)


def in_graph_capture() -> bool:
    """Whether a tracer or compiler records the operations; it must see all of them."""
    return torch.jit.is_tracing() or _is_compiling()


def _is_compiling() -> bool:
    is_compiling = getattr(torch.compiler, "is_compiling", None)  # from torch 2.3 on
    return is_compiling is not None and is_compiling()
