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

from .timing import Action, interleave, spread, time_and_memory

COPY, LAYER_NORM = "copy", "layer norm, without affine"
OURS = {mode: f"ws_detectron, {mode}" for mode in WS_MODES}
TOGETHER = "ws_detectron, official, in few launches"
STOCK_NORM, SPLIT_NORM = "nn.GroupNorm", "ws_detectron, split"

Standardize = Callable[[torch.Tensor], torch.Tensor]


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
    device: str, rounds: int, warmup: int, depth: int = 50
) -> Iterator[dict[str, Any]]:
    """Times forward and backward over all filters, for every implementation.

    Args:
        device, rounds, warmup: as for `interleave`.
        depth: depth of the ResNet.

    Yields:
        One part: `facts`, and the items of `time_and_memory`.
    """
    weights = backbone_filters(depth, device)
    upstream = [torch.randn_like(weight) for weight in weights]
    source, target = ([w.detach().clone() for w in weights] for _ in range(2))

    def both_directions(standardize_all: Callable[[], Sequence[torch.Tensor]]) -> None:
        torch.autograd.grad(standardize_all(), weights, upstream)

    # in few launches, as on a GPU one launch per filter would take longer than the copy itself
    actions: dict[str, Action] = {COPY: lambda: torch._foreach_copy_(target, source)}
    if device == "cuda":  # as in a model
        together = partial(standardize_weights, weights, 1e-5, "official")
        actions[TOGETHER] = partial(both_directions, together)
    for name, formula in formulas().items():
        one_by_one = partial(lambda formula: [formula(weight) for weight in weights], formula)
        actions[name] = partial(both_directions, one_by_one)
    facts = {
        "filters": len(weights),
        "values": sum(weight.numel() for weight in weights),
        "threads": torch.get_num_threads(),
    }
    yield {"facts": facts, **time_and_memory(actions, rounds, warmup, device)}


def formulas() -> dict[str, Standardize]:
    """Name -> an implementation: ours in each mode, and the torch operations of other code."""
    return {
        **{name: partial(standardize_weight, mode=mode) for mode, name in OURS.items()},
        LAYER_NORM: _layer_norm,
        "authors' operations": _as_the_authors_do,
        "mmcv's operations": _as_mmcv_does,
        "timm's operations": _as_timm_does,
        "BiT's operations": _as_bit_does,
    }


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


def measure_group_norm(
    device: str,
    rounds: int,
    warmup: int,
    *,
    images: Sequence[int] = (1, 2, 4, 8),
    groups: Sequence[int] = (8, 32),
    size: tuple[int, int] = (800, 1344),
) -> Iterator[dict[str, Any]]:
    """Times GN alone, forward and backward, over all features of R-50-FPN: torch's and ours.

    Args:
        device, rounds, warmup: as for `interleave`.
        images, groups: every combination is measured.
        size: height and width of the images, pixels.

    Yields:
        For each number of images and groups: `facts`; `seconds`, name -> seconds of each round,
        summed over all norms of the network; and `shapes`: for each shape of features its channels,
        height, width, number of norms, and name -> median seconds of one norm.
    """
    for n, g in itertools.product(images, groups):
        seconds = {STOCK_NORM: [0.0] * rounds, SPLIT_NORM: [0.0] * rounds}
        shapes = []
        for channels, height, width, norms in _feature_shapes(*size):
            x = torch.randn(n, channels, height, width, device=device, requires_grad=True)
            weight, bias = torch.randn(2, channels, device=device).unbind()
            tensors = [x, weight.requires_grad_(), bias.requires_grad_()]
            upstream = torch.randn_like(x)
            actions = {
                STOCK_NORM: partial(_norm_both_directions, F.group_norm, g, tensors, upstream),
                SPLIT_NORM: partial(_norm_both_directions, split_group_norm, g, tensors, upstream),
            }
            timed = interleave(actions, rounds, warmup, device, collect=False)
            for name, values in timed.items():
                seconds[name] = [s + norms * value for s, value in zip(seconds[name], values)]
            medians = {name: spread(values)[0] for name, values in timed.items()}
            shapes.append([channels, height, width, norms, medians])
        facts = {"images": n, "groups": g, "height": size[0], "width": size[1]}
        yield {"facts": facts, "seconds": seconds, "shapes": shapes}


def _norm_both_directions(
    norm: Callable, groups: int, tensors: Sequence[torch.Tensor], upstream: torch.Tensor
) -> None:
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
