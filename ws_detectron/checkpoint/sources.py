"""The supported formats of weight files, their keys in detectron2, and the published files.

A layout is one table of pairs (their module, ours), from which both directions come. Modules of a
ResNet are relative to it (`stem.conv1`), those of a detector are from a detectron2 model with an
FPN (`backbone.bottom_up.stem.conv1`).
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Optional

from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names

from ws_detectron.errors import WeightsError, list_some

from .metadata import Preprocessing

BODY_PREFIX = "backbone.bottom_up."

TENSORS = ("weight", "bias", "running_mean", "running_var")
_MAX_BLOCKS = 36  # in a stage of R-152
_MAX_HEAD_LAYERS = 8


def _resnet_pairs(norm: str) -> Iterator[tuple[str, str]]:
    """Modules of torchvision's, timm's, mmdetection's and the WS authors' ResNets.

    Args:
        norm: what norm layers are called in the file, "bn" or "gn".
    """
    yield "conv1", "stem.conv1"
    yield f"{norm}1", "stem.conv1.norm"
    for stage in range(1, 5):
        for block in range(_MAX_BLOCKS):
            theirs, ours = f"layer{stage}.{block}", f"res{stage + 1}.{block}"
            for conv in range(1, 4):
                yield f"{theirs}.conv{conv}", f"{ours}.conv{conv}"
                yield f"{theirs}.{norm}{conv}", f"{ours}.conv{conv}.norm"
            yield f"{theirs}.downsample.0", f"{ours}.shortcut"
            yield f"{theirs}.downsample.1", f"{ours}.shortcut.norm"


def _mmdet_pairs(norm: str) -> Iterator[tuple[str, str]]:
    """Modules of mmdetection's Faster and Mask R-CNN with FPN (2.0 to 3.x)."""
    for theirs, ours in _resnet_pairs(norm):
        yield f"backbone.{theirs}", BODY_PREFIX + ours
    layers = [("neck.lateral_convs", i, f"backbone.fpn_lateral{i + 2}") for i in range(4)]
    layers += [("neck.fpn_convs", i, f"backbone.fpn_output{i + 2}") for i in range(4)]
    for i in range(_MAX_HEAD_LAYERS):
        layers.append(("roi_head.bbox_head.shared_convs", i, f"roi_heads.box_head.conv{i + 1}"))
        layers.append(("roi_head.mask_head.convs", i, f"roi_heads.mask_head.mask_fcn{i + 1}"))
        yield f"roi_head.bbox_head.shared_fcs.{i}", f"roi_heads.box_head.fc{i + 1}"
    for theirs, i, ours in layers:
        yield f"{theirs}.{i}.conv", ours
        yield f"{theirs}.{i}.{norm}", f"{ours}.norm"
    yield "rpn_head.rpn_conv", "proposal_generator.rpn_head.conv"
    yield "rpn_head.rpn_cls", "proposal_generator.rpn_head.objectness_logits"
    yield "rpn_head.rpn_reg", "proposal_generator.rpn_head.anchor_deltas"
    yield "roi_head.bbox_head.fc_cls", "roi_heads.box_predictor.cls_score"
    yield "roi_head.bbox_head.fc_reg", "roi_heads.box_predictor.bbox_pred"
    yield "roi_head.mask_head.upsample", "roi_heads.mask_head.deconv"
    yield "roi_head.mask_head.conv_logits", "roi_heads.mask_head.predictor"


KeyMap = Callable[[str], Optional[str]]
"""A key in one layout -> the key in another, None if there is none."""


def _key_map(pairs: Iterable[tuple[str, str]]) -> KeyMap:
    return {
        f"{one}.{tensor}": f"{other}.{tensor}" for one, other in pairs for tensor in TENSORS
    }.get


torchvision_key = _key_map([*_resnet_pairs("bn"), *_resnet_pairs("gn")])
"""Key in a ResNet of torchvision, timm, mmdetection or the WS authors -> ours."""

