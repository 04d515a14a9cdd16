"""WS over all filters of a ResNet, and GN over all its features, alone, against others' code."""

import importlib
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, Optional
from unittest import mock

import torch
from detectron2.layers import Conv2d, ShapeSpec
from torch import nn
from torch.nn import functional as F

from ws_detectron.engine import load_config
from ws_detectron.errors import UserError
from ws_detectron.layers import (
    WS_MODES,
    WSConv2d,
    split_group_norm,
    standardize,
    standardize_together,
    standardize_weight,
    standardize_weights,
)
from ws_detectron.modeling import build_ws_resnet_backbone

from .timing import Action, gpu_work, interleave, peak_bytes, ratio, spread

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
    """Times forward and backward of every implementation, interleaved.

    Args:
        device: `"cpu"` or `"cuda"`.
        rounds, warmup: of `interleave`.
        depth: of the ResNet whose filters are standardized.

    Returns:
        `filters`, `values`; `seconds`: name -> seconds of each round; `ratios`: name -> to the
        floor, to the copy; `peak_bytes`: name -> most memory held above the filters and gradients
        handed in.
    """
    host = host_milliseconds(rounds)
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

    def together() -> None:
        results = standardize_weights(weights, 1e-5, "official")
        torch.autograd.backward(results, upstream)
        for weight in weights:
            weight.grad = None

    operations: dict[str, Standardize] = {
        **{name: partial(standardize_weight, mode=mode) for mode, name in OURS.items()},
        LAYER_NORM: _layer_norm,
        **formulas(),
    }
    actions = {name: both_directions(operation) for name, operation in operations.items()}
    if device == "cuda":  # what a model does with its convs there
        actions = {TOGETHER: together, **actions}
    seconds = interleave({COPY: copy, **actions}, rounds, warmup, device)
    # of the same round, so that a slow moment of the machine meets both
    floor = {"floor": [FLOOR_IN_COPIES * value for value in seconds[COPY]]}
    gpu = {name: gpu_work(action) for name, action in actions.items()} if device == "cuda" else {}
    return {
        "filters": len(weights),
        "values": sum(weight.numel() for weight in weights),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "milliseconds": {n: spread([1000 * value for value in s]) for n, s in seconds.items()},
        "times_floor": {name: ratio({**seconds, **floor}, name, "floor") for name in seconds},
        "times_ours": {name: ratio(seconds, name, OURS["official"]) for name in seconds},
        "peak_bytes": {name: peak_bytes(action, device) for name, action in actions.items()},
        "gpu": gpu,
        "host_milliseconds": host,
    }


def host_milliseconds(rounds: int) -> dict[str, dict[str, float]]:
    """What a host spends on WS in the convs of R-50, beyond what plain convs take it.

    One launch is given to a GPU that does nothing: kernels are replaced by empty tensors, on one
    thread of the CPU, for the standardization as for the convolutions.

    Returns:
        `forward` and `backward`: `least`, of the fastest runs, and `median`.
    """
    weights = backbone_filters(50, "cpu")
    x = torch.zeros(1, requires_grad=True)
    plain, ws = _Chain(weights, Conv2d), standardize_together(_Chain(weights, WSConv2d))
    threads = torch.get_num_threads()
    taken: dict[nn.Module, list[tuple[float, float]]] = {plain: [], ws: []}
    with _kernels_replaced(sum(weight.numel() for weight in weights)):
        torch.set_num_threads(1)
        for chain in (plain, ws) * (rounds + 5):
            taken[chain].append(_seconds_of_both_directions(chain, x))
        torch.set_num_threads(threads)
    return {
        direction: {
            name: 1000 * (of([t[i] for t in taken[ws][5:]]) - of([t[i] for t in taken[plain][5:]]))
            for name, of in (("least", min), ("median", statistics.median))
        }
        for i, direction in enumerate(("forward", "backward"))
    }


class _Chain(nn.Module):
    """Convs of these weights, called one after the other."""

    def __init__(self, weights: Sequence[torch.Tensor], conv: type[Conv2d]) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        for weight in weights:
            filters, channels, *size = weight.shape
            self.convs.append(conv(channels, filters, size, bias=False, norm=nn.Identity()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = conv(x)
        return x


class _PassOn(torch.autograd.Function):
    """What a convolution is to autograd: a node with two inputs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, ctx.weight.detach()


@contextmanager
def _kernels_replaced(values: int) -> Iterator[None]:
    memory = torch.zeros(values)

    def flat(tensors: Sequence[torch.Tensor], *args: Any) -> torch.Tensor:
        return memory[: sum(tensor.numel() for tensor in tensors)]

    kernels = SimpleNamespace(
        standardize=lambda weights, *form: (flat(weights), None),
        standardize_backward=lambda weights, gradient, statistics: gradient,
    )
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (F, "conv2d", lambda x, weight, *args: _PassOn.apply(x, weight)),
        (torch, "cat", flat),
        (standardize, "_kernels", lambda: kernels),
        (standardize, "_runs_in_triton", standardize.has_contiguous_filters),
        (standardize, "_triton_is_ready", lambda: True),
    )
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _seconds_of_both_directions(chain: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    chain.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    result = chain(x)
    middle = time.perf_counter()
    result.backward()
    return middle - begin, time.perf_counter() - middle


STOCK_NORM, SPLIT_NORM = "nn.GroupNorm", "ws_detectron, split"


def measure_group_norm(
    device: str,
    rounds: int,
    warmup: int,
    images: Sequence[int] = (1, 2, 4, 8),
    groups: Sequence[int] = (8, 32),
    size: tuple[int, int] = (800, 1344),
) -> dict[str, Any]:
    """Times GN alone, forward and backward, over all features of R-50-FPN: torch's, and ours split.

    Args:
        device: `"cpu"` or `"cuda"`.
        rounds, warmup: of `interleave`.
        images, groups: what is varied.
        size: height and width of the images, pixels.

    Returns:
        `parts`: for each number of images and groups, the `shapes` (channels, height, width, how
        often), the `seconds` of each round, name -> one list for each shape, and `network`: name ->
        seconds of all norms of the network, by the medians; `ratio`: split to torch's.
    """
    parts = []
    for n, g in itertools.product(images, groups):
        seconds: dict[str, list[list[float]]] = {STOCK_NORM: [], SPLIT_NORM: []}
        shapes = list(_feature_shapes(*size))
        for channels, height, width, _ in shapes:
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
                seconds[name].append(values)
        often = [count for *_, count in shapes]
        network = {
            name: sum(c * spread(values)["median"] for c, values in zip(often, of_shapes))
            for name, of_shapes in seconds.items()
        }
        parts.append(
            {
                "images": n,
                "groups": g,
                "shapes": shapes,
                "seconds": seconds,
                "network": network,
                "ratio": network[SPLIT_NORM] / network[STOCK_NORM],
            }
        )
    return {"parts": parts}


def _norm_both_directions(
    norm: Callable, groups: int, tensors: Sequence[torch.Tensor], upstream: torch.Tensor
) -> None:
    x, weight, bias = tensors
    torch.autograd.grad(norm(x, groups, weight, bias), tensors, upstream)


def _feature_shapes(height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(channels, height, width, how many norms) of backbone and FPN of R-50 for one image size."""
    yield 64, height // 2, width // 2, 1
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3)):
        h, w, middle = height >> stage, width >> stage, 64 << (stage - 2)
        yield middle, h, w, 2 * blocks
        yield 4 * middle, h, w, blocks + 1
        yield 256, h, w, 2


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
