"""Times WS over all filters of a ResNet, and GN over all its features, without convolutions."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from torch.nn import functional as F

from ws_detectron.engine import load_config
from ws_detectron.layers import (
    WS_MODES,
    WSConv2d,
    split_group_norm,
    standardize_weight,
    standardize_weights,
)
from ws_detectron.modeling import build_ws_resnet_backbone

from .timing import Action, interleave, time_and_memory

COPY = "copy"
OURS = {mode: f"ws_detectron, {mode}" for mode in WS_MODES}
TOGETHER = "ws_detectron, official, in few launches"


def backbone_filters(depth: int, device: str) -> list[torch.Tensor]:
    """The filters of a ResNet as detectron2 builds and initializes them, one tensor per conv."""
    cfg = load_config(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn_ws_1img.yaml",
        ["MODEL.RESNETS.DEPTH", str(depth), "MODEL.BACKBONE.FREEZE_AT", "0"],
    )
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    backbone = build_ws_resnet_backbone(cfg, ShapeSpec(channels=3))
    convs = [module for module in backbone.modules() if isinstance(module, WSConv2d)]
    return [conv.weight.detach().to(device).requires_grad_() for conv in convs]


def measure_operation(
    device: str, rounds: int = 30, warmup: int = 2, depth: int = 50
) -> Iterator[dict[str, Any]]:
    """WS over all filters of a ResNet, forward and backward, for every implementation.

    Args:
        device, rounds, warmup: as for `interleave`.
        depth: depth of the ResNet.

    Yields:
        One part: `facts`, and the items of `time_and_memory`.
    """
    weights = backbone_filters(depth, device)
    upstream = [torch.randn_like(weight) for weight in weights]
    source, target = ([w.detach().clone() for w in weights] for _ in range(2))

    def together() -> None:
        torch.autograd.grad(standardize_weights(weights, 1e-5, "official"), weights, upstream)

    def one_by_one(formula: Callable[[torch.Tensor], torch.Tensor]) -> None:
        torch.autograd.grad([formula(weight) for weight in weights], weights, upstream)

    # in few launches, as on a GPU one launch per filter would take longer than the copy itself
    actions: dict[str, Action] = {COPY: lambda: torch._foreach_copy_(target, source)}
    if device == "cuda":
        actions[TOGETHER] = together  # as in a model
    actions.update({name: partial(one_by_one, formula) for name, formula in FORMULAS.items()})
    facts = {
        "filters": len(weights),
        "values": sum(weight.numel() for weight in weights),
        "threads": torch.get_num_threads(),
    }
    yield {"facts": facts, **time_and_memory(actions, rounds, warmup, device)}


def _layer_norm(weight: torch.Tensor) -> torch.Tensor:
    rows = weight.flatten(1)
    return F.layer_norm(rows, [rows.size(1)]).view_as(weight)


def _as_the_authors_do(weight: torch.Tensor) -> torch.Tensor:
    """Means over one dimension after the other, then the unbiased standard deviation."""
    mean = weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    centred = weight - mean
    deviation = centred.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
    return centred / deviation.expand_as(centred)


def _as_mmcv_does(weight: torch.Tensor) -> torch.Tensor:
    """Mean and unbiased standard deviation of each filter as a row (mmcv's conv_ws_2d)."""
    rows = weight.view(len(weight), -1)
    mean, deviation = (f(rows, 1, keepdim=True).view(-1, 1, 1, 1) for f in (torch.mean, torch.std))
    return (weight - mean) / (deviation + 1e-5)


def _as_timm_does(weight: torch.Tensor) -> torch.Tensor:
    """Batch norm with the filters as channels of one example (timm's StdConv2d)."""
    rows = weight.reshape(1, len(weight), -1)
    return F.batch_norm(rows, None, None, training=True, eps=1e-6).reshape_as(weight)


def _as_bit_does(weight: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
    return (weight - mean) / torch.sqrt(variance + 1e-10)


FORMULAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{name: partial(standardize_weight, mode=mode) for mode, name in OURS.items()},
    "layer norm, without affine": _layer_norm,
    "authors' operations": _as_the_authors_do,
    "mmcv's operations": _as_mmcv_does,
    "timm's operations": _as_timm_does,
    "BiT's operations": _as_bit_does,
}
"""Name -> an implementation: ours in each mode, and the torch operations of other code."""
SIZE = (800, 1344)
"""Height and width of the images whose features GN normalizes, pixels."""
GROUP_NORMS = {"nn.GroupNorm": F.group_norm, "ws_detectron, split": split_group_norm}


def measure_group_norm(device: str, rounds: int = 30, warmup: int = 2) -> Iterator[dict[str, Any]]:
    """GN over all features of R-50-FPN, forward and backward: torch's and ours.

    Args:
        device, rounds, warmup: as for `interleave`.

    Yields:
        For each number of images and groups `facts`, and `seconds`, name -> seconds of each round.
    """
    for images, groups in itertools.product((1, 2, 4, 8), (8, 32)):
        layers = []
        for channels, h, w, number in _feature_shapes(*SIZE):
            shapes = ((images, channels, h, w), (channels,), (channels,))
            tensors = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
            layers += [(tensors, torch.randn_like(tensors[0]))] * number
        actions = {n: partial(_all_norms, norm, groups, layers) for n, norm in GROUP_NORMS.items()}
        facts = {"images": images, "groups": groups, "height": SIZE[0], "width": SIZE[1]}
        yield {"facts": facts, "seconds": interleave(actions, rounds, warmup, device)}


def _all_norms(
    norm: Callable, groups: int, layers: Sequence[tuple[list[torch.Tensor], torch.Tensor]]
) -> None:
    for tensors, upstream in layers:
        x, weight, bias = tensors
        torch.autograd.grad(norm(x, groups, weight, bias), tensors, upstream)


def _feature_shapes(height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(channels, height, width, number of norms) of the features of R-50-FPN at an image size."""
    yield 64, height // 2, width // 2, 1
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3)):
        h, w, middle = height >> stage, width >> stage, 64 << (stage - 2)
        yield middle, h, w, 2 * blocks
        yield 4 * middle, h, w, blocks + 1
        yield 256, h, w, 2