mmdet_key = _key_map([*_mmdet_pairs("bn"), *_mmdet_pairs("gn")])
"""Key in mmdetection's Faster or Mask R-CNN -> ours."""

to_torchvision_key, to_mmdet_key = (
    {norm: _key_map((ours, theirs) for theirs, ours in pairs(norm)) for norm in ("bn", "gn")}
    for pairs in (_resnet_pairs, _mmdet_pairs)
)
"""Name of the norm layers in the file -> the inverse of `torchvision_key` and `mmdet_key`."""


def caffe2_key(blob: str) -> Optional[str]:
    """Blob of a Caffe2 ResNet (`res2_0_branch2a_w`) -> our key."""
    key = convert_basic_c2_names([blob])[0]
    module, _, tensor = key.rpartition(".")
    is_body = re.fullmatch(r"(stem\.conv1|res[2-5]\.\d+\.(conv[123]|shortcut))(\.norm)?", module)
    return key if is_body and tensor in TENSORS else None


# ImageNet mean and std of torchvision, timm, mmdetection and the WS authors, times 255.
IMAGENET = Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# Of the WS authors' fork of maskrcnn-benchmark, which reads their Caffe2-style files.
_CAFFE2 = Preprocessing("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Source:
    """One format of weight files.

    Attributes:
        name: as `--source` takes it.
        title: for messages.
        key_map: key in the file -> key in detectron2.
        part: what the files contain, "ResNet" or "detector"; empty if any model.
        ws: whether its convs were trained with WS; None if the keys do not tell.
        preprocessing: what the weights were trained with; None if the keys do not tell.
        to_check: settings of the model that the keys do not tell.
    """

    name: str
    title: str
    key_map: KeyMap
    part: str = "ResNet"
    ws: Optional[bool] = None
    preprocessing: Optional[Preprocessing] = IMAGENET
    to_check: tuple[str, ...] = ("MODEL.WS.GN_GROUPS 32, if it has GN",)


_INPUT = "INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD"
SOURCES = {
    source.name: source
    for source in (
        Source(
            "mmdet",
            "a mmdetection Faster or Mask R-CNN",
            mmdet_key,
            "detector",
            preprocessing=None,
            to_check=(
                f"{_INPUT}: those of data_preprocessor or img_norm_cfg; RGB, "
                "[123.675, 116.28, 103.53], [58.395, 57.12, 57.375] in gn+ws",
                "MODEL.RESNETS.STRIDE_IN_1X1: whether the backbone has style='caffe'; False in "
                "gn+ws",
                "MODEL.WS.GN_GROUPS: num_groups of norm_cfg; 32 in gn+ws",
                "MODEL.ANCHOR_GENERATOR.SIZES, ASPECT_RATIOS: scales x strides and ratios of "
                "anchor_generator; [32] to [512] with 0.5, 1, 2 in gn+ws",
                "MODEL.RPN and ROI_BOX_HEAD.BBOX_REG_WEIGHTS: 1 / target_stds of bbox_coder; "
                "1, 1, 1, 1 and 10, 10, 5, 5 in gn+ws",
                "MODEL.ROI_*_HEAD.POOLER_*: roi_layer; RoIAlign with aligned=True, "
                "sampling_ratio=0 and finest_scale=56 in gn+ws",
                "FPN: num_outs=5 and add_extra_convs=False, as in gn+ws",
            ),
        ),
        Source(
            "mmdet-resnet",
            "a mmdetection ResNet or ResNeXt",
            torchvision_key,
            to_check=("its config: style='pytorch' and, if it has GN, num_groups=32",),
        ),
        Source(
            "ws-authors", "a GN+WS ResNet of the WS authors (.pth.tar)", torchvision_key, ws=True
        ),
        Source(
            "ws-authors-caffe2",
            "a Caffe2-style GN+WS ResNet of the WS authors (.pkl)",
            caffe2_key,
            ws=True,
            preprocessing=_CAFFE2,
        ),
        Source("torchvision", "a torchvision ResNet", torchvision_key, ws=False, to_check=()),
        Source("timm", "a timm ResNet", torchvision_key, ws=False),
        Source(
            "detectron2",
            "a detectron2 checkpoint",
            lambda key: key,
            "",
            preprocessing=None,
            to_check=(f"{_INPUT}, MODEL.RESNETS.STRIDE_IN_1X1, MODEL.WS.GN_GROUPS",),
        ),
    )
}

# Patterns of keys, the model that has them, and why it is refused.
_MISFITS = (
    (
        r"stem\.conv\.weight|root\.conv\.weight|(resnet/)?root_block/.*|block1\.unit01\..*"
        r"|stages\.0\.blocks\.0\.(norm1|pre_norm)\..*",
        "a pre-activation ResNetV2 (BiT, timm resnetv2)",
        "its norm layers precede the convs, and detectron2 has no such ResNet",
    ),
    (
        r"(backbone\.)?(conv1\.0\.weight|stem\.0\.weight)",
        "a ResNet with three 3x3 convs as its stem (ResNet-C/D)",
        "detectron2's has one 7x7 conv",
    ),
    (
        r"bbox_head\.(shared_convs|shared_fcs|fc_cls)\..*",
        "a detector of mmdetection 1.x (background class first)",
        "upgrade it with mmdetection's tools/model_converters/upgrade_model_version.py",
    ),
    (r".*\.weight_gamma", "a model with ConvAWS (DetectoRS)", "which is not WS"),
    (r".*conv2(\.conv)?_offset\..*", "a model with deformable convs", "which are not supported"),
    (r".*\.(se|attn)\.(fc1|conv)\..*", "a ResNet with attention", "which detectron2 does not have"),
)
_RANDOM = (
    "detectron2 cannot use it: its backbone would stay random. Use a detector of detectron2's "
    "model zoo or of mmdetection, or a ResNet"
)
# Some of their keys are also detectron2's (`roi_heads.box_predictor.cls_score.weight`).
_OTHER_DETECTORS = (
    (
        r"backbone\.body\.(stem|res\d)\..*|backbone\.fpn\.fpn_(inner|layer)\d\..*"
        r"|roi_heads\.(box|mask|keypoint)\.(feature_extractor|predictor)\..*",
        "a maskrcnn-benchmark detector",
        _RANDOM,
    ),
    (
        r"backbone\.body\..*|backbone\.fpn\.(inner|layer|extra)_blocks\..*"
        r"|roi_heads\.box_head\.fc[67]\..*|head\.(classification|regression)_head\..*",
        "a torchvision detector",
        _RANDOM,
    ),
)


def find_source(keys: Collection[str], path: str, name: str = "auto") -> Source:
    """Recognizes the format of a file by its keys.

    Args:
        keys: without a common `module.` prefix.
        path: the file, for messages; the WS authors' files have "GN-WS" in their names.
        name: a name in `SOURCES` to choose that one.

    Raises:
        WeightsError: the format is unknown, not convertible, or ambiguous; says which.
    """
    ours = r"((backbone\.)?(bottom_up\.)?stem\.conv1|proposal_generator|roi_heads)\."
    if name == "auto" and any(re.match(ours, key) for key in keys):
        name = "detectron2"
    refusals = _OTHER_DETECTORS if name == "detectron2" else _OTHER_DETECTORS + _MISFITS
    for pattern, what, reason in refusals:
        key = next((key for key in keys if re.fullmatch(pattern, key)), None)
        if key is not None:
            raise WeightsError(f"{path} is {what} (recognized by its key {key!r:.100}): {reason}")
    return SOURCES[_recognize(keys, path) if name == "auto" else name]


def _recognize(keys: Collection[str], path: str) -> str:
    if any(re.match(r"(neck|roi_head)\.", key) for key in keys):
        return "mmdet"
    if "conv1_w" in keys:
        if "GN-WS" in path:
            return "ws-authors-caffe2"
        raise WeightsError(
            f"{path} has Caffe2's blob names, as both plain ResNets and the WS authors' GN+WS "
            "ones. If it is one of the latter, pass --source ws-authors-caffe2; detectron2 reads "
            "plain ones without conversion"
        )
    if {"conv1.weight", "gn1.weight"} <= set(keys):
        return "mmdet-resnet"
    if {"conv1.weight", "bn1.weight"} <= set(keys):
        if "bn1.running_mean" in keys:
            return "torchvision"
        if "GN-WS" in path:
            return "ws-authors"
        raise WeightsError(
            f"{path} has GN and torchvision's names, like the WS authors' GN+WS files and timm's "
            "resnet50_gn (without WS): pass --source ws-authors or --source timm"
        )
    raise WeightsError(
        f"{path} has an unknown format; its keys are {list_some(sorted(keys))}. Supported: "
        + "; ".join(f"{source.name}: {source.title}" for source in SOURCES.values())
    )


# mmengine 0.10.7, hub/openmmlab.json
_RESNETS = {
    "resnet50_gn_ws": "15beedd8",
    "resnet101_gn_ws": "3e3c308c",
    "resnext50_32x4d_gn_ws": "0d87ac85",
    "resnext101_32x4d_gn_ws": "34ac1a9e",
}
# mmdetection 3.3.0, configs/gn+ws/metafile.yml; TEST.EXPECTED_RESULTS of the config of each name is
# the AP there
_DETECTORS = {
    "faster_rcnn_r50_fpn_gn_ws-all_1x_coco": "20200130-613d9fe2",
    "faster_rcnn_r101_fpn_gn_ws-all_1x_coco": "20200205-a93b0d75",
    "faster_rcnn_x50_32x4d_fpn_gn_ws-all_1x_coco": "20200203-839c5d9d",
    "faster_rcnn_x101_32x4d_fpn_gn_ws-all_1x_coco": "20200212-27da1bc2",
    "mask_rcnn_r50_fpn_gn_ws-all_2x_coco": "20200226-16acb762",
    "mask_rcnn_r101_fpn_gn_ws-all_2x_coco": "20200212-ea357cd9",
    "mask_rcnn_x50_32x4d_fpn_gn_ws-all_2x_coco": "20200216-649fdb6f",
    "mask_rcnn_x101_32x4d_fpn_gn_ws-all_2x_coco": "20200319-33fb95b5",
    "mask_rcnn_r50_fpn_gn_ws-all_20_23_24e_coco": "20200213-487d1283",
    "mask_rcnn_r101_fpn_gn_ws-all_20_23_24e_coco": "20200213-57b5a50f",
    "mask_rcnn_x50_32x4d_fpn_gn_ws-all_20_23_24e_coco": "20200226-969bcb2c",
    "mask_rcnn_x101_32x4d_fpn_gn_ws-all_20_23_24e_coco": "20200316-e6cd35ef",
}
_OPENMMLAB = "https://download.openmmlab.com"
PUBLISHED = {
    f"jhu/{name}": f"{_OPENMMLAB}/pretrain/third_party/{name}-{digits}.pth"
    for name, digits in _RESNETS.items()
} | {
    f"mmdet/{name}": f"{_OPENMMLAB}/mmdetection/v2.0/gn%2Bws/{name}/{name}_{ending}.pth"
    for name, ending in _DETECTORS.items()
}
"""Name in `MODEL.WEIGHTS: "ws://<name>"` -> URL, which ends in eight digits of the SHA-256."""


def sha256_digits(url: str) -> str:
    """The first eight hexadecimal digits of the SHA-256 of a published file."""
    return url[-len("12345678.pth") : -len(".pth")]


def is_published(sha256: str) -> bool:
    """Whether the file with this SHA-256 is in `PUBLISHED`, by the digits that are known."""
    return sha256[:8] in map(sha256_digits, PUBLISHED.values())
