"""Exports detectors to formats that run without detectron2, and checks every export by running it.

- detector: image (3, h, w) uint8, size (2,) int64 -> boxes, scores, classes and perhaps masks
- backbone: images (N, 3, H, W) float32 -> the levels p2, p3, ... of the FPN

`size` is height and width of the original image, to which boxes (N, 4) and masks (N, height, width)
are scaled. docs/deploy.md describes inputs and outputs, and has an example for each format.
"""

import importlib.util
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Union

import detectron2
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, detector_postprocess
from detectron2.structures import Instances
from torch import nn

from ws_detectron.data import classes_of
from ws_detectron.data.images import read_rgb
from ws_detectron.engine.checks import check_datasets, stock_architecture
from ws_detectron.errors import ConfigError, UserError
from ws_detectron.evaluation.evaluate import ImagePredictor
from ws_detectron.utils.command_line import progress
from ws_detectron.utils.environment import package_version
from ws_detectron.utils.io import atomic_write, check_folder, refuse_overwrite

logger = logging.getLogger(__name__)

PARTS = ("detector", "backbone")
METADATA = "ws_detectron.json"
"""Name under which a file holds `export_metadata`."""
OPSET = 17
"""Of ONNX. RoIAlign with half-pixel offsets needs 16, torch's exporter by tracing ends at 20."""
BOX_PIXELS, SCORE, MASK_SHARE = 0.01, 1e-4, 0.001
"""Largest differences from eager: of box corners, of scores, and the share of mask pixels."""
FEATURES = 1e-4
"""Largest difference of features from eager, relative to the largest feature of the level.

Measured beside float64 (R-18, random filters, noise of 64 to 200 pixels), eager is off by 7e-6 and
ONNX Runtime by 4e-6 without padding and by 4e-5 where most of the input is padding, whether group
norms are InstanceNormalization or means and products.
"""

Tensors = dict[str, torch.Tensor]
Differences = dict[str, tuple[float, float]]
Run = Callable[[Tensors], Tensors]


class Comparison(NamedTuple):
    """An export beside eager, on one image.

    Attributes:
        image: name of the image, and what was done to it.
        size: height and width of the input, pixels.
        found: what the export found, such as "12 detections".
        differences: what -> difference and limit; infinite if the export found something else.
    """

    image: str
    size: tuple[int, int]
    found: str
    differences: dict[str, tuple[float, float]]

    @property
    def holds(self) -> bool:
        """Whether every difference is within its limit; NaN is not."""
        return all(value <= limit for value, limit in self.differences.values())


def export_model(
    cfg: CfgNode,
    output: Union[str, Path],
    format: str,
    part: str = "detector",
    images: Sequence[Union[str, Path]] = (),
) -> list[Comparison]:
    """Exports a model with folded WS, runs the export, and writes it if it equals eager.

    Each image is compared as it is and with an input of 1.5 times its width, which is another size.

    Args:
        cfg: names the weights, and the size and channel order of input images. The device of an
            ONNX export is the CPU; the other formats run on MODEL.DEVICE.
        output: the file to write; its suffix is that of the format.
        format: a key of `FORMATS`.
        part: an element of `PARTS`.
        images: files to compare on, the first also to trace with; default: the first image of
            DATASETS.TEST.

    Returns:
        Two comparisons for each image. If one of them does not hold, nothing is written.

    Raises:
        ConfigError: the model cannot be exported in this format; says what can.
        UserError: packages are missing, a file cannot be read or written, or the model finds
            nothing on the first image.
    """
    output = Path(output)
    check_export(cfg, format, part)
    suffixes = FORMATS[format].suffixes
    if output.suffix not in suffixes:
        raise UserError(f"--format {format} writes {' or '.join(suffixes)}, but got {output}")
    check_folder(output.parent)
    images = [str(image) for image in images] or [_first_test_image(cfg)]
    refuse_overwrite(output, [cfg.MODEL.WEIGHTS, *images])
    pictures = {image: read_rgb(image) for image in images}
    if format == "onnx":
        cfg = cfg.clone()
        cfg.MODEL.DEVICE = "cpu"
    logger.info("1 of 4: loading %s", cfg.MODEL.WEIGHTS)
    predictor = ImagePredictor(cfg)
    model = predictor.model.requires_grad_(False)
    sample = predictor.prepare(pictures[images[0]])
    if part == "detector" and not len(_instances(model, sample)):
        raise UserError(
            f"the model finds nothing on {images[0]}, so the export could not be compared; name an "
            "image on which it does: --input photo.jpg"
        )
    inputs, metadata = model_inputs(model, sample, part), export_metadata(cfg, model, part)
    size = " x ".join(map(str, next(iter(inputs.values())).shape[-2:]))
    logger.info("2 of 4: tracing the %s for %s, an input of %s pixels", part, format, size)
    content = export(model, inputs, format, metadata)
    logger.info("3 of 4: comparing with detectron2 on %d inputs", 2 * len(pictures))
    run = FORMATS[format].load(content)
    comparisons = []
    for name, image in progress(pictures.items(), "comparing", "image"):
        sample = predictor.prepare(image)
        wide = F.interpolate(sample["image"][None], scale_factor=(1, 1.5), mode="nearest")[0]
        name = Path(name).name
        comparisons.append(compare(name, model, sample, part, run))
        comparisons.append(compare(f"{name}, wider", model, {**sample, "image": wide}, part, run))
    if all(comparison.holds for comparison in comparisons):
        logger.info("4 of 4: writing %s, %.0f MB", output, len(content) / 1e6)
        with atomic_write(output, "wb") as file:
            file.write(content)
    return comparisons


