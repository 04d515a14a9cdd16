"""Whether weights fit the model they are about to be loaded into."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from ws_detectron.errors import list_some
from ws_detectron.layers import standardize_weight
from ws_detectron.modeling.parts import REGISTRATIONS

from .metadata import WeightMetadata, WSForm, describe_model

_BLOCK = re.compile(r"(?:^|\.)(res\d+)\.(\d+)\.")
_BODY = re.compile(r"(?:^|\.)((?:stem|res\d+)\..+)$")
_PLAIN_AUTHORS = ("torchvision", "pycls", "detectron2 model zoo")
# Predictors, whose size depends on the data set.
_CLASSES = (
    (r"roi_heads\.(box_predictor|mask_head\.predictor)\.", "MODEL.ROI_HEADS.NUM_CLASSES"),
    (r"head\.cls_score\.", "MODEL.RETINANET.NUM_CLASSES"),
    (r"sem_seg_head\.predictor\.", "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
)

State = Mapping[str, torch.Tensor]


@dataclass
class Fit:
    """The differences between a file and a model.

    Attributes:
        problems: reasons why the model would compute something else than it was trained to.
        warnings: what the file does not tell.
        foldable: name of each conv that is plain in the model and WS in the file -> its WS mode
            and eps. A problem unless the filters are folded.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    foldable: dict[str, WSForm] = field(default_factory=dict)


def check_fit(
    model: nn.Module, state: State, metadata: Optional[WeightMetadata], author: str = ""
) -> Fit:
    """Compares weights with the model that they will be loaded into.

    Parts of the model that the file lacks are ignored: it may contain a backbone only.

    Args:
        model: not wrapped in DistributedDataParallel.
        state: the weights, under the keys of the model.
        metadata: of the file; None if it has none.
        author: the entry `__author__` of the file.
    """
    fit = Fit()
    own = model.state_dict()
    if not any(key in own for key in state):
        fit.problems.append(
            f"no tensor of the file has a name in the model; the file has {list_some(list(state))}"
            f", the model {list_some(list(own))}"
        )
        return fit
    needs = describe_model(model)
    fit.problems += _compare_tensors(model, own, state)
    _compare_norms(model, own, state, metadata, fit)
    if metadata is not None:
        _compare_ws(model, state, needs.ws_convs, metadata.ws_convs, fit)
    else:
        _judge_unknown_ws(needs, state, author, fit)
    if metadata is not None and any(_BODY.search(key) for key in state):
        fit.problems += _compare_settings(needs, metadata)
    return fit


def missing_weights(model: nn.Module, incompatible: Any) -> list[str]:
    """Describes the weights that a model did not get from a file, one sentence per part or tensor.

    Args:
        model: with the file loaded.
        incompatible: as returned by `Checkpointer._load_model`, with `missing_keys` and
            `incorrect_shapes`.
    """
    found = []
    for key, there, here in incompatible.incorrect_shapes:
        settings = [name for pattern, name in _CLASSES if re.match(pattern, key)]
        hint = f" (check {settings[0]})" if settings else ""
        found.append(f"{key} is {there} in the file and {here} in the model{hint}")
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name, value in model.named_buffers(remove_duplicate=False):
        if name.endswith((".running_mean", ".running_var")):
            tensors[name] = value
    # A shared tensor may be loaded under another name.
    missing = set(incompatible.missing_keys)
    loaded = {id(value) for name, value in tensors.items() if name not in missing}
    wrong = {key for key, *_ in incompatible.incorrect_shapes}
    lacking = [n for n, value in tensors.items() if id(value) not in loaded and n not in wrong]
    total = Counter(map(_part, tensors))
    for part, count in Counter(map(_part, lacking)).items():
        first = next(name for name in lacking if _part(name) == part)
        found.append(f"{part} lacks {count} of {total[part]} tensors ({first}, ...)")
    return found


def parts_of(keys: Iterable[str]) -> list[str]:
    """The parts of a model that keys belong to, each with its number of keys."""
    return [f"{part} ({count})" for part, count in Counter(map(_part, keys)).items()]


