"""The supported formats of weight files, their keys in detectron2, and the published files.

A layout is one table of pairs (their module, ours), from which both directions come. Modules of a
ResNet are relative to it (`stem.conv1`), those of a detector are from a detectron2 model with an
FPN (`backbone.bottom_up.stem.conv1`).
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Optional

from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names

from ws_detectron.errors import WeightsError, list_some
from ws_detectron.layers import DEFAULT_WS_EPS, DEFAULT_WS_MODE

from .metadata import Preprocessing, WSForm

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


def _bit_pairs() -> Iterator[tuple[str, str]]:
    """Modules of timm's `resnetv2_*_bit`; `build_bit_resnet_backbone` says where norms are here."""
    yield "stem.conv", "stem.conv1"
    yield "norm", "res5.out.norm"
    for stage in range(4):
        ends = f"res{stage + 1}.out.norm" if stage else "stem.out.norm"
        for block in range(_MAX_BLOCKS):
            theirs, ours = f"stages.{stage}.blocks.{block}", f"res{stage + 2}.{block}"
            yield f"{theirs}.norm1", f"{ours}.preact.norm" if block else ends
            yield f"{theirs}.norm2", f"{ours}.conv1.norm"
            yield f"{theirs}.norm3", f"{ours}.conv2.norm"
            for conv in ("conv1", "conv2", "conv3"):
                yield f"{theirs}.{conv}", f"{ours}.{conv}"
            yield f"{theirs}.downsample.conv", f"{ours}.shortcut"


bit_key = _key_map(_bit_pairs())
"""Key in a BiT ResNet of timm -> ours."""


def _google_bit_keys() -> dict[str, str]:
    """Array in a BiT `.npz` of Google -> our key; a, b and c are the convs of a block."""
    ours = dict(_bit_pairs())
    convs, norms = {"root_block/": "stem.conv"}, {"": "norm"}  # place in the file -> timm's module
    for stage in range(4):
        for block in range(_MAX_BLOCKS):
            timm, unit = f"stages.{stage}.blocks.{block}", f"block{stage + 1}/unit{block + 1:02d}"
            convs[f"{unit}/a/proj/"] = f"{timm}.downsample.conv"
            for number, letter in enumerate("abc", start=1):
                convs[f"{unit}/{letter}/"] = f"{timm}.conv{number}"
                norms[f"{unit}/{letter}/"] = f"{timm}.norm{number}"
    return {
        f"resnet/{place}{array}": f"{ours[module]}.{tensor}"
        for modules, array, tensor in (
            (convs, "standardized_conv2d/kernel", "weight"),
            (norms, "group_norm/gamma", "weight"),
            (norms, "group_norm/beta", "bias"),
        )
        for place, module in modules.items()
    }


