"""`GroupNorm`: torch's layer with the option to compute its statistics on the whole GPU.

Wu, He, "Group Normalization" (arXiv:1803.08494). torch's CUDA kernel computes the statistics of
each image and group in one block of threads, so 1 image with 32 groups occupies 32 of the 132
multiprocessors of an H100 (aten/src/ATen/native/cuda/group_norm_kernel.cu). `torch.var_mean`
splits the same sums over the whole device.

Shape letters: N images, C channels, G groups, S pixels.
"""

from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F

from .standardize import in_graph_capture


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with the same parameters, state dict and results.

    On CUDA, `split_group_norm` is used where N * G is less than `split_below`. torch's own kernels
    are used otherwise, and always on the CPU, in TorchScript, under a tracer or compiler, and for
    channels-last inputs.

    Attributes:
        split_below: a limit for N * G, set on the class or on a layer. The default 0 never splits:
            the break-even point has not been measured on a GPU yet.
    """

    split_below: int = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes x, (N, C, ...), over the channels and pixels of each group."""
        if torch.jit.is_scripting():
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        else:
            norm = split_group_norm if self._splits(x) else F.group_norm
            return norm(x, self.num_groups, self.weight, self.bias, self.eps)

    @torch.jit.unused
    def _splits(self, x: torch.Tensor) -> bool:
        return (
            x.is_cuda
            and x.size(0) * self.num_groups < self.split_below
            and x.numel() > x.size(1)  # torch refuses a group of one value
            and x.is_contiguous()
            and not in_graph_capture()
        )


def use_group_norm(module: nn.Module) -> nn.Module:
    """Turns each plain `nn.GroupNorm` of `module` into ours, in place; returns `module`."""
    for norm in module.modules():
        if type(norm) is nn.GroupNorm:
            norm.__class__ = GroupNorm
    return module


def split_group_norm(
    x: torch.Tensor,
    groups: int,
    weight: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    r"""`F.group_norm` with a reduction that uses the whole device.

    With mean m and population variance v of the C/G * S values of a group, and s = sqrt(v + eps):

        y = x * a + b,    a = weight / s,    b = bias - m * a

    with one pass over x for m and v and one for y. The backward is torch's own kernel. It needs
    statistics in the dtype of x, so half precision is computed in float32. As in `F.group_norm`,
    the result has the dtype of x, or float32 under autocast. Twice differentiable.

    Args:
        x: (N, C, ...), contiguous and not empty.
        groups: G, a divisor of C.
        weight, bias: (C,), or None for 1 and 0.
        eps: added to v.
    """
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    result = _SplitGroupNorm.apply(
        x.to(wide),
        groups,
        None if weight is None else weight.to(wide),
        None if bias is None else bias.to(wide),
        eps,
    )
    autocast = torch.is_autocast_enabled() if x.is_cuda else torch.is_autocast_cpu_enabled()
    return result if autocast else result.to(x.dtype)


class _SplitGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        groups: int,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        eps: float,
    ) -> torch.Tensor:
        images, channels = x.shape[:2]
        variance, mean = torch.var_mean(x.view(images, groups, -1), dim=2, unbiased=False)
        inverse = torch.rsqrt(variance + eps)
        per_channel = (images, groups, channels // groups)
        scale = inverse.unsqueeze(2).expand(per_channel)
        if weight is not None:
            scale = scale * weight.view(groups, -1)
        shift = -mean.unsqueeze(2) * scale
        if bias is not None:
            shift = shift + bias.view(groups, -1)
        scale, shift = (s.reshape(images, channels, 1) for s in (scale, shift))
        result = torch.addcmul(shift, x.view(images, channels, -1), scale).view_as(x)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.groups, ctx.eps = groups, eps
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            result = F.group_norm(x, ctx.groups, weight, bias, ctx.eps)
            inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
            grads = iter(torch.autograd.grad(result, inputs, gradient, create_graph=True))
            dx, dweight, dbias = (
                next(grads) if t is not None and t.requires_grad else None
                for t in (x, weight, bias)
            )
            return dx, None, dweight, dbias, None
        images, channels = x.shape[:2]
        sizes = images, channels, x.numel() // (images * channels), ctx.groups
        mask = [ctx.needs_input_grad[n] for n in (0, 2, 3)]
        dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
            gradient.contiguous(), x, mean, inverse, weight, *sizes, mask
        )
        return dx, None, dweight, dbias, None
