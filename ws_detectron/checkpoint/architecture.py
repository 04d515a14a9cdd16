"""Infers the ResNet architecture of a state dict and checks all its keys and shapes.

Keys are detectron2's, relative to the ResNet: `stem.conv1.weight`, `res2.0.conv1.norm.bias`, ...
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ws_detectron.errors import WeightsError, list_some

_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ResNetArchitecture:
    """A post-activation ResNet or ResNeXt (arXiv:1512.03385, arXiv:1611.05431).

    Attributes:
        depth: 18, 34, 50, 101 or 152.
        groups: number of groups of the 3x3 convs in bottlenecks.
        width_per_group: channels per group of these convs in the first stage.
    """

    depth: int
    groups: int = 1
    width_per_group: int = 64

    @property
    def name(self) -> str:
        """For example "R-50" or "X-101-32x4d"."""
        if self.groups > 1:
            return f"X-{self.depth}-{self.groups}x{self.width_per_group}d"
        wide = "" if self.width_per_group == 64 else f"-width{self.width_per_group}"
        return f"R-{self.depth}{wide}"

    def conv_shapes(self) -> dict[str, Shape]:
        """Name of each conv -> shape of its weight (O, I/g, kh, kw)."""
        shapes: dict[str, Shape] = {"stem.conv1": (64, 3, 7, 7)}
        channels = 64
        bottleneck = self.depth >= 50
        for stage, blocks in enumerate(_BLOCKS[self.depth]):
            plain = 64 * 2**stage
            width = self.groups * self.width_per_group * 2**stage if bottleneck else plain
            out = plain * 4 if bottleneck else plain
            for block in range(blocks):
                prefix = f"res{stage + 2}.{block}"
                if bottleneck:
                    shapes[f"{prefix}.conv1"] = (width, channels, 1, 1)
                    shapes[f"{prefix}.conv2"] = (width, width // self.groups, 3, 3)
                    shapes[f"{prefix}.conv3"] = (out, width, 1, 1)
                else:
                    shapes[f"{prefix}.conv1"] = (width, channels, 3, 3)
                    shapes[f"{prefix}.conv2"] = (out, width, 3, 3)
                if channels != out:
                    shapes[f"{prefix}.shortcut"] = (out, channels, 1, 1)
                channels = out
        return shapes


def infer_architecture(state: Mapping[str, torch.Tensor], path: str) -> ResNetArchitecture:
    """Finds the architecture and checks every key and shape of the ResNet against it.

    Args:
        state: the tensors of the ResNet only, under keys as in the module docstring.
        path: the file, for messages.

    Raises:
        WeightsError: the block counts match no known depth, or a key is missing, unexpected, or of
            the wrong shape.
    """
    blocks: dict[int, set[int]] = {}
    for key in state:
        match = re.match(r"res(\d+)\.(\d+)\.", key)
        if match:
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    counts = tuple(len(blocks[stage]) for stage in sorted(blocks))
    bottleneck = any(re.match(r"res\d+\.\d+\.conv3\.", key) for key in state)
    depths = [d for d, known in _BLOCKS.items() if known == counts and (d >= 50) == bottleneck]
    if not depths:
        kind = "bottleneck" if bottleneck else "basic"
        known = ", ".join(f"R-{depth}: {count}" for depth, count in _BLOCKS.items())
        raise WeightsError(
            f"{path} has {counts or 'no'} {kind} blocks in its ResNet stages; supported: {known}"
        )
    groups, width = 1, 64
    second = state.get("res2.0.conv2.weight")
    if bottleneck and second is not None and second.dim() == 4 and second.size(1) > 0:
        groups = max(second.size(0) // second.size(1), 1)
        width = second.size(0) // groups
    architecture = ResNetArchitecture(depths[0], groups, width)
    _check_tensors(state, architecture, path)
    return architecture


def _check_tensors(
    state: Mapping[str, torch.Tensor], architecture: ResNetArchitecture, path: str
) -> None:
    stem_norm = [name for name in _NORM_TENSORS if f"stem.conv1.norm.{name}" in state]
    if "weight" not in stem_norm or "bias" not in stem_norm:
        raise WeightsError(f"{path} has no norm layer after the first conv of its ResNet")
    expected: dict[str, Shape] = {}
    for conv, shape in architecture.conv_shapes().items():
        expected[f"{conv}.weight"] = shape
        expected.update({f"{conv}.norm.{name}": shape[:1] for name in stem_norm})
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    for what, items in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)):
        if items:
            raise WeightsError(
                f"{path} is not a whole {architecture.name}; {what}: {list_some(items)}"
            )