google_bit_key = _google_bit_keys().get
"""Array in a BiT `.npz` of Google (`resnet/block1/unit01/a/group_norm/gamma`) -> our key."""


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
# BiT's mean and std of 0.5 for values from 0 to 1.
_BIT_INPUT = Preprocessing("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5))

OFFICIAL_WS = WSForm(DEFAULT_WS_MODE, DEFAULT_WS_EPS)


@dataclass(frozen=True)
class Source:
    """One format of weight files.

    Attributes:
        name: as `--source` takes it.
        title: for messages.
        key_map: key in the file -> key in detectron2.
        part: what the files contain, "ResNet", "BiT" or "detector"; empty if any model.
        ws: whether its convs were trained with WS; None if the keys do not tell.
        ws_form: of its convs, if they were.
        hwio: whether the filters are (kh, kw, I/g, O), as in TensorFlow, and not (O, I/g, kh, kw).
        preprocessing: what the weights were trained with; None if the keys do not tell.
        to_check: settings of the model that the keys do not tell.
    """

    name: str
    title: str
    key_map: KeyMap
    part: str = "ResNet"
    ws: Optional[bool] = None
    ws_form: WSForm = OFFICIAL_WS
    hwio: bool = False
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
        # eps of their code: models/resnetv2.py of timm, bit_pytorch/models.py of Google
        Source(
            "timm-bit",
            "a BiT ResNet of timm (resnetv2_*_bit)",
            bit_key,
            "BiT",
            ws=True,
            ws_form=WSForm("bit", 1e-8),
            preprocessing=_BIT_INPUT,
            to_check=(),
        ),
        Source(
            "google-bit",
            "a BiT ResNet of Google (.npz)",
            google_bit_key,
            "BiT",
            ws=True,
            ws_form=WSForm("bit", 1e-10),
            hwio=True,
            preprocessing=_BIT_INPUT,
            to_check=(),
        ),
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
        r"root\.conv\.weight|(body\.)?block1\.unit01\..*",
        "a BiT ResNet in the layout of bit_pytorch",
        "use Google's .npz or timm's file of the same model",
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
    timm = any(key.startswith("stages.") for key in keys)  # whose stem may have a conv1, too
    if name == "auto" and not timm and any(re.match(ours, key) for key in keys):
        name = "detectron2"
    refusals = _OTHER_DETECTORS if name == "detectron2" else _OTHER_DETECTORS + _MISFITS
    for pattern, what, reason in refusals:
        key = next((key for key in keys if re.fullmatch(pattern, key)), None)
        if key is not None:
            raise WeightsError(f"{path} is {what} (recognized by its key {key!r:.100}): {reason}")
    return SOURCES[_recognize(keys, path) if name == "auto" else name]


def _recognize(keys: Collection[str], path: str) -> str:
    if "resnet/root_block/standardized_conv2d/kernel" in keys:
        return "google-bit"
    first = "stages.0.blocks.0.norm1"
    if f"{first}.weight" in keys:
        plain_stem = "stem.conv.weight" in keys and "stem.norm.weight" not in keys
        if plain_stem and f"{first}.running_mean" not in keys:
            return "timm-bit"
        raise WeightsError(
            f"{path} is a timm ResNetV2 that is not BiT: it has BN, norms behind the convs, or a "
            "stem of several convs, and only resnetv2_*_bit are supported"
        )
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
_BIT = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
# timm 1.0.31, models/resnetv2.py, in the repositories of huggingface.co/timm, which publish the
# SHA-256 of every file
_TIMM_BIT = [
    f"resnetv2_{body[1:]}_bit.goog_in21k{data}" for body in _BIT for data in ("", "_ft_in1k")
]
_TIMM_SHA256 = {  # those that we know
    "resnetv2_101x1_bit.goog_in21k": (
        "89c645b9480d6c72c3f95deefa67ab4e1c5ee3823f09af7fd68e27f6a9ab51d8"
    ),
    "resnetv2_152x4_bit.goog_in21k": (
        "1fa545b0ee4ba4b10278857ea06ea1e2507a5fabd7b3f0f53ff149e36f66aad9"
    ),
}
# README and bit_pytorch/models.py of google-research/big_transfer; without published hashes
_GOOGLE_BIT = [f"BiT-M-{body}{data}" for body in _BIT for data in ("", "-ILSVRC2012")]


class PublishedFile(NamedTuple):
    """A file that can be downloaded.

    Attributes:
        url: its address.
        file: its name in a folder of downloads, which differs between all files.
        sha256: the first digits of its SHA-256, as many as are known; may be empty.
    """

    url: str
    file: str
    sha256: str


def _openmmlab(path: str, digits: str) -> PublishedFile:
    url = f"https://download.openmmlab.com/{path}-{digits}.pth"
    return PublishedFile(url, url.rsplit("/", 1)[1], digits)


PUBLISHED = {
    **{
        f"jhu/{name}": _openmmlab(f"pretrain/third_party/{name}", digits)
        for name, digits in _RESNETS.items()
    },
    **{
        f"mmdet/{name}": _openmmlab(f"mmdetection/v2.0/gn%2Bws/{name}/{name}_{date}", digits)
        for name, ending in _DETECTORS.items()
        for date, digits in [ending.split("-")]
    },
    **{
        f"bit/{name}": PublishedFile(
            f"https://huggingface.co/timm/{name}/resolve/main/model.safetensors",
            f"{name}.safetensors",
            _TIMM_SHA256.get(name, ""),
        )
        for name in _TIMM_BIT
    },
    **{
        f"bit/{name}": PublishedFile(
            f"https://storage.googleapis.com/bit_models/{name}.npz", f"{name}.npz", ""
        )
        for name in _GOOGLE_BIT
    },
}
"""Name in `MODEL.WEIGHTS: "ws://<name>"` -> the file."""


def published_name(sha256: str) -> Optional[str]:
    """The name in `PUBLISHED` of the file with this SHA-256, by the digits that are known."""
    known = ((name, file.sha256) for name, file in PUBLISHED.items() if file.sha256)
    return next((name for name, digits in known if sha256.startswith(digits)), None)
