"""The WS operation, compared with plain Python loops in float64."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from ws_detectron.layers import WS_MODES, affine_of, standardize_weight


def reference(weight: torch.Tensor, eps: float, mode: str) -> torch.Tensor:
    """The formulas of arXiv:1903.10520 and of its published variants, one value at a time."""
    result = torch.empty(weight.shape, dtype=torch.float64)
    for o in range(weight.shape[0]):
        values = [float(v) for v in weight[o].detach().double().flatten()]
        n = len(values)
        mean = math.fsum(values) / n
        squares = math.fsum((v - mean) ** 2 for v in values)
        if mode == "paper":
            denominator = math.sqrt(squares / n) + eps
        elif mode == "official":
            denominator = (math.sqrt(squares / (n - 1)) if n > 1 else 0.0) + eps
        elif mode == "bit":
            denominator = math.sqrt(squares / n + eps)
        elif mode == "aws":
            denominator = math.sqrt((squares / (n - 1) if n > 1 else 0.0) + eps)
        else:
            raise ValueError(f"no formula for {mode!r} here")
        standardized = [(v - mean) / denominator for v in values]
        result[o] = torch.tensor(standardized, dtype=torch.float64).view(weight[o].shape)
    return result


SHAPES = [(4, 3, 3, 3), (5, 2, 1, 1), (3, 7, 5, 1), (2, 1, 7, 7), (6, 1, 3, 3)]


@pytest.mark.parametrize("mode", WS_MODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-2, 3e-3, 1e-5])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_equals_the_formula(mode: str, shape: tuple, scale: float, eps: float) -> None:
    weight = (torch.randn(shape, dtype=torch.float64) + 0.3) * scale
    expected = reference(weight, eps, mode)
    torch.testing.assert_close(standardize_weight(weight, eps, mode), expected, rtol=1e-11, atol=0)
    # float32 has 24 bits; mean and deviation lose a few of them to cancellation.
    single = standardize_weight(weight.float(), eps, mode)
    expected = reference(weight.float(), eps, mode).float()
    torch.testing.assert_close(single, expected, rtol=1e-5, atol=2e-6)


def test_modes_are_the_variants_of_the_literature() -> None:
    """At deviation 0.003, the position of eps changes a filter by tens of %."""
    weight = 0.003 * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).view(1, 4, 1, 1)
    largest = {mode: standardize_weight(weight, 1e-5, mode).max().item() for mode in WS_MODES}
    assert largest["paper"] == pytest.approx(0.003 / 0.00301)
    assert largest["official"] == pytest.approx(0.003 / (0.003 * math.sqrt(4 / 3) + 1e-5))
    assert largest["bit"] == pytest.approx(0.003 / math.sqrt(9e-6 + 1e-5))
    assert largest["aws"] == pytest.approx(0.003 / math.sqrt(9e-6 * 4 / 3 + 1e-5))


def test_defaults_are_the_paper_with_eps_1e_5() -> None:
    weight = torch.randn(4, 3, 3, 3)
    torch.testing.assert_close(
        standardize_weight(weight), standardize_weight(weight, 1e-5, "paper")
    )


def test_bit_equals_batch_norm_over_each_filter() -> None:
    """timm's formulation: a filter is a channel of one image, normalized in training mode."""
    weight = torch.randn(8, 4, 3, 3)
    expected = F.batch_norm(
        weight.view(1, 8, -1), None, None, training=True, momentum=0.0, eps=1e-6
    ).view_as(weight)
    torch.testing.assert_close(standardize_weight(weight, 1e-6, "bit"), expected)


@pytest.mark.parametrize("mode", WS_MODES)
@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (3, 2, 1, 1), (2, 5, 1, 1)])
def test_gradients_in_float64(mode: str, shape: tuple) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda w: standardize_weight(w, 1e-5, mode), weight)
    assert gradgradcheck(lambda w: standardize_weight(w, 1e-5, mode), weight)