def check_export(cfg: CfgNode, format: str, part: str = "detector") -> None:
    """Checks that a part of the model of a config can be exported in a format.

    Args:
        cfg, format, part: as for `export_model`.

    Raises:
        ConfigError: it cannot; gives the reason and the nearest that can.
        UserError: packages of the format are not installed.
    """
    missing = [name for name in FORMATS[format].packages if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f"--format {format} needs {' and '.join(missing)}; install the extra `export`: "
            'pip install -e ".[export]"'
        )
    if part == "backbone":
        return
    architecture = stock_architecture(cfg)
    nearest = "; export its features: --part backbone"
    if format == "torch-export":
        raise ConfigError(
            "--format torch-export cannot export a detector, because the number of its boxes "
            "depends on the image; use --format torchscript or onnx, or --part backbone"
        )
    if architecture not in ("GeneralizedRCNN", "RetinaNet"):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}; detectors that can be "
            f"exported are GeneralizedRCNN (Faster and Mask R-CNN) and RetinaNet{nearest}"
        )
    if architecture == "RetinaNet":
        return
    if format == "torchscript" and cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads":
        raise ConfigError(
            "MODEL.ROI_HEADS.NAME is 'CascadeROIHeads', which scales gradients by a Python "
            "function that TorchScript cannot hold; use --format onnx"
        )
    if cfg.MODEL.KEYPOINT_ON:
        raise ConfigError(
            "MODEL.KEYPOINT_ON is True, and keypoints are not exported; export the boxes: "
            "MODEL.KEYPOINT_ON False"
        )
    if cfg.MODEL.LOAD_PROPOSALS or cfg.MODEL.PROPOSAL_GENERATOR.NAME != "RPN":
        raise ConfigError(
            f"MODEL.PROPOSAL_GENERATOR.NAME is {cfg.MODEL.PROPOSAL_GENERATOR.NAME!r} and "
            f"MODEL.LOAD_PROPOSALS {cfg.MODEL.LOAD_PROPOSALS}; a detector that can be exported has "
            f"the proposals of 'RPN'{nearest}"
        )


def export_metadata(cfg: CfgNode, model: nn.Module, part: str) -> dict[str, Any]:
    """What a program needs to know to use an export, stored in the file as JSON."""
    about: dict[str, Any] = {
        "part": part,
        "input_format": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
    }
    if part == "backbone":
        about["multiple"] = _multiple(model)
        about["pixel_mean"] = list(cfg.MODEL.PIXEL_MEAN)
    else:
        metadata = classes_of(next(iter(cfg.DATASETS.TEST), "__none__"))
        about["classes"] = list(metadata.get("thing_classes", ()))
    versions = {"torch": str(torch.__version__), "detectron2": detectron2.__version__}
    return {**about, "ws_detectron": package_version(), **versions}


