"""Converts the weight files of other systems to detectron2's keys."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import torch

from ws_detectron.errors import WeightsError, list_some
from ws_detectron.layers import DEFAULT_WS_EPS, DEFAULT_WS_MODE

from .architecture import infer_architecture
from .detector import check_detector
from .metadata import METADATA_KEY, ConversionRecord, KeyEntry, WeightMetadata, WSForm
from .mmdet_settings import MMDetSettings, read_mmdet_settings
from .names import find_by_sha256
from .reading import read_weight_file
from .sources import (
    SOURCES,
    Source,
    is_detectron2,
    recognize,
    refuse_known_misfits,
    refuse_other_detectors,
)
from .state import RawState, check_finite, is_allowed, normed_convs, unwrap_state

OFFICIAL_WS = WSForm(DEFAULT_WS_MODE, DEFAULT_WS_EPS)

# Module of a mmdetection config -> where its convs are in detectron2.
_PARTS = {
    "backbone": "backbone.bottom_up.",
    "neck": "backbone.fpn_",
    "bbox_head": "roi_heads.box_head.",
    "mask_head": "roi_heads.mask_head.",
}


@dataclass(frozen=True)
class ConvertedWeights:
    """Weights under detectron2's keys.

    Attributes:
        state: a ResNet alone has keys relative to the ResNet (`stem.conv1.weight`), which
            detectron2 matches by their endings; a detector has full keys.
        metadata: what a model needs to use them.
        matching_heuristics: whether detectron2 must match keys by their endings.
        record: what was done with each key.
    """

    state: dict[str, torch.Tensor]
    metadata: WeightMetadata
    matching_heuristics: bool
    record: ConversionRecord


def convert_file(
    path: Union[str, Path],
    source: str = "auto",
    ws: Optional[bool] = None,
    allow: Sequence[str] = (),
) -> ConvertedWeights:
    """Reads a file of another system and gives it detectron2's keys.

    Args:
        path: a local file.
        source: a name of `SOURCES`, "detectron2", or "auto" to tell it from the keys. A file of
            detectron2's keeps its keys and gets the metadata that it lacks.
        ws: whether its convs were trained with WS, for files that do not tell. Published files
            are known by their SHA-256.
        allow: shell-style patterns of unexpected keys to leave out, and of settings in a
            mmdetection config that differ from what this project's configs compute.

    Raises:
        WeightsError: the file cannot be read or is refused, its kind is unknown, keys or shapes
            are unexpected, it has NaN, or it does not say whether WS was used.
    """
    path = Path(path)
    raw = unwrap_state(read_weight_file(path), str(path))
    keys = list(raw.tensors)
    refuse_other_detectors(keys, str(path))
    if source == "detectron2" or (source == "auto" and is_detectron2(keys)):
        return _own_file(raw, path, ws)
    if source == "auto":
        kind = recognize(keys, str(path), raw.wrapped)
    elif source in SOURCES:
        kind = SOURCES[source]
        refuse_known_misfits(keys, str(path))
    else:
        raise WeightsError(f"unknown source {source!r}; allowed: {', '.join(source_names())}")
    record = ConversionRecord()
    state = _map_keys(raw, kind, str(path), allow, record)
    check_finite(state, str(path))
    if kind.whole_detector:
        architecture = check_detector(state, str(path))
    else:
        architecture = infer_architecture(state, str(path))

    sha256 = _sha256(path)
    published = find_by_sha256(sha256) is not None
    settings = None
    # Published files carry the configs of early versions; what holds for them is those of 3.3.
    if kind.whole_detector and not published:
        settings = read_mmdet_settings(raw.extras.get("meta"))
        _check_settings(settings, str(path), allow, record)
    norm = "BN" if any(key.endswith(".running_mean") for key in state) else "GN"
    told = True if published else kind.ws
    ws_convs = _ws_convs(state, told, settings, ws, norm, str(path), record)
    metadata = WeightMetadata(
        source=kind.name,
        origin=path.name,
        sha256=sha256,
        architecture=architecture.name,
        ws_convs=ws_convs,
        norm=norm,
        gn_groups=_gn_groups(norm, settings, record),
        preprocessing=(settings and settings.preprocessing) or kind.preprocessing,
        stride_in_1x1=bool(settings and settings.stride_in_1x1),
    )
    return ConvertedWeights(state, metadata, not kind.whole_detector, record)


def source_names() -> list[str]:
    """What `convert_file` takes as `source`."""
    return ["auto", *SOURCES, "detectron2"]


def _own_file(raw: RawState, path: Path, ws: Optional[bool]) -> ConvertedWeights:
    """A file with detectron2's keys, for instance of a run without this package."""
    check_finite(raw.tensors, str(path))
    if METADATA_KEY in raw.extras:
        raise WeightsError(f"{path} has detectron2's keys and metadata and needs no conversion")
    if ws is None:
        raise WeightsError(
            f"{path} has detectron2's keys. To record whether its convs were trained with WS, say "
            "--ws (every conv before a norm layer, official form) or --no-ws"
        )
    metadata = WeightMetadata(
        source="detectron2",
        origin=path.name,
        sha256=_sha256(path),
        ws_convs=dict.fromkeys(normed_convs(raw.tensors), OFFICIAL_WS) if ws else {},
    )
    record = ConversionRecord(
        [KeyEntry(key, key) for key in raw.tensors],
        ["input, stride style and GN groups are not recorded, as the file does not say them"],
    )
    heuristics = bool(raw.extras.get("matching_heuristics", False))
    return ConvertedWeights(raw.tensors, metadata, heuristics, record)


