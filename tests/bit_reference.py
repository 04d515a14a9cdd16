"""BiT's ResNetV2 as one function of a state dict, and random state dicts in the published formats.

Written from arXiv:1912.11370, arXiv:1603.05027 and the shapes in bit_pytorch/models.py of
google-research/big_transfer, in other terms than the code under test.
"""

import re
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

BLOCKS = (3, 4, 6, 3)  # of R-50
INPUT = ["MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3, "INPUT.FORMAT", "RGB"]
# A half of the published width: 32 channels, the fewest that GN of 32 groups can have.
NARROW: list[Any] = [
    *["MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 32],
    *["MODEL.RESNETS.RES2_OUT_CHANNELS", 128, "MODEL.RESNETS.STRIDE_IN_1X1", False],
]


def timm_shapes(width: int = 32, classes: int = 10) -> dict[str, tuple[int, ...]]:
    """Key -> shape of timm's `resnetv2_50x1_bit` with another width than 64."""
    shapes: dict[str, tuple[int, ...]] = {"stem.conv.weight": (width, 3, 7, 7)}
    channels = width
    for stage, blocks in enumerate(BLOCKS):
        middle = width * 2**stage
        for block in range(blocks):
            name = f"stages.{stage}.blocks.{block}"
            if block == 0:
                shapes[f"{name}.downsample.conv.weight"] = (4 * middle, channels, 1, 1)
            shapes[f"{name}.conv1.weight"] = (middle, channels, 1, 1)
            shapes[f"{name}.conv2.weight"] = (middle, middle, 3, 3)
            shapes[f"{name}.conv3.weight"] = (4 * middle, middle, 1, 1)
            for norm, size in (("norm1", channels), ("norm2", middle), ("norm3", middle)):
                shapes[f"{name}.{norm}.weight"] = shapes[f"{name}.{norm}.bias"] = (size,)
            channels = 4 * middle
    shapes["norm.weight"] = shapes["norm.bias"] = (channels,)
    shapes["head.fc.weight"], shapes["head.fc.bias"] = (classes, channels, 1, 1), (classes,)
    return shapes


def random_timm_state(**kwargs: int) -> dict[str, torch.Tensor]:
    """Filters with a mean and scale of their own, and norms that are not the identity."""
    state = {}
    for key, shape in timm_shapes(**kwargs).items():
        state[key] = 0.2 * torch.randn(shape)
        if len(shape) == 4:
            per_filter = torch.randn(shape[0], 1, 1, 1)
            state[key] = state[key] * per_filter.exp() * 0.1 + 0.02 * per_filter
        elif key.endswith("weight"):
            state[key] += 1
    return state


def as_google(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The same weights under the names and in the layout of Google's `.npz` files."""
    arrays = {}
    for key, value in state.items():
        key = key.replace("stem.conv.weight", "root_block/standardized_conv2d/kernel")
        key = key.replace("head.fc.weight", "head/conv2d/kernel")
        key = key.replace("head.fc.bias", "head/conv2d/bias")
        key = re.sub(
            r"stages\.(\d)\.blocks\.(\d+)\.",
            lambda match: f"block{int(match[1]) + 1}/unit{int(match[2]) + 1:02d}/",
            key,
        )
        key = key.replace("downsample.conv.weight", "a/proj/standardized_conv2d/kernel")
        for number, letter in enumerate("abc", start=1):
            key = key.replace(f"conv{number}.weight", f"{letter}/standardized_conv2d/kernel")
            key = key.replace(f"norm{number}.weight", f"{letter}/group_norm/gamma")
            key = key.replace(f"norm{number}.bias", f"{letter}/group_norm/beta")
        key = re.sub("^norm.weight", "group_norm/gamma", key)
        key = re.sub("^norm.bias", "group_norm/beta", key)
        array = value.numpy()
        arrays[f"resnet/{key}"] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    return arrays


def bit_stages(
    state: dict[str, torch.Tensor], x: torch.Tensor, eps: float
) -> dict[str, torch.Tensor]:
    """What the network reads of each stage: its sum after the norm and ReLU that follow it.

    Args:
        state: with timm's keys.
        x: normalized images (N, 3, H, W).
        eps: of WS.
    """

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        filters = weight.flatten(1)
        centered = filters - filters.mean(dim=1, keepdim=True)
        scale = (centered.square().mean(dim=1, keepdim=True) + eps).sqrt()
        weight = (centered / scale).view_as(weight)
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"]).relu()

    x = conv("stem.conv", x, stride=2)
    images, channels, height, width = x.shape
    padded = x.new_zeros(images, channels, height + 2, width + 2)
    padded[:, :, 1:-1, 1:-1] = x
    x = padded.unfold(2, 3, 2).unfold(3, 3, 2).amax(dim=(-1, -2))
    sums = []
    for stage, blocks in enumerate(BLOCKS):
        for block in range(blocks):
            name = f"stages.{stage}.blocks.{block}"
            a = norm(f"{name}.norm1", x)
            stride = 2 if stage > 0 and block == 0 else 1
            shortcut = x if block else conv(f"{name}.downsample.conv", a, stride)
            y = norm(f"{name}.norm2", conv(f"{name}.conv1", a))
            y = norm(f"{name}.norm3", conv(f"{name}.conv2", y, stride))
            x = conv(f"{name}.conv3", y) + shortcut
        sums.append(x)
    following = [*(f"stages.{stage}.blocks.0.norm1" for stage in (1, 2, 3)), "norm"]
    return {f"res{i}": norm(name, x) for i, (name, x) in enumerate(zip(following, sums), start=2)}