def model_inputs(model: Any, sample: Mapping[str, Any], part: str) -> Tensors:
    """The inputs of an export for an image.

    Args:
        model: a detector of detectron2.
        sample: "image" (3, h, w) uint8, and "height" and "width" of the original image.
        part: an element of `PARTS`.
    """
    if part == "detector":
        return {"image": sample["image"], "size": torch.tensor([sample["height"], sample["width"]])}
    image, multiple = sample["image"].float(), _multiple(model)
    # at least two multiples, because torch.export assumes that dynamic sides are not 1
    height, width = (max(2, math.ceil(side / multiple)) * multiple for side in image.shape[1:])
    padded = model.pixel_mean.cpu().expand(3, height, width).clone()  # 0 after normalization
    padded[:, : image.shape[1], : image.shape[2]] = image
    return {"images": padded[None]}


def export(model: nn.Module, inputs: Tensors, format: str, metadata: Mapping[str, Any]) -> bytes:
    """The file of an exported model, which is traced; `compare` says whether it is right.

    Args:
        model: in evaluation mode, with WS folded.
        inputs: of `model_inputs`, which decides the part.
        format: a key of `FORMATS`.
        metadata: stored in the file as JSON, under the name `METADATA`.
    """
    part = _Detector(model, inputs) if "size" in inputs else _Backbone(model)
    with torch.no_grad(), warnings.catch_warnings():
        # what tracing does not follow is found by comparing at another size
        warnings.simplefilter("ignore")
        content = FORMATS[format].write(part.eval(), inputs, json.dumps(metadata, indent=1))
    model.eval()  # the ONNX exporter leaves it in training mode
    return content


def compare(name: str, model: Any, sample: Mapping[str, Any], part: str, run: Run) -> Comparison:
    """Compares an export with detectron2's own inference.

    Args:
        name: of the image.
        model, sample, part: as for `model_inputs`.
        run: runs the export.
    """
    inputs = model_inputs(model, sample, part)
    with torch.no_grad():
        outputs = {key: value.detach().cpu() for key, value in run(inputs).items()}
        if part == "backbone":
            found, differences = _compare_features(_Backbone(model)(**inputs), outputs)
        else:
            found, differences = _compare_detections(_instances(model, sample), outputs)
    height, width = next(iter(inputs.values())).shape[-2:]
    return Comparison(name, (height, width), found, differences)


