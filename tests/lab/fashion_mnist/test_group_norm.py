"""`ChannelsLastGroupNorm` against torch's own group norm."""

from typing import Any

import pytest
import torch
from torch import nn

from ws_detectron.lab.fashion_mnist.model import ChannelsLastGroupNorm


def layers(groups: int, channels: int, **options: Any) -> tuple[nn.GroupNorm, nn.GroupNorm]:
    """torch's and ours, with the same random scales and biases."""
    torch.manual_seed(groups + channels)
    theirs, ours = (
        layer(groups, channels, **options) for layer in (nn.GroupNorm, ChannelsLastGroupNorm)
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("images", [1, 3])
def test_outputs_and_gradients_are_those_of_torch(groups: int, images: int) -> None:
    theirs, ours = layers(groups, 8, dtype=torch.float64)
    x = torch.randn(images, 8, 5, 7, dtype=torch.float64) * 3 + 1
    gradient = torch.randn_like(x)
    results = []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(gradient)
        results.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    _, ours = layers(3, 6, dtype=torch.float64)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, x)


def test_float32_after_a_relu_is_as_exact_as_torch() -> None:
    """Images of 28 x 28 whose values are positive, where mean(x^2) - mean^2 has to subtract."""
    theirs, ours = layers(32, 64)
    x = (torch.randn(4, 64, 28, 28) + torch.randn(64, 1, 1)).relu()
    exact = nn.GroupNorm(32, 64, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    expected = exact(x.double())
    error, theirs_error = ((layer(x) - expected).abs().max().item() for layer in (ours, theirs))
    assert error < max(4 * theirs_error, 1e-5)


def test_constant_features_give_the_bias_and_finite_gradients() -> None:
    _, ours = layers(2, 4)
    x = torch.full((2, 4, 3, 3), 0.7).requires_grad_()
    y = ours(x)
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    torch.testing.assert_close(y, ours.bias.view(4, 1, 1).expand_as(y), rtol=0, atol=1e-3)


def test_the_result_is_channels_last_whatever_the_input_is() -> None:
    _, ours = layers(4, 8)
    x = torch.randn(2, 8, 5, 5)
    for features in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        assert ours(features).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x.contiguous(memory_format=torch.channels_last)), ours(x))


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5)])
def test_features_without_pixels_are_normalized_by_torch(shape: tuple[int, ...]) -> None:
    theirs, ours = layers(4, 8)
    x = torch.randn(shape)
    assert torch.equal(ours(x), theirs(x))


def test_under_autocast_it_is_torchs() -> None:
    theirs, ours = layers(4, 8)
    x = torch.randn(2, 8, 5, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = theirs(x), ours(x)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
