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

from ws_detectron.errors import WeightsError, list_some
from ws_detectron.layers import DEFAULT_WS_EPS, DEFAULT_WS_MODE
from ws_detectron.utils.io import atomic_write, refuse_overwrite

from .architecture import check_architecture
from .fit import outputs_differ
from .metadata import METADATA_KEY, WeightMetadata, WSForm
from .reading import check_finite, read_weight_file, unwrap_state
from .sources import (
    BODY_PREFIX,
    KeyMap,
    Source,
    find_source,
    is_published,
    to_mmdet_key,
)

OFFICIAL_WS = WSForm(DEFAULT_WS_MODE, DEFAULT_WS_EPS)

# Keys without a counterpart that are left out.
_LEFT_OUT = {
    r".*num_batches_tracked": "BN's step counter, which no output depends on",
    r"fc\.(weight|bias)|pred_[wb]": "ImageNet classifier, which a detector does not have",
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
    """What became of every key of a file.

    Attributes:
        entries: one for each key.
        to_check: what the user must check, because the file does not tell.
    """

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
    state, record, unexpected = _rename(tensors, known.key_map, str(path), allow)
    if unexpected:
        raise WeightsError(
            f"{path} is read as {known.title}, which has no keys {list_some(unexpected)}. Another "
            "--source may be right; --allow KEY leaves a key out"
        )
    check_finite(state, str(path))
    detector = known.part == "detector"
    architecture = check_architecture(state, detector, str(path)) if known.part else ""
    norm = ""
    if known.part:
        norm = "BN" if any(key.endswith(".running_mean") for key in state) else "GN"
    sha256 = sha256_of(path)
    published = is_published(sha256)
    convs = _normed_convs(state) if _has_ws(known, published, ws, norm, str(path)) else []
    certain = published or known.part == "ResNet"
    if not published:
        record.to_check += known.to_check
    metadata = WeightMetadata(
        source=known.name,
        origin=path.name,
        sha256=sha256,
        architecture=architecture,
        ws_convs=dict.fromkeys(convs, OFFICIAL_WS),
        norm=norm,
        gn_groups=32 if certain and norm == "GN" else None,
        preprocessing=known.preprocessing if certain else None,
        stride_in_1x1=False if certain else None,
    )
    heuristics = known.part == "ResNet" or bool(extras.get("matching_heuristics", False))
    return ConvertedWeights(state, metadata, heuristics, record)


def _rename(
    tensors: Mapping[str, torch.Tensor], key_map: KeyMap, path: str, allow: Sequence[str]
) -> tuple[dict[str, torch.Tensor], ConversionRecord, list[str]]:
    """The tensors under other keys, what became of each key, and the keys without counterpart."""
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
            state[target] = value
        record.entries.append(KeyEntry(key, target, note))
    return state, record, unexpected


def _has_ws(known: Source, published: bool, ws: Optional[bool], norm: str, path: str) -> bool:
    stated = True if published else known.ws
    if stated is None and norm == "BN":
        stated = False
    if None not in (stated, ws) and stated != ws:
        raise WeightsError(
            f"{path} says {'with' if stated else 'without'} WS, you say the opposite; leave out "
            "--ws or --no-ws, or pass the right --source"
        )
    stated = ws if stated is None else stated
    if stated is None:
        raise WeightsError(
            f"{path} does not say whether its convs were trained with WS, and its keys are the "
            "same either way. Pass --ws (every conv before a norm layer, official form; gn+ws "
            "configs) or --no-ws (gn configs)"
        )
    return stated


def _normed_convs(state: Mapping[str, torch.Tensor]) -> list[str]:
    ending = ".norm.weight"
    names = [key[: -len(ending)] for key in state if key.endswith(ending)]
    return [
        name for name in names if f"{name}.weight" in state and state[f"{name}.weight"].dim() == 4
    ]


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


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
    translate = to_mmdet_key[norm]
    detector = any(key.startswith("backbone.") for key in tensors)

    def key_map(key: str) -> Optional[str]:
        if detector:
            return translate(key)
        full = translate(BODY_PREFIX + key)
        return full and full[len("backbone.") :]

    state, record, unexpected = _rename(tensors, key_map, str(source), allow)
    if unexpected:
        raise WeightsError(
            f"{source} has keys without a counterpart in mmdetection's Faster or Mask R-CNN: "
            f"{list_some(unexpected)}. --allow KEY leaves a key out"
        )
    if metadata is None:
        record.to_check.append("ConvWS in the mmdetection config where the model has WS")
    with atomic_write(path, "wb") as file:
        content = {"meta": {"converted_by": "ws_detectron"}, "state_dict": OrderedDict(state)}
        torch.save(content, file)
    return record