def part_keys() -> str:
    """The config keys that select parts with or without WS, for a message."""
    keys = dict.fromkeys(row.key for row in REGISTRATIONS)
    return f"{', '.join(keys)}; names in ws_detectron.modeling.REGISTRATIONS"


def _part(key: str) -> str:
    return ".".join(key.split(".")[: 2 if key.startswith("roi_heads.") else 1])


def fold_into(state: dict[str, torch.Tensor], foldable: Mapping[str, WSForm]) -> None:
    """Replaces the filters of these convs with the standardized ones, in place."""
    for name, form in foldable.items():
        key = f"{name}.weight"
        state[key] = standardize_weight(state[key], form.eps, form.mode)


def _compare_tensors(model: nn.Module, own: State, state: State) -> Iterator[str]:
    """Finds a missing backbone, and ResNets that detectron2 would load partially."""
    backbone = [name for name, _ in model.named_parameters() if name.startswith("backbone.")]
    if backbone and not any(name in state for name in backbone):
        yield (
            "the file has no weights for the backbone, which would stay random: the model's are "
            f"{list_some(backbone, 2)}, the file has {list_some(list(state), 4)}"
        )
    there, here = _count_blocks(state), _count_blocks(own)
    for stage in sorted(there.keys() & here.keys()):
        if there[stage] != here[stage]:
            yield (
                f"{stage} has {there[stage]} blocks in the file and {here[stage]} in the model; "
                "check MODEL.RESNETS.DEPTH"
            )
    # What detectron2 cannot match by its shape keeps the key of the file.
    by_ending = _by_ending(own)
    wrong = []
    for key, value in state.items():
        match = _BODY.search(key)
        target = key if key in own else by_ending.get(match[1]) if match else None
        if match and target and own[target].shape != value.shape:
            wrong.append(f"{target} {tuple(value.shape)} instead of {tuple(own[target].shape)}")
    if wrong:
        yield (
            f"the file has other shapes than the model: {list_some(wrong, 3)}; check "
            "MODEL.RESNETS.DEPTH, .NUM_GROUPS and .WIDTH_PER_GROUP"
        )


def _count_blocks(keys: Iterable[str]) -> Counter:
    blocks = {match.groups() for key in keys if (match := _BLOCK.search(key))}
    return Counter(stage for stage, _ in blocks)


def _by_ending(keys: Iterable[str]) -> dict[str, str]:
    """Key relative to the ResNet -> key in the model."""
    return {match[1]: key for key in keys if (match := _BODY.search(key))}


def _compare_norms(
    model: nn.Module, own: State, state: State, metadata: Optional[WeightMetadata], fit: Fit
) -> None:
    known = {*own, *_by_ending(own)}
    statistics = ".norm.running_mean"
    names = [key[: -len(".running_mean")] for key in state if key.endswith(statistics)]
    unused = [n for n in names if f"{n}.running_mean" not in known and f"{n}.weight" in known]
    if unused:
        fit.problems.append(
            f"the file has BN statistics and the model another norm at {list_some(unused)}; "
            "check MODEL.RESNETS.NORM"
        )
    gn = metadata is not None and metadata.norm == "GN"
    lacking = own.keys() - state.keys()
    without = [
        name
        for name, module in model.named_modules()
        if f"{name}.running_mean" in lacking
        and f"{name}.weight" in state
        and (gn or isinstance(module, nn.modules.batchnorm._BatchNorm))
    ]
    if without and gn:
        fit.problems.append(
            f"the weights were trained with GN and the model has BN at {list_some(without)}; check "
            "MODEL.RESNETS.NORM"
        )
    elif without:
        fit.warnings.append(
            f"the file has no BN statistics for {list_some(without)}; only FrozenBN works without "
            "them"
        )


