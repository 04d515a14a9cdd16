"""Converts weight files of other frameworks to detectron2, and detectron2's to mmdetection."""

import fnmatch
import hashlib
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model

from ws_detectron.errors import WeightsError, list_some
from ws_detectron.model_zoo import get_config
from ws_detectron.utils.io import atomic_write, refuse_overwrite

from .fit import outputs_differ
from .metadata import METADATA_KEY, WeightMetadata, in_resnet, is_bit
from .reading import check_finite, read_weight_file, unwrap_state
from .sources import (
    BODY_PREFIX,
    IMAGENET,
    OFFICIAL_WS,
    SOURCES,
    TENSORS,
    KeyMap,
    Source,
    find_source,
    published_name,
    to_mmdet_key,
    to_torchvision_key,
)

State = Mapping[str, torch.Tensor]

# Keys without a counterpart that are left out.
_LEFT_OUT = {
    r".*num_batches_tracked": "BN's step counter, which no output depends on",
    r"(head\.)?fc\.(weight|bias)|pred_[wb]|resnet/head/conv2d/(kernel|bias)": (
        "ImageNet classifier, which a detector does not have"
    ),
    # Buffers in some versions of detectron2.
    r"pixel_(mean|std)|proposal_generator\.anchor_generator\..*": "in mmdetection's config",
}


class KeyEntry(NamedTuple):
    """What became of one key.

    Attributes:
        source: the key in the input file.
        target: the key in the output; None if it was left out.
        note: why it was left out, or how its tensor was changed; may be empty.
    """

    source: str
    target: Optional[str]
    note: str = ""


