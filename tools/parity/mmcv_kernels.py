"""Lets mmdetection run on mmcv-lite by providing the two kernels it needs.

mmcv-lite has mmcv's Python code, including `RoIAlign`, `nms` and `batched_nms`, but not the
compiled module `mmcv._ext`. This module replaces it with torchvision's kernels; other ops raise.
So the RoIAlign and NMS kernels are torchvision's on both sides of the comparison; their arguments,
the class offsets of batched NMS and everything else are mmcv's.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torchvision import ops


def install() -> None:
    """Makes `import mmcv._ext` return the replacement."""
    module = _Kernels("mmcv._ext")
    module.nms = _nms
    module.roi_align_forward = _roi_align_forward
    sys.modules[module.__name__] = module


class _Kernels(ModuleType):
    nms: Callable[..., torch.Tensor]
    roi_align_forward: Callable[..., None]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"mmcv's compiled op {name}")

        return missing


def _nms(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int
) -> torch.Tensor:
    if offset != 0:
        raise NotImplementedError(f"nms with offset {offset}")
    return ops.nms(boxes, scores, iou_threshold)


def _roi_align_forward(
    features: torch.Tensor,
    rois: torch.Tensor,
    output: torch.Tensor,
    argmax_y: torch.Tensor,
    argmax_x: torch.Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    if pool_mode != 1:
        raise NotImplementedError("RoIAlign with max pooling")
    size = (aligned_height, aligned_width)
    output.copy_(ops.roi_align(features, rois, size, spatial_scale, sampling_ratio, aligned))
