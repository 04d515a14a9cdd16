"""Writes weights for detectron2 and for mmdetection."""

import pickle
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

import torch

from ws_detectron.errors import WeightsError, list_some
from ws_detectron.utils.io import atomic_write, refuse_overwrite

from .convert_file import OFFICIAL_WS, ConvertedWeights
from .layouts import to_mmdet_key
from .metadata import METADATA_KEY, ConversionRecord, KeyEntry, WeightMetadata
from .reading import check_finite, is_allowed, read_weight_file, unwrap_state

# Buffers in some versions of detectron2; mmdetection has them in its config.
_CONSTANTS = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.")


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
    raw = unwrap_state(read_weight_file(source), str(source))
    check_finite(raw.tensors, str(source))
    record = ConversionRecord()
    _check_ws(raw.extras.get(METADATA_KEY), str(source), allow, record)
    norm = "bn" if any(key.endswith("running_mean") for key in raw.tensors) else "gn"
    whole = any(key.startswith("backbone.") for key in raw.tensors)
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    unexpected = []
    for key, value in raw.tensors.items():
        full = key if whole else f"backbone.bottom_up.{key}"
        target, note = to_mmdet_key(full, norm), ""
        if key.startswith(_CONSTANTS):
            note = "part of the config in mmdetection"
        elif target is None and is_allowed(key, allow):
            note = "unexpected, allowed by name"
        elif target is None:
            unexpected.append(key)
            continue
        else:
            target = target if whole else target[len("backbone.") :]
            state[target] = value
        record.entries.append(KeyEntry(key, target, note))
    if unexpected:
        raise WeightsError(
            f"{source} has keys without a counterpart in mmdetection's Faster or Mask R-CNN: "
            f"{list_some(unexpected)}. --allow KEY leaves a key out"
        )
    with atomic_write(path, "wb") as file:
        torch.save({"meta": {"converted_by": "ws_detectron"}, "state_dict": state}, file)
    return record


def _check_ws(values: Any, path: str, allow: Sequence[str], record: ConversionRecord) -> None:
    if values is None:
        record.assumptions.append("ConvWS in the mmdetection config where the model has WS")
        return
    metadata = WeightMetadata.from_dict(values, path)
    for conv, form in metadata.ws_convs.items():
        # "paper" differs from "official" by a constant factor, which the norm layer removes.
        if form.mode not in ("paper", "official") or form.eps != OFFICIAL_WS.eps:
            if not is_allowed("ws", allow):
                raise WeightsError(
                    f"{path}: {conv} has WS ({form}), mmcv's ConvWS is ({OFFICIAL_WS}). "
                    "--allow ws converts it anyway"
                )
            break