def rows(comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
    """Comparisons as rows of a table, with the limits in its header."""
    return [
        {
            "image": comparison.image,
            "input": " x ".join(map(str, comparison.size)),
            "found": comparison.found,
            **{
                f"{what}, at most {limit:g}": f"{value:.1e}"
                for what, (value, limit) in comparison.differences.items()
            },
            "": "equal" if comparison.holds else "DIFFERS",
        }
        for comparison in comparisons
    ]


@torch.no_grad()
def _instances(model: nn.Module, sample: Mapping[str, Any]) -> Instances:
    """What detectron2 finds on an image, on the CPU."""
    return model([dict(sample)])[0]["instances"].to("cpu")


def _compare_features(eager: Tensors, outputs: Tensors) -> tuple[str, Differences]:
    worst = max(
        ((outputs[level] - value.cpu()).abs().max() / value.abs().max().cpu()).item()
        for level, value in eager.items()
    )
    return ", ".join(eager), {"feature": (worst, FEATURES)}


def _compare_detections(eager: Instances, outputs: Tensors) -> tuple[str, Differences]:
    boxes, scores, classes = (outputs[key] for key in ("boxes", "scores", "classes"))
    limits = {"box (pixels)": BOX_PIXELS, "score": SCORE}
    if eager.has("pred_masks"):
        limits["mask (share)"] = MASK_SHARE
    values = dict.fromkeys(limits, 0.0)
    found = f"{len(boxes)} detections"
    # Runtimes may order detections of nearly equal scores differently, so each is compared with the
    # nearest of its class.
    distances = (boxes[:, None] - eager.pred_boxes.tensor).abs().amax(2)
    distances[classes[:, None] != eager.pred_classes] = math.inf
    order = distances.argmin(1).tolist() if len(distances) else []
    if len(boxes) != len(eager) or len(boxes) != len(set(order)):
        found += f", eager {len(eager)}" if len(boxes) != len(eager) else " of other objects"
        values = dict.fromkeys(limits, math.inf)
    elif len(boxes):
        values["box (pixels)"] = distances.amin(1).max().item()
        values["score"] = (scores - eager.scores[order]).abs().max().item()
        if eager.has("pred_masks"):
            masks, expected = outputs["masks"], eager.pred_masks[order]
            values["mask (share)"] = ((masks ^ expected).sum() / (masks | expected).sum()).item()
    return found, {what: (values[what], limits[what]) for what in limits}


class _Detector(nn.Module):
    """A whole detector on one image, with named tensors as outputs.

    Args:
        model: a `GeneralizedRCNN` or `RetinaNet`.
        inputs: as of `model_inputs`.
    """

    def __init__(self, model: nn.Module, inputs: Tensors) -> None:
        super().__init__()
        self.adapter = TracingAdapter(model, tuple(inputs.values()), _detect)

    def forward(self, image: torch.Tensor, size: torch.Tensor) -> Tensors:
        outputs = self.adapter(image, size)
        return dict(zip(("boxes", "scores", "classes", "masks"), outputs))


def _detect(model: Any, image: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
    height, width = size[0], size[1]
    if not isinstance(model, GeneralizedRCNN):
        found = model([{"image": image, "height": height, "width": width}])[0]["instances"]
    else:
        (found,) = model.inference([{"image": image}], do_postprocess=False)
        # detectron2 pastes `pred_masks` by a loop of as many steps as there were when it was traced
        if found.has("pred_masks"):
            found.roi_masks = found.pred_masks[:, 0]
            found.remove("pred_masks")
        found = detector_postprocess(found, height, width)
    boxes = found.pred_boxes.tensor
    outputs: tuple[torch.Tensor, ...] = boxes, found.scores, found.pred_classes
    if found.has("roi_masks"):
        outputs += (paste_masks(found.roi_masks, boxes, height, width),)
    return outputs


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, height: Any, width: Any) -> torch.Tensor:
    """Full-size masks, as of `detectron2.layers.paste_masks_in_image`, in two matrix products.

    Bilinear interpolation within a box is separable: with y the rows of the image in units of the
    rows of a mask, a pixel is sum_ij max(0, 1 - |y - i|) mask_ij max(0, 1 - |x - j|). So it needs
    no loop over detections and no operator beyond what every runtime has. The products take
    4 * N * height * width bytes.

    Args:
        masks: (N, M, M), probabilities.
        boxes: (N, 4), x0, y0, x1, y1 in pixels of the image.
        height, width: of the image; integers, or tensors to be traced.

    Returns:
        (N, height, width), bool: where the probability is at least 0.5.
    """
    cells = torch.arange(masks.size(-1), device=masks.device)

    def weights(start: torch.Tensor, end: torch.Tensor, pixels: Any) -> torch.Tensor:
        centres = torch.arange(pixels, device=masks.device) + 0.5
        scale = masks.size(-1) / (end - start)
        at = (centres - start[:, None]) * scale[:, None] - 0.5
        return (1 - (at[:, :, None] - cells).abs()).clamp(min=0)

    x0, y0, x1, y1 = boxes.unbind(1)
    rows, columns = weights(y0, y1, height), weights(x0, x1, width)
    return rows @ masks @ columns.transpose(1, 2) >= 0.5


class _Backbone(nn.Module):
    """Normalization and backbone; the outputs are its levels by name."""

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.register_buffer("pixel_mean", model.pixel_mean.clone(), persistent=False)
        self.register_buffer("pixel_std", model.pixel_std.clone(), persistent=False)

    def forward(self, images: torch.Tensor) -> Tensors:
        images = images.to(self.pixel_mean.device)
        return self.backbone((images - self.pixel_mean) / self.pixel_std)


class _GroupNormOfNone(nn.GroupNorm):
    """Group norm that ONNX Runtime can also run on no images, such as those of no detections.

    torch's exporter writes, and ONNX Runtime's optimizer makes of other forms, a reshape to
    (0, groups, -1), where 0 keeps the number of images; if that is 0, -1 could be any number, and
    the runtime fails. So the number of images is the one to be inferred.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, channels, height, width = x.shape
        groups = self.num_groups
        one, zero = x.new_ones(groups), x.new_zeros(groups)  # the exporter needs some
        rows = x.reshape(-1, groups, channels // groups * height * width)
        x = F.instance_norm(rows, None, None, one, zero, eps=self.eps)
        x = x.reshape(-1, channels, height, width)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


@contextmanager
def _group_norms_of_none(module: nn.Module) -> Iterator[None]:
    """Within it, the group norms of a module are `_GroupNormOfNone`."""
    norms = [(norm, type(norm)) for norm in module.modules() if isinstance(norm, nn.GroupNorm)]
    try:
        for norm, _ in norms:
            norm.__class__ = _GroupNormOfNone
        yield
    finally:
        for norm, kind in norms:
            norm.__class__ = kind


def _write_torchscript(part: nn.Module, inputs: Tensors, metadata: str) -> bytes:
    file = io.BytesIO()
    # strict=False: the outputs are a dict
    traced = torch.jit.trace(part, tuple(inputs.values()), strict=False, check_trace=False)
    torch.jit.save(traced, file, _extra_files={METADATA: metadata})
    return file.getvalue()


def _load_torchscript(content: bytes) -> Run:
    traced = torch.jit.load(io.BytesIO(content))
    return lambda inputs: traced(*inputs.values())


def _write_onnx(part: nn.Module, inputs: Tensors, metadata: str) -> bytes:
    import onnx

    outputs = list(part(**inputs))
    if "size" in inputs:
        axes = {"image": {1: "h", 2: "w"}, **{name: {0: "detections"} for name in outputs}}
        if "masks" in axes:
            axes["masks"].update({1: "height", 2: "width"})
    else:
        axes = {"images": {0: "images", 2: "height", 3: "width"}}
        axes.update(
            {name: {0: "images", 2: f"{name} height", 3: f"{name} width"} for name in outputs}
        )
    with TemporaryDirectory() as folder, _group_norms_of_none(part):
        path = Path(folder, "model.onnx")
        # dynamo=True cannot export sizes that depend on the image, such as the number of boxes
        torch.onnx.export(
            part, tuple(inputs.values()), str(path), dynamo=False, opset_version=OPSET,
            input_names=list(inputs), output_names=outputs, dynamic_axes=axes,
        )  # fmt: skip
        model = onnx.load(path)
    model.metadata_props.add(key=METADATA, value=metadata)
    return model.SerializeToString()


def _load_onnx(content: bytes) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Tensors) -> Tensors:
        outputs = session.run(names, {key: value.numpy() for key, value in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, outputs)))

    return run


def _write_torch_export(part: nn.Module, inputs: Tensors, metadata: str) -> bytes:
    multiple = _multiple(part)
    sides = {n: multiple * torch.export.Dim(name, min=2) for n, name in ((2, "h"), (3, "w"))}
    shapes = {"images": {0: torch.export.Dim("n"), **sides}}
    two = torch.cat([inputs["images"]] * 2)  # a dimension of 1 would be fixed
    file = io.BytesIO()
    program = torch.export.export(part, (two,), dynamic_shapes=shapes)
    torch.export.save(program, file, extra_files={METADATA: metadata})
    return file.getvalue()


def _load_torch_export(content: bytes) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch, about memory of its own
        module = torch.export.load(io.BytesIO(content)).module()
    return lambda inputs: module(*inputs.values())


class Format(NamedTuple):
    """How a format is written and run, both in memory.

    Attributes:
        suffixes: of its files.
        packages: that it needs beside torch.
        write: of a part, its inputs and the metadata.
        load: of the file's content; runs it.
    """

    suffixes: tuple[str, ...]
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Tensors, str], bytes]
    load: Callable[[bytes], Run]


FORMATS = {
    "torchscript": Format((".ts", ".pt"), (), _write_torchscript, _load_torchscript),
    "onnx": Format((".onnx",), ("onnx", "onnxruntime"), _write_onnx, _load_onnx),
    "torch-export": Format((".pt2",), (), _write_torch_export, _load_torch_export),
}
"""By the names of `--format`."""


def _multiple(model: Any) -> int:
    """What divides the sides of the input of every level of a backbone."""
    return max(shape.stride for shape in model.backbone.output_shape().values())


def _first_test_image(cfg: CfgNode) -> str:
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty; name an image to compare on: --input photo.jpg")
    check_datasets("DATASETS.TEST", cfg.DATASETS.TEST[:1])
    return DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]["file_name"]
