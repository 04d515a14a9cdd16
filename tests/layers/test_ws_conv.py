"""WSConv2d equals a plain Conv2d with standardized filters, in every use of a Conv2d."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.nn import functional as F

from ws_detectron.layers import WS_MODES, WSConv2d, standardize_weight

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride, padding": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 4},
    "depthwise": {"groups": 8},
    "no bias": {"bias": False},
    "norm and activation": {"norm": nn.GroupNorm(4, 16), "activation": F.relu},
}


def expected_output(conv: WSConv2d, x: torch.Tensor) -> torch.Tensor:
    """The output of a stock Conv2d with the standardized filters."""
    kwargs = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
    stock = Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        bias=conv.bias is not None,
        norm=conv.norm,
        activation=conv.activation,
        **kwargs,
    )
    stock.weight.data = standardize_weight(conv.weight.detach(), conv.ws_eps, conv.ws_mode)
    if conv.bias is not None:
        stock.bias.data = conv.bias.detach()
    return stock(x)


@pytest.mark.parametrize("mode", WS_MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_a_plain_conv_with_standardized_filters(mode: str, variant: str) -> None:
    conv = WSConv2d(8, 16, 3, ws_mode=mode, ws_eps=1e-3, **VARIANTS[variant])
    x = torch.randn(2, 8, 9, 11)
    torch.testing.assert_close(conv(x), expected_output(conv, x))


def test_trains_the_raw_weight_through_its_standardization() -> None:
    conv = WSConv2d(4, 8, 3, norm=nn.GroupNorm(4, 8))
    x, upstream = torch.randn(2, 4, 7, 7), torch.randn(2, 8, 5, 5)
    (conv(x) * upstream).sum().backward()
    weight = conv.weight.detach().clone().requires_grad_()
    y = conv.norm(F.conv2d(x, standardize_weight(weight, 1e-5, "official"), conv.bias))
    (y * upstream).sum().backward()
    torch.testing.assert_close(conv.weight.grad, weight.grad)
    for name, parameter in conv.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_state_dict_interchanges_with_plain_conv() -> None:
    ws, plain = WSConv2d(4, 8, 3, norm=nn.GroupNorm(4, 8)), Conv2d(4, 8, 3, norm=nn.GroupNorm(4, 8))
    assert list(ws.state_dict()) == list(plain.state_dict())
    ws.load_state_dict(plain.state_dict())
    torch.testing.assert_close(ws.weight, plain.weight)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training: bool) -> None:
    conv = WSConv2d(4, 8, 3, padding=1, norm=nn.GroupNorm(4, 8), activation=F.relu).train(training)
    y = conv(torch.zeros(0, 4, 14, 14))
    assert y.shape == (0, 8, 14, 14)
    y.sum().backward()
    torch.testing.assert_close(conv.weight.grad, torch.zeros_like(conv.weight))


def test_channels_last() -> None:
    conv = WSConv2d(8, 16, 3, norm=nn.GroupNorm(4, 16))
    x = torch.randn(2, 8, 9, 9)
    expected = conv(x)
    y = conv.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)


def test_cpu_autocast_convolves_in_bfloat16_with_filters_of_float32() -> None:
    # A large common offset: standardized in bfloat16, these filters would lose all their digits.
    conv = WSConv2d(8, 16, 3)
    conv.weight.data = conv.weight.data * 0.01 + 1.0
    x = torch.randn(2, 8, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    # 8 bits of mantissa over a sum of 72 products
    torch.testing.assert_close(y.float(), conv(x), rtol=2e-2, atol=0.2)
    y.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_its_autocast() -> None:
    conv = WSConv2d(8, 16, 3, norm=nn.GroupNorm(4, 16)).cuda()
    x = torch.randn(2, 8, 9, 9, device="cuda")
    expected = copy.deepcopy(conv).cpu()(x.cpu())
    torch.testing.assert_close(conv(x).cpu(), expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda"):
        y = conv(x)
    torch.testing.assert_close(y.float().cpu(), expected, rtol=2e-2, atol=2e-2)


def test_script_and_trace_equal_eager() -> None:
    conv = WSConv2d(4, 8, 3, norm=nn.GroupNorm(4, 8), activation=nn.ReLU()).eval()
    x = torch.randn(2, 4, 9, 9)
    scripted = torch.jit.script(conv)
    torch.testing.assert_close(scripted(x), conv(x))
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), conv(x))
    traced = torch.jit.trace(conv, x)
    other = torch.randn(3, 4, 12, 7)
    torch.testing.assert_close(traced(other), conv(other))


def test_compile_equals_eager_without_graph_breaks() -> None:
    """`aot_eager` captures forward and backward as the default backend does, without gcc."""
    conv = WSConv2d(4, 8, 3, norm=nn.GroupNorm(4, 8), activation=nn.ReLU())
    compiled = torch.compile(copy.deepcopy(conv), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(compiled(x), conv(x))
    upstream = torch.randn(2, 8, 7, 7)
    (compiled(x) * upstream).sum().backward()
    (conv(x) * upstream).sum().backward()
    compiled_weight = compiled.get_parameter("_orig_mod.weight")
    # eager takes fused kernels, a compiler the formula: same values up to the order of sums
    torch.testing.assert_close(compiled_weight.grad, conv.weight.grad, rtol=1e-4, atol=1e-5)


def test_deepcopy_and_pickle() -> None:
    conv = WSConv2d(4, 8, 3, norm=nn.GroupNorm(4, 8), ws_mode="bit", ws_eps=1e-6)
    x = torch.randn(1, 4, 9, 9)
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert isinstance(twin, WSConv2d) and (twin.ws_mode, twin.ws_eps) == ("bit", 1e-6)
        torch.testing.assert_close(twin(x), conv(x))


def plain_and_affine(**kwargs: Any) -> tuple[Conv2d, WSConv2d]:
    plain = Conv2d(4, 8, 3, norm=nn.GroupNorm(4, 8), **kwargs)
    with torch.no_grad():
        plain.weight.copy_(0.1 * torch.randn_like(plain.weight) + 0.05 * torch.randn(8, 1, 1, 1))
    norm = copy.deepcopy(plain.norm)
    return plain, WSConv2d(4, 8, 3, norm=norm, ws_mode="aws", ws_affine=True, **kwargs)


def test_affine_conv_has_mmcvs_buffers_and_starts_as_a_ws_conv() -> None:
    plain, conv = plain_and_affine()
    assert {name: tuple(value.shape) for name, value in conv.named_buffers()} == {
        "weight_gamma": (8, 1, 1, 1),
        "weight_beta": (8, 1, 1, 1),
    }
    assert not any(buffer.requires_grad for buffer in conv.buffers())
    assert set(conv.state_dict()) - set(plain.state_dict()) == {"weight_gamma", "weight_beta"}
    other = WSConv2d(4, 8, 3, norm=conv.norm, ws_mode="aws")
    other.load_state_dict(plain.state_dict())
    assert not list(other.buffers())
    conv.weight, conv.bias = other.weight, other.bias
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(conv(x), other(x))


def test_plain_weights_fill_the_buffers_and_a_checkpoint_brings_its_own() -> None:
    plain, conv = plain_and_affine()
    x = torch.randn(2, 4, 9, 9)
    assert conv.load_state_dict(plain.state_dict()) == ([], [])  # none is missing
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        conv.weight += torch.randn_like(conv.weight)  # as by training
    assert not torch.allclose(conv(x), plain(x), atol=0.1)
    again = plain_and_affine()[1]
    again.load_state_dict(conv.state_dict())
    torch.testing.assert_close(again(x), conv(x), rtol=0, atol=0)
    torch.testing.assert_close(again.weight_beta, plain.weight.mean((1, 2, 3), keepdim=True))


def test_half_of_the_buffers_is_not_filled() -> None:
    plain, conv = plain_and_affine()
    state = {**plain.state_dict(), "weight_gamma": torch.ones(8, 1, 1, 1)}
    with pytest.raises(RuntimeError, match="Missing key.*weight_beta"):
        conv.load_state_dict(state)
    wrong = {**plain.state_dict(), "weight": torch.ones(8, 4, 1, 1)}
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        conv.load_state_dict(wrong)


def test_training_changes_an_affine_conv_as_the_formula_says() -> None:
    """Three steps of SGD, by the formula written out, with autograd through all of it."""
    plain, conv = plain_and_affine(bias=False)
    conv.load_state_dict(plain.state_dict())
    weight = plain.weight.detach().clone().requires_grad_()
    flat = weight.detach().flatten(1)
    gamma, beta = torch.sqrt(flat.var(1) + 1e-5), flat.mean(1)
    for _ in range(3):
        x = torch.randn(2, 4, 9, 9)
        rows = weight.flatten(1)
        standardized = (rows - rows.mean(1, keepdim=True)) / torch.sqrt(
            rows.var(1, keepdim=True) + 1e-5
        )
        filters = (gamma[:, None] * standardized + beta[:, None]).view_as(weight)
        expected = plain.norm(F.conv2d(x, filters))
        torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)
        for result, each in ((expected, weight), (conv(x), conv.weight)):
            (gradient,) = torch.autograd.grad(result.pow(3).mean(), each)
            with torch.no_grad():
                each -= 0.1 * gradient
    assert (weight - plain.weight).abs().max() > 0.01
    torch.testing.assert_close(conv.weight, weight, rtol=1e-4, atol=1e-5)


def test_affine_conv_scripted_traced_compiled_copied_and_in_bfloat16() -> None:
    plain, conv = plain_and_affine()
    conv.load_state_dict(plain.state_dict())
    with torch.no_grad():
        conv.weight += 0.1 * torch.randn_like(conv.weight)
    x = torch.randn(2, 4, 9, 9)
    expected = conv(x)
    for other in (
        torch.jit.script(conv),
        torch.jit.trace(conv, x),
        torch.compile(conv, fullgraph=True, backend="aot_eager"),
        copy.deepcopy(conv),
        pickle.loads(pickle.dumps(conv)),
    ):
        torch.testing.assert_close(other(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = conv(x)
    # 8 bits of mantissa; GN divides by a deviation below 1
    torch.testing.assert_close(result.float(), expected, rtol=5e-2, atol=5e-2)


def test_is_a_detectron2_conv_that_shows_its_mode() -> None:
    conv = WSConv2d(4, 8, 3, ws_mode="paper", ws_eps=1e-3)
    assert isinstance(conv, Conv2d)
    assert "ws_eps=0.001, ws_mode=paper)" in repr(conv)
    assert "ws_mode=aws, ws_affine=True" in repr(WSConv2d(4, 8, 3, ws_mode="aws", ws_affine=True))


def test_refuses_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="mode must be one of"):
        WSConv2d(4, 8, 3, ws_mode="Paper")
    with pytest.raises(ValueError, match="eps must be"):
        WSConv2d(4, 8, 3, ws_eps=0.0)
    with pytest.raises(ValueError, match="padding_mode=reflect"):
        WSConv2d(4, 8, 3, padding=1, padding_mode="reflect")