def _map_keys(
    raw: RawState, kind: Source, path: str, allow: Sequence[str], record: ConversionRecord
) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    unexpected = []
    for key, value in raw.tensors.items():
        target, note = kind.key_map(key), ""
        if key.rsplit(".", 1)[-1] == "num_batches_tracked":
            target, note = None, "BN's count of training steps, of no use to detectron2"
        elif target is None and key in ("fc.weight", "fc.bias", "pred_w", "pred_b"):
            note = "ImageNet classifier, which a detector does not have"
        elif target is None and is_allowed(key, allow):
            note = "unexpected, allowed by name"
        elif target is None:
            unexpected.append(key)
            continue
        elif target in state:
            raise WeightsError(f"{path}: two keys stand for {target}, one of them {key}")
        elif value.dtype in (torch.float16, torch.bfloat16):
            value, note = value.float(), f"from {value.dtype} to float32"
        if target is not None:
            state[target] = value
        record.entries.append(KeyEntry(key, target, note))
    if unexpected:
        raise WeightsError(
            f"{path} is read as {kind.title}, which has no keys {list_some(unexpected)}. Another "
            "--source may be right; --allow KEY leaves a key out"
        )
    return state


def _check_settings(
    settings: Optional[MMDetSettings],
    path: str,
    allow: Sequence[str],
    record: ConversionRecord,
) -> None:
    if settings is None:
        record.assumptions.append(
            "the file has no readable config: anchors, box coder, RoIAlign, mean and std, and "
            "stride style as in mmdetection's gn_ws-all configs"
        )
        return
    for name, difference in settings.unfit.items():
        if not is_allowed(name, allow):
            raise WeightsError(
                f"{path} was trained with another {name} than the configs here ({difference}). "
                f"Set it in your config and say --allow {name}"
            )
        record.assumptions.append(f"your config takes care of {name} ({difference})")


def _ws_convs(
    state: dict[str, torch.Tensor],
    told: Optional[bool],
    settings: Optional[MMDetSettings],
    ws: Optional[bool],
    norm: str,
    path: str,
    record: ConversionRecord,
) -> dict[str, WSForm]:
    convs = normed_convs(state)
    parts = settings.ws_parts if settings else None
    if parts is not None:
        prefixes = tuple(_PARTS[part] for part in parts)
        convs = [name for name in convs if name.startswith(prefixes)] if prefixes else []
        told = bool(convs)
    if told is None and norm == "BN":
        told = False
        record.assumptions.append("no WS, as the norm layers are BN")
    if told is not None and ws is not None and told != ws:
        raise WeightsError(
            f"{path} says {'with' if told else 'without'} WS, you say the opposite; leave out "
            "--ws or --no-ws, or name the right --source"
        )
    told = ws if told is None else told
    if told is None:
        raise WeightsError(
            f"{path} does not say whether its convs were trained with WS, and its keys are the "
            "same either way. Say --ws (gn+ws configs) or --no-ws (gn configs)"
        )
    return dict.fromkeys(convs, OFFICIAL_WS) if told else {}


def _gn_groups(
    norm: str, settings: Optional[MMDetSettings], record: ConversionRecord
) -> Optional[int]:
    if norm != "GN":
        return None
    if settings and settings.gn_groups:
        return settings.gn_groups
    record.assumptions.append("32 groups in each GN, as in all published files")
    return 32


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
