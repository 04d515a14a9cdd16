"""What a model consists of: one line for logs, and a table by part with its cost on an image."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ws_detectron.errors import UserError
from ws_detectron.layers import WSConv2d

from .convert import fold_ws

_CONVS = nn.modules.conv._ConvNd


def summary_line(model: nn.Module) -> str:
    """For logs: `46.02 M parameters, 69 WS convs (official, eps 1e-05), frozen: none`."""
    convs = [module for module in model.modules() if isinstance(module, WSConv2d)]
    settings = Counter((conv.ws_mode, conv.ws_eps, conv.affine() is not None) for conv in convs)
    how = ", ".join(f"{mode}, eps {eps:g}{', affine' * affine}" for mode, eps, affine in settings)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{parameters / 1e6:.2f} M parameters, {len(convs)} WS convs"
        f"{f' ({how})' if how else ''}, frozen: {', '.join(frozen_parts(model)) or 'none'}"
    )


def frozen_parts(model: nn.Module) -> list[str]:
    """The names of the largest modules, and of single parameters, that are not trained.

    Layers with buffers alone, such as FrozenBN, are not named.
    """
    parameters = list(model.parameters())
    if not parameters or all(parameter.requires_grad for parameter in parameters):
        return []
    if not any(parameter.requires_grad for parameter in parameters):
        return ["all"]
    frozen = [name for name, p in model.named_parameters(recurse=False) if not p.requires_grad]
    for name, child in model.named_children():
        frozen += [name if part == "all" else f"{name}.{part}" for part in frozen_parts(child)]
    return frozen


@dataclass
class PartSummary:
    """One part of a model, without those of its modules that are listed as parts themselves.

    Attributes:
        part: name of the module, with ", rest" if some of its modules are parts themselves.
        parameters: number of values in its parameters.
        frozen: those of them that are not trained.
        convs: number of convolutions, transposed ones included.
        ws_convs: those of them with WS.
        flops: multiply-adds for one image, as fvcore counts them.
        activations: values that its convolutions and linear layers return for one image.
    """

    part: str
    parameters: int
    frozen: int
    convs: int
    ws_convs: int
    flops: int
    activations: int


def summarize(model: nn.Module, height: int, width: int) -> list[PartSummary]:
    """The parts of a detector, and what each costs for one image.

    fvcore counts the operations of a traced forward on an image of noise, with WS folded as in
    every inference, and without a threshold of scores: the heads see as many boxes as the model
    allows.

    Args:
        model: a detectron2 detector on any device, in any mode; not modified.
        height, width: of the image, in pixels.

    Returns:
        One row per part, the last one for the whole model.

    Raises:
        UserError: detectron2's export, which traces detectors, cannot be imported.
    """
    flops, activations = _count(model, height, width)
    names = _part_names(model)
    rows = [_row(model, name, names, flops, activations) for name in names]
    return [*(row for row in rows if row.parameters), _row(model, "", [], flops, activations)]


@torch.no_grad()
def feature_stability(backbone: nn.Module, images: Tensor, noise: float = 0.1) -> dict[str, float]:
    """How much of its features a backbone keeps when noise is added to images.

    The cosine <f, g> / (|f| |g|) of the features f of an image x and g of x + noise * std(x) * n,
    n normal, each without its mean over the image: 1 for the same features, 0 for unrelated ones.
    In a random network with WS it falls with depth; see docs/studies.md.

    Args:
        backbone: returns stage -> features (N, C, h, w).
        images: (N, 3, H, W), normalized.
        noise: standard deviation, in those of the images.

    Returns:
        Stage -> mean cosine of all images and all channels that are not constant.
    """
    clean = backbone(images)
    noisy = backbone(images + noise * images.std() * torch.randn_like(images))
    cosines = {}
    for stage in clean:
        f, g = (x[stage] - x[stage].mean((2, 3), keepdim=True) for x in (clean, noisy))
        varies = f.abs().amax((2, 3)) > 0  # a channel may be 0 everywhere, after a ReLU
        both = cosine_similarity(f.flatten(2), g.flatten(2), dim=2)
        cosines[stage] = both[varies].mean().item()
    return cosines


def _count(model: nn.Module, height: int, width: int) -> tuple[Counter, Counter]:
    """FLOPs and activations by name of module."""
    try:
        from detectron2.export import TracingAdapter
    except ImportError as error:
        raise UserError(
            f"FLOPs cannot be counted, as detectron2.export cannot be imported: {error}"
        ) from error
    model = fold_ws(copy.deepcopy(model)).eval()
    for module in model.modules():
        if hasattr(module, "test_score_thresh"):
            module.__dict__.update(test_score_thresh=0.0)
    image = torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(0))
    inputs = [{"image": image.float()}]
    counts = []
    with torch.no_grad():
        wrapper = TracingAdapter(model, inputs, allow_non_tensor=True)
        for analysis in (FlopCountAnalysis, ActivationCountAnalysis):
            counter: Any = analysis(wrapper, wrapper.flattened_inputs)
            counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            counter.tracer_warnings("none")
            by_module = counter.by_module().items()
            counts.append(Counter({k.partition("model")[2].lstrip("."): v for k, v in by_module}))
    return counts[0], counts[1]


def _part_names(model: nn.Module) -> list[str]:
    """The children of the model; of those with a ResNet or RoI heads in them, these as well."""
    names = []
    for name, child in model.named_children():
        inner = [n for n, _ in child.named_children() if name == "roi_heads" or n == "bottom_up"]
        names += [*(f"{name}.{n}" for n in inner), name]
    return names


def _row(
    model: nn.Module, name: str, names: Sequence[str], flops: Counter, activations: Counter
) -> PartSummary:
    inner = [other for other in names if other.startswith(f"{name}.")]
    modules = {id(m): m for m in model.get_submodule(name).modules()}
    for other in inner:
        for module in model.get_submodule(other).modules():
            modules.pop(id(module), None)
    own = [p for module in modules.values() for p in module.parameters(recurse=False)]
    convs = [module for module in modules.values() if isinstance(module, _CONVS)]
    return PartSummary(
        part=f"{name or 'model'}{', rest' if inner else ''}",
        parameters=sum(p.numel() for p in own),
        frozen=sum(p.numel() for p in own if not p.requires_grad),
        convs=len(convs),
        ws_convs=sum(isinstance(conv, WSConv2d) for conv in convs),
        flops=int(flops[name] - sum(flops[other] for other in inner)),
        activations=int(activations[name] - sum(activations[other] for other in inner)),
    )