@pytest.mark.parametrize("mode", WS_MODES)
def test_gradient_is_orthogonal_to_shift_and_scale(mode: str) -> None:
    """W -> a*W + b leaves W_hat as it is (up to eps), so the gradient is orthogonal to both."""
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(weight)
    (standardize_weight(weight, 1e-12, mode) * upstream).sum().backward()
    gradient = weight.grad.flatten(1)
    torch.testing.assert_close(
        gradient.sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0
    )
    along_weight = (gradient * weight.detach().flatten(1)).sum(1)
    torch.testing.assert_close(along_weight, torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", WS_MODES)
@pytest.mark.parametrize("a, b", [(3.0, 0.0), (0.5, 2.0), (10.0, -1.0)])
def test_output_ignores_scale_and_shift_of_filters(mode: str, a: float, b: float) -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    expected = standardize_weight(weight, 1e-12, mode)
    torch.testing.assert_close(standardize_weight(a * weight + b, 1e-12, mode), expected)


@pytest.mark.parametrize("mode", WS_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.5, -2.0])
def test_constant_and_one_element_filters_stay_finite(
    mode: str, dtype: torch.dtype, value: float
) -> None:
    for shape in [(2, 4, 3, 3), (3, 1, 1, 1)]:
        weight = torch.full(shape, value, dtype=dtype, requires_grad=True)
        result = standardize_weight(weight, 1e-5, mode)
        (result * torch.randn_like(result)).sum().backward()
        torch.testing.assert_close(result.detach(), torch.zeros(shape, dtype=dtype))
        assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_gradient_of_a_constant_filter_is_the_limit(mode: str) -> None:
    """At W = const, W_hat = (W - mu)/eps to first order, so dL/dW = (g - mean(g))/eps."""
    weight = torch.full((1, 4, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64).view(1, 4, 1, 1)
    (standardize_weight(weight, 1e-3, mode) * upstream).sum().backward()
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0], dtype=torch.float64).view(1, 4, 1, 1) / 1e-3
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("mode", WS_MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_standardized_in_float32(mode: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(4, 8, 3, 3) * 0.01 + 1.0).to(dtype).requires_grad_()
    result = standardize_weight(weight, 1e-5, mode)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result, reference(weight, 1e-5, mode).to(dtype), rtol=1e-2, atol=1e-3
    )
    result.float().pow(2).sum().backward()
    assert weight.grad.dtype == dtype and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("mode", WS_MODES)
def test_autocast_does_not_lower_the_precision(mode: str) -> None:
    weight = torch.randn(4, 8, 3, 3) * 0.01 + 1.0
    expected = standardize_weight(weight, 1e-5, mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = standardize_weight(weight, 1e-5, mode)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", WS_MODES)
def test_any_memory_format(mode: str) -> None:
    weight = torch.randn(4, 8, 3, 3)
    expected = standardize_weight(weight, 1e-5, mode)
    last = weight.contiguous(memory_format=torch.channels_last)
    result = standardize_weight(last, 1e-5, mode)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected)
    strided = torch.randn(4, 8, 3, 6)[..., ::2]
    torch.testing.assert_close(
        standardize_weight(strided, 1e-5, mode), standardize_weight(strided.clone(), 1e-5, mode)
    )


@pytest.mark.parametrize("mode", WS_MODES)
def test_scripted_equals_eager(mode: str) -> None:
    weight = torch.randn(4, 3, 3, 3)
    scripted = torch.jit.script(standardize_weight)
    torch.testing.assert_close(scripted(weight, 1e-5, mode), standardize_weight(weight, 1e-5, mode))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", WS_MODES)
def test_cuda_equals_the_formula(mode: str) -> None:
    weight = torch.randn(16, 8, 3, 3) * 0.01
    result = standardize_weight(weight.cuda(), 1e-5, mode).cpu()
    torch.testing.assert_close(result, reference(weight, 1e-5, mode).float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan")])
def test_refuses_an_eps_that_is_not_positive(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be a number > 0"):
        standardize_weight(torch.randn(2, 3), eps)


def test_refuses_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="one of paper, official, bit, aws; got 'biased'"):
        standardize_weight(torch.randn(2, 3), 1e-5, "biased")


@pytest.mark.parametrize("weight", [torch.randn(3), torch.ones(2, 3, dtype=torch.int64)])
def test_refuses_what_is_not_a_weight(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="floating-point weight"):
        standardize_weight(weight)


def test_weight_of_a_linear_layer() -> None:
    weight = nn.Linear(6, 3).weight
    torch.testing.assert_close(
        standardize_weight(weight), standardize_weight(weight.view(3, 6, 1, 1)).view(3, 6)
    )


@pytest.mark.parametrize("mode", WS_MODES)
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3, 1e-5])
def test_gradient_of_the_fused_path_equals_that_of_the_formula(mode: str, scale: float) -> None:
    """Down to deviations of eps, where its position in the formula matters most."""
    weight = (torch.randn(6, 5, 3, 3, dtype=torch.float64) + 0.3) * scale
    upstream = torch.randn_like(weight)
    first, second = (weight.clone().requires_grad_() for _ in range(2))
    (standardize_weight(first, 1e-5, mode) * upstream).sum().backward()
    scripted = torch.jit.script(standardize_weight)  # takes the formula
    (scripted(second, 1e-5, mode) * upstream).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-7, atol=1e-9 / scale)


