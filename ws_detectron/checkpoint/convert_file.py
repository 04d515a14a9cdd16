"""Converts the weight files of other frameworks to detectron2's keys."""

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
from .reading import (
    RawState,
    check_finite,
    is_allowed,
    normed_convs,
    read_weight_file,
    unwrap_state,
)
from .sources import (
    SOURCES,
    Source,
    is_detectron2,
    recognize,
    refuse_known_misfits,
    refuse_other_detectors,
)

OFFICIAL_WS = WSForm(DEFAULT_WS_MODE, DEFAULT_WS_EPS)

# Module in a mmdetection config -> prefix of its convs in detectron2.
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
        state: a detector has full keys. A ResNet has relative ones (`stem.conv1.weight`), which
            detectron2 matches by suffix.
        metadata: what a model needs to use them.
        matching_heuristics: whether detectron2 must match keys by suffix.
        record: what became of each key.
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
    """Reads a file of another framework and renames its keys to detectron2's.

    Args:
        path: a local file.
        source: a name in `SOURCES`, "detectron2", or "auto" to recognize it by the keys. A file
            from detectron2 keeps its keys and gets the missing metadata.
        ws: whether its convs were trained with WS, for files that do not tell. Published files
            are recognized by their SHA-256.
        allow: shell-style patterns: unexpected keys to leave out, and settings in a mmdetection
            config that may differ from this project's configs.

    Raises:
        WeightsError: the file cannot be read or is refused, its format is unknown, keys or shapes
            are unexpected, it contains NaN, or it does not say whether WS was used.
    """
    path = Path(path)
    raw = unwrap_state(read_weight_file(path), str(path))
    keys = list(raw.tensors)
    refuse_other_detectors(keys, str(path))
    if source == "detectron2" or (source == "auto" and is_detectron2(keys)):
        return _own_file(raw, path, ws)
    if source == "auto":
        known = recognize(keys, str(path), raw.wrapped)
    elif source in SOURCES:
        known = SOURCES[source]
        refuse_known_misfits(keys, str(path))
    else:
        raise WeightsError(f"unknown source {source!r}; allowed: {', '.join(source_names())}")
    record = ConversionRecord()
    state = _map_keys(raw, known, str(path), allow, record)
    check_finite(state, str(path))
    if known.whole_detector:
        architecture = check_detector(state, str(path))
    else:
        architecture = infer_architecture(state, str(path))

    sha256 = sha256_of(path)
    published = find_by_sha256(sha256) is not None
    settings = None
    # Published files contain configs of early versions; those of mmdetection 3.3 apply to them.
    if known.whole_detector and not published:
        settings = read_mmdet_settings(raw.extras.get("meta"))
        _check_settings(settings, str(path), allow, record)
    norm = "BN" if any(key.endswith(".running_mean") for key in state) else "GN"
    stated = True if published else known.ws
    ws_convs = _ws_convs(state, stated, settings, ws, norm, str(path), record)
    metadata = WeightMetadata(
        source=known.name,
        origin=path.name,
        sha256=sha256,
        architecture=architecture.name,
        ws_convs=ws_convs,
        norm=norm,
        gn_groups=_gn_groups(norm, settings, record),
        preprocessing=(settings and settings.preprocessing) or known.preprocessing,
        stride_in_1x1=bool(settings and settings.stride_in_1x1),
    )
    return ConvertedWeights(state, metadata, not known.whole_detector, record)


def source_names() -> list[str]:
    """The allowed values of `source` in `convert_file`."""
    return ["auto", *SOURCES, "detectron2"]


def _own_file(raw: RawState, path: Path, ws: Optional[bool]) -> ConvertedWeights:
    """A file with detectron2's keys, for example of a run without this package."""
    check_finite(raw.tensors, str(path))
    if METADATA_KEY in raw.extras:
        raise WeightsError(f"{path} has detectron2's keys and metadata and needs no conversion")
    if ws is None:
        raise WeightsError(
            f"{path} has detectron2's keys. To record whether its convs were trained with WS, pass "
            "--ws (every conv before a norm layer, official form) or --no-ws"
        )
    metadata = WeightMetadata(
        source="detectron2",
        origin=path.name,
        sha256=sha256_of(path),
        ws_convs=dict.fromkeys(normed_convs(raw.tensors), OFFICIAL_WS) if ws else {},
    )
    record = ConversionRecord(
        [KeyEntry(key, key) for key in raw.tensors],
        ["input format, stride style and GN groups are not recorded: the file does not say them"],
    )
    heuristics = bool(raw.extras.get("matching_heuristics", False))
    return ConvertedWeights(raw.tensors, metadata, heuristics, record)


def _map_keys(
    raw: RawState, source: Source, path: str, allow: Sequence[str], record: ConversionRecord
) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    unexpected = []
    for key, value in raw.tensors.items():
        target, note = source.key_map(key), ""
        if key.rsplit(".", 1)[-1] == "num_batches_tracked":
            target, note = None, "BN's step counter, which detectron2 does not use"
        elif target is None and key in ("fc.weight", "fc.bias", "pred_w", "pred_b"):
            note = "ImageNet classifier, which a detector does not have"
        elif target is None and is_allowed(key, allow):
            note = "unexpected, allowed by name"
        elif target is None:
            unexpected.append(key)
            continue
        elif target in state:
            raise WeightsError(f"{path}: two keys map to {target}, one of them {key}")
        elif value.dtype in (torch.float16, torch.bfloat16):
            value, note = value.float(), f"from {value.dtype} to float32"
        if target is not None:
            state[target] = value
        record.entries.append(KeyEntry(key, target, note))
    if unexpected:
        raise WeightsError(
            f"{path} is read as {source.title}, which has no keys {list_some(unexpected)}. Another "
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
            "anchors, box coder, RoIAlign, mean, std and stride style as in mmdetection's "
            "gn_ws-all configs, because the file has no readable config"
        )
        return
    for name, difference in settings.unfit.items():
        if not is_allowed(name, allow):
            raise WeightsError(
                f"{path} was trained with another {name} than the configs here ({difference}). "
                f"Set it in your config and pass --allow {name}"
            )
        record.assumptions.append(f"your config sets {name} ({difference})")


def _ws_convs(
    state: dict[str, torch.Tensor],
    stated: Optional[bool],
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
        stated = bool(convs)
    if stated is None and norm == "BN":
        stated = False
        record.assumptions.append("no WS, because the norm layers are BN")
    if stated is not None and ws is not None and stated != ws:
        raise WeightsError(
            f"{path} says {'with' if stated else 'without'} WS, you say the opposite; leave out "
            "--ws or --no-ws, or pass the right --source"
        )
    stated = ws if stated is None else stated
    if stated is None:
        raise WeightsError(
            f"{path} does not say whether its convs were trained with WS, and its keys are the "
            "same either way. Pass --ws (gn+ws configs) or --no-ws (gn configs)"
        )
    return dict.fromkeys(convs, OFFICIAL_WS) if stated else {}


def _gn_groups(
    norm: str, settings: Optional[MMDetSettings], record: ConversionRecord
) -> Optional[int]:
    if norm != "GN":
        return None
    if settings and settings.gn_groups:
        return settings.gn_groups
    record.assumptions.append("32 GN groups, as in all published files")
    return 32


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
