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


def test_is_a_detectron2_conv_that_shows_its_mode() -> None:
    conv = WSConv2d(4, 8, 3, ws_mode="paper", ws_eps=1e-3)
    assert isinstance(conv, Conv2d)
    assert "ws_eps=0.001, ws_mode=paper" in repr(conv)


def test_refuses_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="mode must be one of"):
        WSConv2d(4, 8, 3, ws_mode="Paper")
    with pytest.raises(ValueError, match="eps must be"):
        WSConv2d(4, 8, 3, ws_eps=0.0)
    with pytest.raises(ValueError, match="padding_mode=reflect"):
        WSConv2d(4, 8, 3, padding=1, padding_mode="reflect")