@pytest.mark.parametrize("mode", WS_MODES)
def test_gradient_in_channels_last(mode: str) -> None:
    weight, upstream = torch.randn(2, 4, 8, 3, 3).unbind()
    first = weight.clone().requires_grad_()
    second = weight.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
    for w, g in ((first, upstream), (second, upstream)):
        (standardize_weight(w, 1e-5, mode) * g).sum().backward()
    torch.testing.assert_close(second.grad, first.grad)


def random_affine(filters: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    gamma, beta = torch.randn(2, filters, 1, 1, 1, dtype=torch.float64).to(dtype)
    return gamma, beta


@pytest.mark.parametrize("mode", WS_MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_affine_is_scale_and_shift_of_the_formula(mode: str, shape: tuple) -> None:
    weight = 0.01 * torch.randn(shape, dtype=torch.float64)
    gamma, beta = random_affine(shape[0])
    expected = gamma * reference(weight, 1e-5, mode) + beta
    found = standardize_weight(weight, 1e-5, mode, (gamma, beta))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    single = standardize_weight(weight.float(), 1e-5, mode, (gamma.float(), beta.float()))
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)
    half = standardize_weight(weight.bfloat16(), 1e-5, mode, random_affine(shape[0], torch.half))
    assert half.dtype == torch.bfloat16 and half.shape == shape


def test_affine_of_a_weight_is_what_mmcv_takes_from_it() -> None:
    """mmcv 2.1, ConvAWS2d: the mean, and the root of torch's (unbiased) variance + eps."""
    weight = 0.01 * torch.randn(5, 3, 2, 2, dtype=torch.float64) + 0.3
    gamma, beta = affine_of(weight, 1e-5, "aws")
    torch.testing.assert_close(gamma.flatten(), torch.sqrt(weight.flatten(1).var(1) + 1e-5))
    torch.testing.assert_close(beta.flatten(), weight.flatten(1).mean(1))


@pytest.mark.parametrize("mode", WS_MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_affine_of_a_weight_gives_it_back(mode: str, dtype: torch.dtype) -> None:
    """To two roundings, constant and one-element filters included."""
    weight = 0.01 * torch.randn(6, 4, 3, 3) + 0.03 * torch.randn(6, 1, 1, 1)
    weight[0] = 0.3
    for each in (weight.to(dtype), weight[:, :1, :1, :1].to(dtype)):
        found = standardize_weight(each, 1e-5, mode, affine_of(each, 1e-5, mode))
        torch.testing.assert_close(found, each, rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("mode", WS_MODES)
def test_affine_gradients(mode: str) -> None:
    """Also that a filter scaled and shifted is the same filter, to which it is orthogonal."""
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    affine = random_affine(3)
    assert gradcheck(lambda w: standardize_weight(w, 1e-5, mode, affine), weight)
    assert gradgradcheck(lambda w: standardize_weight(w, 1e-5, mode, affine), weight)
    first, second = (weight.detach().clone().requires_grad_() for _ in range(2))
    upstream = torch.randn_like(weight)
    standardize_weight(first, 1e-5, mode, affine).backward(upstream)
    scripted = torch.jit.script(standardize_weight)  # takes the formula
    scripted(second, 1e-5, mode, affine).backward(upstream)
    torch.testing.assert_close(first.grad, second.grad)
    along_weight = (first.grad * weight.detach()).flatten(1).sum(1)
    torch.testing.assert_close(along_weight, torch.zeros_like(along_weight), atol=1e-3, rtol=0)


def test_affine_in_channels_last_and_strided() -> None:
    weight, affine = torch.randn(4, 8, 3, 3), random_affine(4, torch.float32)
    expected = standardize_weight(weight, 1e-5, "aws", affine)
    last = weight.contiguous(memory_format=torch.channels_last)
    strided = torch.stack([weight, weight], -1)[..., 0]
    assert not strided.is_contiguous()
    for other in (last, strided):
        torch.testing.assert_close(standardize_weight(other, 1e-5, "aws", affine), expected)


def test_affine_saves_no_further_filters_for_the_backward() -> None:
    """What WS saves in addition to a plain conv, affine WS does not save again."""

    def saved(affine: Any) -> int:
        sizes = []
        pack = lambda t: sizes.append(t.numel()) or t  # noqa: E731
        weight = torch.randn(4, 8, 3, 3, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            standardize_weight(weight, 1e-5, "aws", affine)
        return sum(sizes)

    assert saved(random_affine(4, torch.float32)) - saved(None) == 2 * 4
