"""mmdetection's detectors with random weights that leave no layer trivial."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import mmcv_kernels

mmcv_kernels.install()

import mmdet  # noqa: E402  (needs the kernels)
import mmdet.models  # noqa: E402, F401
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

# Standard deviation to which the output of each last layer is scaled, so that scores spread, boxes
# move and masks have both signs. As initialized, no score would pass the threshold.
_SPREAD = {
    "rpn_head.rpn_cls": 2.0,
    "rpn_head.rpn_reg": 0.3,
    "roi_head.bbox_head.fc_cls": 2.5,
    "roi_head.bbox_head.fc_reg": 1.0,
    "roi_head.mask_head.conv_logits": 3.0,
}


def build_detector(name: str) -> tuple[Any, str]:
    """Builds a detector from a config in mmdetection's package.

    Args:
        name: of a file in its configs/gn+ws, without `.py`.

    Returns:
        The detector in eval mode, and the text of its full config.
    """
    init_default_scope("mmdet")
    folder = Path(os.path.dirname(mmdet.__file__)) / ".mim" / "configs" / "gn+ws"
    config = Config.fromfile(folder / f"{name}.py")
    return MODELS.build(config.model).eval(), config.pretty_text


def perturb(model: nn.Module, generator: torch.Generator) -> None:
    """Changes all parameters from their initial values, in place.

    Each filter gets its own mean and scale, which WS must remove; norm layers get random affine
    parameters, and BN random statistics. The last norm layer of each residual branch, initialized
    with 0 in mmdetection, gets 0.1: with 1, a random ResNet is chaotic, and mmdetection's float32
    output differs from its float64 output by 8e-5.
    """

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight
                per_filter = torch.empty(len(weight), 1, 1, 1)
                weight += 0.5 * weight.std() * noise(per_filter)
                weight *= torch.exp(0.5 * noise(per_filter))
            elif isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)):
                scale = 0.1 if re.search(r"layer\d\.\d+\.(gn3|bn3)$", name) else 1.0
                module.weight.copy_(scale * (1 + 0.2 * noise(module.weight)))
                module.bias.copy_(0.2 * scale * noise(module.bias))
                statistics = dict(module.named_buffers())
                if statistics:
                    mean, variance = statistics["running_mean"], statistics["running_var"]
                    mean.copy_(0.3 * noise(mean))
                    variance.copy_(torch.exp(0.3 * noise(variance)))
            elif isinstance(module, (nn.Linear, nn.ConvTranspose2d)) and module.bias is not None:
                module.bias.copy_(0.01 * noise(module.bias))


@torch.no_grad()
def spread_outputs(model: Any, image: torch.Tensor) -> None:
    """Scales and shifts the last layers so that their outputs on `image` vary.

    Args:
        model: a detector.
        image: RGB (3, H, W).
    """
    rpn = model.rpn_head.test_cfg
    limit, rpn.max_per_img = rpn.max_per_img, 100
    for name, target in _SPREAD.items():
        layer = dict(model.named_modules()).get(name)
        if layer is None:
            continue
        outputs: list[torch.Tensor] = []
        with _recorded(layer, outputs):
            predict(model, image)
        output = torch.cat([out.transpose(0, 1).flatten(1) for out in outputs], dim=1)
        scale = target / output.std(dim=1)
        layer.weight *= scale.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.bias.copy_((layer.bias - output.mean(dim=1)) * scale)
    rpn.max_per_img = limit


@contextmanager
def _recorded(layer: nn.Module, outputs: list[torch.Tensor]) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield
    finally:
        handle.remove()


def preprocess(model: Any, image: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """mmdetection's preprocessing of one image, which it reads as BGR."""
    sample = DetDataSample()
    height, width = image.shape[-2:]
    sample.set_metainfo(
        {
            "img_shape": (height, width),
            "ori_shape": (height, width),
            "scale_factor": (1.0, 1.0),
        }
    )
    data = model.data_preprocessor({"inputs": [image.flip(0)], "data_samples": [sample]}, False)
    return data["inputs"], data["data_samples"]


def predict(model: Any, image: torch.Tensor) -> Any:
    """mmdetection's detections in one image: `bboxes`, `scores`, `labels` and perhaps `masks`."""
    inputs, samples = preprocess(model, image)
    return model.predict(inputs, samples, rescale=True)[0].pred_instances