@dataclass
class ConversionRecord:
    """What became of every key of a file, and settings to check that the file does not tell."""

    entries: list[KeyEntry] = field(default_factory=list)
    to_check: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Counts, reasons for changes and ignored keys, and what to check, one per line."""
        mapped = [entry for entry in self.entries if entry.target is not None]
        changed = Counter(entry.note for entry in mapped if entry.note)
        ignored = Counter(entry.note for entry in self.entries if entry.target is None)
        lines = [f"{len(mapped)} tensors mapped, {sum(ignored.values())} ignored"]
        lines += [f"  changed: {count}: {note}" for note, count in changed.items()]
        lines += [f"  ignored: {count}: {note}" for note, count in ignored.items()]
        lines += [f"  to check: {setting}" for setting in self.to_check]
        return "\n".join(lines)

    def table(self) -> str:
        """All keys as TSV with the columns source, target and note."""
        lines = ["source\ttarget\tnote"]
        lines += [f"{e.source}\t{e.target or '-'}\t{e.note}" for e in self.entries]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class ConvertedWeights:
    """Weights under detectron2's keys.

    Attributes:
        state: a detector has full keys. A ResNet has relative ones (`stem.conv1.weight`), which
            detectron2 matches by suffix.
        metadata: what a model needs to use them.
        matching_heuristics: whether detectron2 must match keys by suffix.
        record: what became of each key.
        resnet: config key -> value of the ResNet that they are for; empty if it is not known.
    """

    state: dict[str, torch.Tensor]
    metadata: WeightMetadata
    matching_heuristics: bool
    record: ConversionRecord
    resnet: dict[str, Any] = field(default_factory=dict)

    def needs(self) -> dict[str, Any]:
        """Config key -> value that a model needs for them, of the keys that are known."""
        metadata = self.metadata
        forms = set(metadata.ws_convs.values())
        needs: dict[str, Any] = {}
        if forms:
            needs["MODEL.BACKBONE.NAME"] = "build_bit_*" if is_bit(self.state) else "build_ws_*"
        needs.update(self.resnet)
        if metadata.norm:
            needs["MODEL.RESNETS.NORM"] = metadata.norm
        if len(forms) == 1:
            (form,) = forms
            needs.update({"MODEL.WS.MODE": form.mode, "MODEL.WS.EPS": form.eps})
        for key, value in metadata.settings().items():
            if forms or key != "MODEL.WS.GN_GROUPS":  # plain models do not read it
                needs[key] = list(value) if isinstance(value, tuple) else value
        return needs


def convert_file(
    path: Union[str, Path],
    source: str = "auto",
    ws: Optional[bool] = None,
    allow: Sequence[str] = (),
) -> ConvertedWeights:
    """Reads a file of another framework and renames its keys to detectron2's.

    Args:
        path: a local file.
        source: a name in `SOURCES`, or "auto" to recognize it by the keys. A file from detectron2
            keeps its keys and gets the missing metadata.
        ws: whether its convs were trained with WS, for files that do not tell. Published files
            are recognized by the first digits of their SHA-256.
        allow: shell-style patterns of unexpected keys to leave out.

    Raises:
        WeightsError: the file cannot be read or is refused, its format is unknown, keys or shapes
            are unexpected, it contains NaN, or it does not say whether WS was used.
    """
    path = Path(path)
    tensors, extras = unwrap_state(read_weight_file(path), str(path))
    known = find_source(tensors, str(path), source)
    if not known.part and METADATA_KEY in extras:
        raise WeightsError(f"{path} has detectron2's keys and metadata and needs no conversion")
    converted, unstated = _convert(path, tensors, extras, known, ws, allow)
    if unstated:
        raise WeightsError(f"{path} {unstated}")
    return converted


def describe_file(
    path: Union[str, Path],
    source: str = "auto",
    ws: Optional[bool] = None,
    allow: Sequence[str] = (),
) -> str:
    """What a file is, whether it is whole, and what it needs, without converting it.

    Args:
        path: a local file, of another framework or with our metadata.
        source, ws, allow: as for `convert_file`; a file that does not say whether its convs were
            trained with WS is described without `ws` as well.

    Raises:
        WeightsError: the file is damaged or not whole, or cannot be used; see `convert_file`.
    """
    path = Path(path)
    tensors, extras = unwrap_state(read_weight_file(path), str(path))
    known = find_source(tensors, str(path), source)
    unstated = ""
    if METADATA_KEY in extras and not known.part:
        converted = _converted_before(tensors, extras, str(path))
        title = f"detectron2's layout, {converted.metadata.source}"
        if converted.metadata.origin:
            title += f", converted from {converted.metadata.origin}"
    else:
        converted, unstated = _convert(path, tensors, extras, known, ws, allow)
        title = known.title
    sha256, tensors = sha256_of(path), converted.state
    name = published_name(sha256)
    if converted.resnet:
        whole = f"whole: all {len(tensors)} tensors of {converted.metadata.architecture}"
    else:
        whole = f"{len(tensors)} tensors; whether a model is whole is checked when they are loaded"
    left_out = [entry.note for entry in converted.record.entries if entry.target is None]
    lines = [
        f"{path}: {title}",
        f"{whole}, no NaN",
        *(f"left out: {count} of {note}" for note, count in Counter(left_out).items()),
        f"SHA-256 {sha256}: " + (f"published as ws://{name}" if name else "not one known here"),
        *(f"needs: {key} {value}" for key, value in converted.needs().items()),
        *(f"to check: {setting}" for setting in converted.record.to_check),
    ]
    return "\n".join([*lines, f"The file {unstated}"] if unstated else lines)


def _converted_before(
    tensors: dict[str, torch.Tensor], extras: Mapping[str, Any], path: str
) -> ConvertedWeights:
    """A file of this package, whose ResNet is checked if it was converted from another source."""
    check_finite(tensors, path)
    metadata = WeightMetadata.from_dict(extras[METADATA_KEY], path)
    resnet: dict[str, Any] = {}
    known = SOURCES.get(str(metadata.source))
    if known and known.part:
        _, resnet = _check_architecture(tensors, known.part, path)
    heuristics = bool(extras.get("matching_heuristics", False))
    return ConvertedWeights(tensors, metadata, heuristics, ConversionRecord(), resnet)


def _convert(
    path: Path,
    tensors: State,
    extras: Mapping[str, Any],
    known: Source,
    ws: Optional[bool],
    allow: Sequence[str],
) -> tuple[ConvertedWeights, str]:
    """The converted weights, and what to say if nothing tells whether WS was used."""
    state, record = _rename(tensors, known.key_map, str(path), known.title, allow, known.hwio)
    check_finite(state, str(path))
    architecture = norm = ""
    resnet: dict[str, Any] = {}
    if known.part:
        architecture, resnet = _check_architecture(state, known.part, str(path))
        norm = "BN" if any(key.endswith(".running_mean") for key in state) else "GN"
    sha256 = sha256_of(path)
    published = published_name(sha256) is not None
    preprocessing = known.preprocessing or (IMAGENET if published else None)
    if not published:
        record.to_check += known.to_check
    stated = _has_ws(known, published, ws, norm, str(path))
    metadata = WeightMetadata(
        source=known.name,
        origin=path.name,
        sha256=sha256,
        architecture=architecture,
        ws_convs=dict.fromkeys(_normed_convs(state) if stated else [], known.ws_form),
        norm=norm,
        gn_groups=32 if preprocessing and norm == "GN" else None,
        preprocessing=preprocessing,
        stride_in_1x1=False if preprocessing else None,
    )
    heuristics = known.part in ("ResNet", "BiT") or bool(extras.get("matching_heuristics", False))
    converted = ConvertedWeights(state, metadata, heuristics, record, resnet)
    return converted, _WS_UNSTATED if stated is None else ""


def _rename(
    tensors: State,
    key_map: KeyMap,
    path: str,
    model: str,
    allow: Sequence[str],
    hwio: bool = False,
) -> tuple[dict[str, torch.Tensor], ConversionRecord]:
    """The tensors under other keys, and what became of each key."""
    state: dict[str, torch.Tensor] = {}
    record, unexpected = ConversionRecord(), []
    for key, value in tensors.items():
        target, note = key_map(key), ""
        if target is None:
            reasons = [reason for keys, reason in _LEFT_OUT.items() if re.fullmatch(keys, key)]
            if any(fnmatch.fnmatchcase(key, pattern) for pattern in allow):
                reasons.append("unexpected, allowed by name")
            if not reasons:
                unexpected.append(key)
                continue
            note = reasons[0]
        elif target in state:
            raise WeightsError(f"{path}: two keys map to {target}, one of them {key}")
        else:
            if value.dtype in (torch.float16, torch.bfloat16):
                value, note = value.float(), f"from {value.dtype} to float32"
            if hwio and value.dim() == 4:
                value, note = value.permute(3, 2, 0, 1).contiguous(), "from HWIO to OIHW"
            state[target] = value
        record.entries.append(KeyEntry(key, target, note))
    if unexpected:
        raise WeightsError(
            f"{path} is read as {model}, which has no keys {list_some(unexpected)}. --allow KEY "
            "leaves a key out; another --source may be right"
        )
    return state, record


_WS_UNSTATED = (
    "does not say whether its convs were trained with WS, and its keys are the same either way. "
    "Pass --ws (every conv before a norm layer, official form; gn+ws configs) or --no-ws (gn "
    "configs)"
)


def _has_ws(
    known: Source, published: bool, ws: Optional[bool], norm: str, path: str
) -> Optional[bool]:
    """Whether the convs were trained with WS; None if nothing tells."""
    stated = known.ws
    if stated is None and (published or norm == "BN"):
        stated = published
    if None not in (stated, ws) and stated != ws:
        raise WeightsError(
            f"{path} says {'with' if stated else 'without'} WS, you say the opposite; leave out "
            "--ws or --no-ws, or pass the right --source"
        )
    return ws if stated is None else stated


def _normed_convs(state: State) -> list[str]:
    """The convs that have WS in a model with it: those before a norm, and all of a BiT ResNet."""
    convs = [key[: -len(".weight")] for key, value in state.items() if value.dim() == 4]
    bit = is_bit(state)
    return [c for c in convs if f"{c}.norm.weight" in state or (bit and in_resnet(c))]


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_architecture(state: State, part: str, path: str) -> tuple[str, dict[str, Any]]:
    """Builds the model that the weights are for on the meta device; compares all keys and shapes.

    Args:
        state: the tensors under detectron2's keys; of a ResNet only, relative to it
            (`stem.conv1.weight`).
        part: "ResNet" or "BiT"; or "detector", a Faster or Mask R-CNN with FPN: three anchors per
            position, RoI features of 7 x 7, K + 1 class scores, background last, and K or 1 boxes
            and masks.
        path: the file, for messages.

    Returns:
        The architecture of the ResNet, such as "R-50", "X-101-32x4d" or "BiT R-50x1", and its
        config keys with their values.

    Raises:
        WeightsError: there is no such ResNet; or a key is missing, unexpected, or of the
            wrong shape.
    """
    cfg = get_config("Base-RCNN-FPN.yaml")
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", 0
    detector, bit = part == "detector", part == "BiT"
    name, keys = _set_resnet(cfg, state, BODY_PREFIX if detector else "", bit, path)
    if detector:
        _set_detector(cfg, state)
    else:
        cfg.MODEL.BACKBONE.NAME = "build_bit_resnet_backbone" if bit else "build_resnet_backbone"
    try:
        with torch.device("meta"):
            model = build_model(cfg) if detector else build_backbone(cfg)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is not a {name}: {error}") from None
    tensors = TENSORS if any(key.endswith(".running_mean") for key in state) else TENSORS[:2]
    expected = {
        key: value.shape
        for key, value in model.state_dict().items()
        if key.rpartition(".")[2] in tensors
    }
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "wrong shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
            for key, shape in expected.items()
            if key in state and state[key].shape != shape
        ],
    }
    if any(problems.values()):
        raise WeightsError(
            f"{path} is not a whole {'R-CNN with ' if detector else ''}{name}; "
            + "; ".join(f"{kind}: {list_some(keys)}" for kind, keys in problems.items() if keys)
        )
    return name, keys


def _set_resnet(
    cfg: CfgNode, state: State, prefix: str, bit: bool, path: str
) -> tuple[str, dict[str, Any]]:
    """Sets MODEL.RESNETS from the number of blocks and the first 3x3 conv.

    Returns:
        The name of the ResNet, and the keys with their values.
    """
    body = [key[len(prefix) :].split(".") for key in state if key.startswith(f"{prefix}res")]
    blocks = {tuple(parts[:2]) for parts in body if parts[1:2] != ["out"]}
    bottleneck = any("conv3" in parts for parts in body)
    depth = 2 + len(blocks) * (3 if bottleneck else 2)
    if depth not in ((50, 101, 152) if bottleneck else (18, 34)):
        kind = "bottleneck" if bottleneck else "basic"
        raise WeightsError(
            f"{path} has {len(blocks) or 'no'} {kind} blocks in its ResNet; supported: R-18, "
            "R-34, R-50, R-101, R-152"
        )
    groups, width = 1, 64
    second = state.get(f"{prefix}res2.0.conv2.weight")
    if bottleneck and second is not None and second.dim() == 4 and second.size(1) > 0:
        groups = max(second.size(0) // second.size(1), 1)
        width = second.size(0) // groups
    values = {"DEPTH": depth, "NUM_GROUPS": groups, "WIDTH_PER_GROUP": width}
    values["RES2_OUT_CHANNELS"] = 256 if bottleneck else 64
    if bit:
        values.update(STEM_OUT_CHANNELS=width, RES2_OUT_CHANNELS=4 * width)
    cfg.MODEL.RESNETS.update(values)
    name = f"R-{depth}" if width == 64 else f"R-{depth}-width{width}"
    if bit:
        name = f"BiT R-{depth}x{width / 64:g}"
    elif groups > 1:
        name = f"X-{depth}-{groups}x{width}d"
    return name, {f"MODEL.RESNETS.{key}": value for key, value in values.items()}


def _set_detector(cfg: CfgNode, state: State) -> None:
    """Sets what may differ between detectors: norms, widths, numbers of layers and classes."""

    def rows(key: str, default: int) -> int:
        return state[key].size(0) if key in state and state[key].dim() else default

    def layers(prefix: str) -> int:
        return len({key.split(".")[2] for key in state if key.startswith(prefix)})

    model, box, mask = cfg.MODEL, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
    box_head, mask_head = "roi_heads.box_head.", "roi_heads.mask_head."
    for node, conv in (
        (model.FPN, "backbone.fpn_lateral2"),
        (box, f"{box_head}conv1"),
        (mask, f"{mask_head}mask_fcn1"),
    ):
        node.NORM = "BN" if f"{conv}.norm.weight" in state else ""
    model.FPN.OUT_CHANNELS = rows("backbone.fpn_lateral2.weight", 256)
    box.NUM_CONV, box.NUM_FC = layers(f"{box_head}conv"), layers(f"{box_head}fc")
    box.CONV_DIM = rows(f"{box_head}conv1.weight", 256)
    box.FC_DIM = rows(f"{box_head}fc1.weight", 1024)
    model.ROI_HEADS.NUM_CLASSES = rows("roi_heads.box_predictor.cls_score.weight", 81) - 1
    box.CLS_AGNOSTIC_BBOX_REG = rows("roi_heads.box_predictor.bbox_pred.weight", 0) == 4
    model.MASK_ON = any(key.startswith(mask_head) for key in state)
    mask.NUM_CONV = layers(f"{mask_head}mask_fcn")
    mask.CONV_DIM = rows(f"{mask_head}deconv.weight", 256)
    mask.CLS_AGNOSTIC_MASK = rows(f"{mask_head}predictor.weight", 0) == 1


def write_detectron2(converted: ConvertedWeights, path: Union[str, Path]) -> None:
    """Writes a file that detectron2 loads, with or without this package.

    Args:
        converted: as returned by `convert_file`.
        path: `.pkl` for a pickle of numpy arrays, `.pth` for a torch file.

    Raises:
        WeightsError: `path` has another extension.
    """
    path = Path(path)
    content: dict[str, Any] = {
        "model": converted.state,
        "__author__": f"ws_detectron, converted from {converted.metadata.origin}",
        "matching_heuristics": converted.matching_heuristics,
        METADATA_KEY: converted.metadata.as_dict(),
    }
    if path.suffix not in (".pth", ".pkl"):
        raise WeightsError(
            f"the output {path} must end in .pth or .pkl, which tells detectron2 its format"
        )
    with atomic_write(path, "wb") as file:
        if path.suffix == ".pkl":
            content["model"] = {key: value.numpy() for key, value in converted.state.items()}
            pickle.dump(content, file, protocol=4)
        else:
            torch.save(content, file)


def write_mmdet(
    source: Union[str, Path], path: Union[str, Path], allow: Sequence[str] = ()
) -> ConversionRecord:
    """Converts a detectron2 file to mmdetection's layout.

    Args:
        source: a checkpoint of a ResNet, a Faster or a Mask R-CNN with FPN, trained here or
            converted by `convert_file`.
        path: the torch file to write, for mmdetection 2.x and 3.x.
        allow: shell-style patterns of unexpected keys to leave out; "ws" allows a WS mode or eps
            that mmcv's ConvWS does not have.

    Returns:
        What became of each key.

    Raises:
        WeightsError: the file cannot be read, a key has no counterpart in mmdetection, or its WS
            mode or eps is not that of mmcv's ConvWS.
        UserError: `path` is `source`.
    """
    refuse_overwrite(path, [source])
    tensors, extras = unwrap_state(read_weight_file(source), str(source))
    check_finite(tensors, str(source))
    values = extras.get(METADATA_KEY)
    metadata = None if values is None else WeightMetadata.from_dict(values, str(source))
    for conv, form in metadata.ws_convs.items() if metadata else ():
        if outputs_differ(form, OFFICIAL_WS) and "ws" not in allow:
            raise WeightsError(
                f"{source}: {conv} has WS ({form}), mmcv's ConvWS is ({OFFICIAL_WS}). --allow ws "
                "converts it anyway"
            )
    norm = "bn" if any(key.endswith("running_mean") for key in tensors) else "gn"
    detector = any(key.startswith("backbone.") for key in tensors)
    key_maps = to_mmdet_key if detector else to_torchvision_key
    title = f"a {'Faster or Mask R-CNN' if detector else 'ResNet'} for mmdetection"
    state, record = _rename(tensors, key_maps[norm], str(source), title, allow)
    if metadata is None:
        record.to_check.append("ConvWS in the mmdetection config where the model has WS")
    with atomic_write(path, "wb") as file:
        content = {"meta": {"converted_by": "ws_detectron"}, "state_dict": OrderedDict(state)}
        torch.save(content, file)
    return record
