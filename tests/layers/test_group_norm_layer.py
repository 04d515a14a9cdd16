"""`GroupNorm` with the reduction for GPUs, forced on the CPU, compared with torch's."""

import copy
import io
import pickle
from typing import Optional

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ws_detectron.layers import GroupNorm, split_group_norm, use_group_norm

SHAPES = [(2, 6, 5, 7), (2, 6, 1, 1), (3, 6), (2, 6, 4), (2, 6, 2, 3, 4), (0, 6, 5, 7)]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    return tuple(t.to(dtype).requires_grad_() for t in (x, weight, bias))  # type: ignore


@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_equals_torch(shape: tuple[int, ...], affine: bool, groups: int) -> None:
    tensors = inputs(shape)
    x, weight, bias = tensors if affine else (tensors[0], None, None)
    used = [t for t in (x, weight, bias) if t is not None]
    results = [f(x, groups, weight, bias, 1e-3) for f in (split_group_norm, F.group_norm)]
    g = torch.randn_like(results[0])
    ours, theirs = (torch.autograd.grad(result, used, g) for result in results)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_unneeded_gradients_are_not_computed(only: int) -> None:
    tensors = [t.detach() for t in inputs((2, 6, 5, 7))]
    tensors[only].requires_grad_()
    for function in (split_group_norm, F.group_norm):
        function(tensors[0], 3, *tensors[1:]).square().sum().backward()
    found = tensors[only].grad
    assert found is not None and [t.grad is None for t in tensors].count(True) == 2
    tensors[only].grad = None
    F.group_norm(tensors[0], 3, *tensors[1:]).square().sum().backward()
    torch.testing.assert_close(found, 2 * tensors[only].grad)


@pytest.mark.parametrize("affine", [True, False])
def test_derivatives(affine: bool) -> None:
    tensors = inputs((2, 4, 3, 2)) if affine else inputs((2, 4, 3, 2))[:1]

    def norm(
        x: torch.Tensor, weight: Optional[torch.Tensor] = None, bias: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        return split_group_norm(x, 2, weight, bias)

    assert torch.autograd.gradcheck(norm, tensors)
    assert torch.autograd.gradgradcheck(norm, tensors)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.0, 1e-3), (1000.0, 1.0)])
def test_is_as_exact_as_torch(mean: float, deviation: float) -> None:
    """Twice torch's own error is allowed, because the summation order differs."""
    exact, weight, bias = (t.detach() for t in inputs((2, 64, 40, 50)))
    exact = (exact * deviation + mean).float().double()  # the very values of the float32 input
    wanted = F.group_norm(exact, 32, weight.float().double(), bias.float().double())
    errors = [
        (f(exact.float(), 32, weight.float(), bias.float()) - wanted).abs().max()
        for f in (split_group_norm, F.group_norm)
    ]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, weight, bias = inputs((2, 6, 5, 7), dtype)
    result = split_group_norm(x, 3, weight, bias)
    result.sum().backward()
    wide = F.group_norm(x.float(), 3, weight.float(), bias.float())
    torch.testing.assert_close(result, wide.to(dtype), rtol=0, atol=0.05)
    assert result.dtype == x.grad.dtype == weight.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert split_group_norm(x, 3, weight.float(), bias.float()).dtype == torch.float32


def test_uses_torchs_kernels_everywhere_else() -> None:
    stock, ours = nn.GroupNorm(3, 6), GroupNorm(3, 6)
    assert repr(ours) == repr(stock) and isinstance(ours, nn.GroupNorm)
    assert ours.load_state_dict(stock.state_dict()).missing_keys == []
    for shape in SHAPES:
        x = inputs(shape, torch.float32)[0].detach()
        if x.numel():
            torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=0)
        else:
            assert ours(x).shape == x.shape
    x = torch.randn(2, 6, 5, 7)
    scripted = torch.jit.script(ours)
    torch.testing.assert_close(scripted(x), stock(x))
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), stock(x))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(copied(x), stock(x))


def test_use_group_norm_converts_a_stock_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.BatchNorm2d(6))
    state = copy.deepcopy(model.state_dict())
    assert use_group_norm(model) is model
    assert [type(m) for m in model] == [nn.Conv2d, GroupNorm, nn.BatchNorm2d]
    torch.testing.assert_close(dict(model.state_dict()), dict(state))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_splits_on_a_gpu_below_the_limit(memory_format: torch.memory_format) -> None:
    norm, stock = GroupNorm(32, 64).cuda(), nn.GroupNorm(32, 64).cuda()
    norm.split_below = 2 * 32 + 1
    for images, splits in ((2, memory_format is torch.contiguous_format), (3, False)):
        x = torch.randn(images, 64, 30, 40, device="cuda").to(memory_format=memory_format)
        assert norm._splits(x) == splits
        torch.testing.assert_close(norm(x), stock(x))