def _compare_ws(
    model: nn.Module,
    state: State,
    needed: Mapping[str, WSForm],
    given: Mapping[str, WSForm],
    fit: Fit,
) -> None:
    plain_in_file, other_form = [], []
    factors: dict[str, None] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or f"{name}.weight" not in state:
            continue
        here, there = needed.get(name), _form(name, given)
        if here and not there:
            plain_in_file.append(name)
        elif there and not here:
            fit.foldable[name] = there
        elif here and there and here != there:
            forms = f"({there}) in the file and ({here}) in the model"
            if outputs_differ(here, there):
                other_form.append(f"{name} is {forms}")
            else:
                factors[f"WS is {forms}, which differ by a constant factor only"] = None
    fit.warnings += factors
    if plain_in_file:
        fit.problems.append(
            f"{len(plain_in_file)} convs are WS in the model and were trained without it "
            f"({list_some(plain_in_file, 3)}): use weights trained with WS, or turn WS off in this "
            f"part (MODEL.WS.*; {part_keys()})"
        )
    if other_form:
        fit.problems.append(
            f"{len(other_form)} convs have another form of WS: {other_form[0]}; check "
            "MODEL.WS.MODE and MODEL.WS.EPS"
        )


def _form(name: str, given: Mapping[str, WSForm]) -> Optional[WSForm]:
    """The file's WS form of a conv in the model, whose name may have a longer prefix."""
    parts = name.split(".")
    endings = (".".join(parts[start:]) for start in range(len(parts)))
    return next((given[ending] for ending in endings if ending in given), None)


def outputs_differ(one: WSForm, other: WSForm) -> bool:
    """Whether a conv and its norm layer compute something else with another form of WS."""
    # "paper" and "official" differ by a factor sqrt(n / (n - 1)), which the norm layer removes.
    same_mode = one.mode == other.mode or {one.mode, other.mode} == {"paper", "official"}
    return one.eps != other.eps or not same_mode


def _judge_unknown_ws(needs: WeightMetadata, state: State, author: str, fit: Fit) -> None:
    ws_convs = [name for name in needs.ws_convs if f"{name}.weight" in state]
    if ws_convs and author == "Caffe2":
        fit.problems.append(
            "the model has WS, and a Caffe2-style file does not say whether its weights were "
            "trained with WS; convert those of the WS authors first: "
            "tools/convert_weights.py --source ws-authors-caffe2"
        )
    elif ws_convs and author.lower() in _PLAIN_AUTHORS:
        fit.problems.append(
            f"the model has WS ({list_some(ws_convs, 3)}), and the weights of {author} were "
            "trained without it: use weights trained with WS, or a model without WS"
        )
    elif ws_convs or (needs.norm == "GN" and not author):
        fit.warnings.append(
            "the file does not say whether its convs were trained with WS, and the model has "
            + ("WS" if needs.ws_convs else "no WS")
            + ". If they differ, the results will be wrong; the weights themselves do not tell"
        )


def _compare_settings(needs: WeightMetadata, metadata: WeightMetadata) -> Iterator[str]:
    pairs: list[tuple[str, Any, Any]] = [
        ("MODEL.RESNETS.STRIDE_IN_1X1", needs.stride_in_1x1, metadata.stride_in_1x1),
        ("MODEL.WS.GN_GROUPS (32 in detectron2)", needs.gn_groups, metadata.gn_groups),
    ]
    here, there = needs.preprocessing, metadata.preprocessing
    if here and there:
        pairs.append(("INPUT.FORMAT", here.input_format, there.input_format))
        # Half a grey level is below the rounding of pixels and above that of published decimals.
        for key, ours, theirs, tolerance in (
            ("MODEL.PIXEL_MEAN", here.pixel_mean, there.pixel_mean, 0.5),
            ("MODEL.PIXEL_STD", here.pixel_std, there.pixel_std, 0.05),
        ):
            if len(ours) != len(theirs) or not np.allclose(ours, theirs, rtol=0, atol=tolerance):
                pairs.append((key, _rounded(ours), _rounded(theirs)))
    for key, one, other in pairs:
        if None not in (one, other) and one != other:
            yield f"{key} is {one}; the weights were trained with {other}"


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 4) for value in values]
