"""The WS operation alone, forward and backward over all filters of a ResNet, against others'."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, Optional
from unittest import mock

import torch
from detectron2.layers import ShapeSpec
from torch.nn import functional as F

from ws_detectron.engine import load_config
from ws_detectron.errors import UserError
from ws_detectron.layers import WS_MODES, WSConv2d, standardize_weight
from ws_detectron.layers.launch_group import Tables, standardize_together
from ws_detectron.layers.standardize import triton_kernels_for
from ws_detectron.modeling import build_ws_resnet_backbone

from .timing import Action, interleave, peak_bytes, ratio, spread

# Forward: read W, write W_hat. Backward: read W_hat or W and the gradient, write the gradient. Five
# passes, of which a copy makes two.
FLOOR_IN_COPIES = 2.5
COPY, LAYER_NORM = "copy", "layer norm, without affine"
OURS = {mode: f"ws_detectron, {mode}" for mode in WS_MODES}
TOGETHER = "ws_detectron, official, in few launches"

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


def formulas() -> dict[str, Standardize]:
    """Others' operations: where their package is installed, as it runs there.

    Raises:
        UserError: a package is installed but broken.
    """
    found: dict[str, Standardize] = {"authors' operations": _as_the_authors_do}
    mmcv = _imported("mmcv.cnn.bricks.conv_ws")
    if mmcv is not None:
        found["mmcv conv_ws_2d"] = partial(_handed_to_conv2d, _run_mmcv, mmcv)
    timm = _imported("timm.layers.std_conv")
    if timm is not None:
        found["timm StdConv2d"] = partial(_handed_to_conv2d, _run_timm, timm)
    found["BiT's operations"] = _as_bit_does
    return found


def measure_operation(device: str, rounds: int, warmup: int, depth: int = 50) -> dict[str, Any]:
    """Times forward and backward of every implementation, in turns.

    Args:
        device: `"cpu"` or `"cuda"`.
        rounds, warmup: of `interleave`.
        depth: of the ResNet whose filters are standardized.

    Returns:
        `filters`, `values`; `seconds`: name -> seconds of each round; `ratios`: name -> to the
        floor, to the copy; `peak_bytes`: name -> most memory held above the filters and gradients
        handed in.
    """
    weights = backbone_filters(depth, device)
    upstream = [torch.randn_like(weight) for weight in weights]
    target = [torch.empty_like(weight) for weight in weights]

    source = [weight.detach() for weight in weights]

    def copy() -> None:  # in few launches on a GPU, as a launch takes longer than the bytes
        torch._foreach_copy_(target, source)

    def both_directions(standardize: Standardize) -> Action:
        def action() -> None:
            torch.autograd.backward([standardize(weight) for weight in weights], upstream)
            for weight in weights:
                weight.grad = None

        return action

    tables: Tables = {}

    def together() -> None:
        results = standardize_together(weights, 1e-5, "official", tables)
        torch.autograd.backward(results, upstream)
        for weight in weights:
            weight.grad = None

    operations: dict[str, Standardize] = {
        **{name: partial(standardize_weight, mode=mode) for mode, name in OURS.items()},
        LAYER_NORM: _layer_norm,
        **formulas(),
    }
    actions = {name: both_directions(operation) for name, operation in operations.items()}
    if triton_kernels_for(weights[0]) is not None:  # what a model does with its convs there
        actions = {TOGETHER: together, **actions}
    seconds = interleave({COPY: copy, **actions}, rounds, warmup, device)
    # of the same round, so that a slow moment of the machine meets both
    floor = {"floor": [FLOOR_IN_COPIES * value for value in seconds[COPY]]}
    return {
        "filters": len(weights),
        "values": sum(weight.numel() for weight in weights),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "milliseconds": {n: spread([1000 * value for value in s]) for n, s in seconds.items()},
        "times_floor": {name: ratio({**seconds, **floor}, name, "floor") for name in seconds},
        "times_ours": {name: ratio(seconds, name, OURS["official"]) for name in seconds},
        "peak_bytes": {name: peak_bytes(action, device) for name, action in actions.items()},
    }


def _layer_norm(weight: torch.Tensor) -> torch.Tensor:
    rows = weight.flatten(1)
    return F.layer_norm(rows, [rows.size(1)]).view_as(weight)


def _as_the_authors_do(weight: torch.Tensor) -> torch.Tensor:
    """Means over one dimension after the other, then the unbiased deviation of what is left."""
    mean = weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    centred = weight - mean
    deviation = centred.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
    return centred / deviation.expand_as(centred)


def _as_bit_does(weight: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
    return (weight - mean) / torch.sqrt(variance + 1e-10)


def _run_mmcv(module: Any, weight: torch.Tensor) -> None:
    module.conv_ws_2d(weight, weight, eps=1e-5)


def _run_timm(module: Any, weight: torch.Tensor) -> None:
    conv = SimpleNamespace(weight=weight, out_channels=len(weight), eps=1e-6, bias=None)
    conv.stride = conv.padding = conv.dilation = conv.groups = 1
    module.StdConv2d.forward(conv, weight)


def _handed_to_conv2d(
    run: Callable[[Any, torch.Tensor], None], module: Any, weight: torch.Tensor
) -> torch.Tensor:
    """The filters that a package's own code computes, without the convolution after it."""
    with _conv2d_recorded() as handed:
        run(module, weight)
    return handed[0]


@contextmanager
def _conv2d_recorded() -> Iterator[list[torch.Tensor]]:
    handed: list[torch.Tensor] = []

    def record(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        handed.append(weight)
        return weight

    with mock.patch.object(F, "conv2d", record):
        yield handed


def _imported(name: str) -> Optional[Any]:
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:  # a table without it would not say why
        raise UserError(
            f"{package} is installed but cannot be imported: {error}; mend or uninstall it"
        ) from error
