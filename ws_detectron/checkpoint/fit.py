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
from ws_detectron.modeling.parts import REGISTRATIONS

from .metadata import WeightMetadata, WSForm, describe_model, in_resnet, is_bit

_BLOCK = re.compile(r"(?:^|\.)(res\d+)\.(\d+)\.")
_BODY = re.compile(r"(?:^|\.)((?:stem|res\d+)\..+)$")
# Predictors, whose size depends on the data set.
_CLASSES = (
    (r"roi_heads\.(box_predictor|mask_head\.predictor)\.", "MODEL.ROI_HEADS.NUM_CLASSES"),
    (r"head\.cls_score\.", "MODEL.RETINANET.NUM_CLASSES"),
    (r"sem_seg_head\.predictor\.", "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
)

AFFINE_BUFFERS = "weight_gamma", "weight_beta"  # of WSConv2d
_TRAINED_BUFFERS = "running_mean", "running_var", *AFFINE_BUFFERS
_FROM_PLAIN = "set MODEL.WS.AFFINE True, which starts from plain weights"
_CONVERT = "tools/convert_weights.py converts weights of other projects, or says why it cannot"

State = Mapping[str, torch.Tensor]


@dataclass
class Fit:
    """The differences between a file and a model.

    Attributes:
        problems: reasons why the model would compute something else than it was trained to.
        warnings: what the file does not tell.
        foldable: name of each conv that is plain in the model and WS in the file -> its WS form;
            no problem if the filters are folded.
        filled: convs with affine WS in the model that are plain in the file: loading it takes
            their gamma and beta from its filters.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    foldable: dict[str, WSForm] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)


def check_fit(
    model: nn.Module,
    state: State,
    metadata: Optional[WeightMetadata],
    author: str = "",
    fold: bool = False,
) -> Fit:
    """Compares weights with the model that they will be loaded into.

    Parts of the model that the file lacks are ignored: it may contain a backbone only.

    Args:
        model: not wrapped in DistributedDataParallel.
        state: the weights, under the keys of the model.
        metadata: of the file; None if it has none.
        author: the entry `__author__` of the file.
        fold: whether the filters of WS convs will be folded where the model has plain ones.
    """
    own = model.state_dict()
    if not any(key in own for key in state):
        problem = (
            f"no tensor of the file has a name in the model; the file has {list_some(list(state))}"
            f", the model {list_some(list(own))}. {_CONVERT}"
        )
        return Fit([problem])
    needs = describe_model(model)
    norm = metadata.norm if metadata else ""
    fit = Fit([*_compare_tensors(own, state)])
    _compare_norms(own, state, norm, fit)
    convs = [key[: -len(".weight")] for key in own if key in state and key.endswith(".weight")]
    buffers = {conv: sum(f"{conv}.{name}" in state for name in AFFINE_BUFFERS) for conv in convs}
    affine = [conv for conv, number in buffers.items() if number]
    if metadata is None:
        _judge_unknown_ws(needs, convs, affine, author, fit)
    else:
        given = {conv: form for conv in convs if (form := _form(conv, metadata.ws_convs))}
        affine = [conv for conv, form in given.items() if form.affine]
        _compare_ws(convs, needs.ws_convs, given, fold, fit)
        if any(map(in_resnet, state)):
            fit.problems += _compare_settings(needs, metadata)
    if broken := [conv for conv in convs if buffers[conv] != 2 * (conv in affine)]:
        fit.problems.append(
            f"affine WS is incomplete at {list_some(broken, 3)}: a conv has both of "
            f"{' and '.join(AFFINE_BUFFERS)}, and metadata that say so, or none of them"
        )
    return fit


def missing_weights(model: nn.Module, incompatible: Any) -> list[str]:
    """Describes the weights that a model did not get from a file; empty if it got all.

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
    tensors = {
        key: value
        for key, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, nn.Parameter) or key.rpartition(".")[2] in _TRAINED_BUFFERS
    }
    # A shared tensor may be loaded under another name.
    missing = set(incompatible.missing_keys) - {key for key, *_ in incompatible.incorrect_shapes}
    loaded = {id(value) for key, value in tensors.items() if key not in missing}
    lacking = [key for key, value in tensors.items() if id(value) not in loaded]
    if lacking:
        found.append(f"it lacks tensors of {list_some(parts_of(lacking))}: {list_some(lacking, 3)}")
    return found


def parts_of(keys: Iterable[str]) -> list[str]:
    """The parts of a model that keys belong to, each with its number of keys."""
    parts = (".".join(key.split(".")[: 2 if key.startswith("roi_heads.") else 1]) for key in keys)
    return [f"{part} ({count})" for part, count in Counter(parts).items()]


def _compare_tensors(own: State, state: State) -> Iterator[str]:
    """Finds a missing backbone, and ResNets that detectron2 would load partially."""
    backbone = [key for key in own if key.startswith("backbone.")]
    if backbone and not any(key in state for key in backbone):
        yield (
            "the file has no weights for the backbone, which would stay random: the model's are "
            f"{list_some(backbone, 2)}, the file has {list_some(list(state), 4)}. {_CONVERT}"
        )
    there, here = _count_blocks(state), _count_blocks(own)
    for stage in sorted(there.keys() & here.keys()):
        if there[stage] != here[stage]:
            yield (
                f"{stage} has {there[stage]} blocks in the file and {here[stage]} in the model; "
                "check MODEL.RESNETS.DEPTH"
            )
    by_ending = _by_ending(own)
    wrong = []
    for ending, key in _by_ending(state).items():
        # What detectron2 cannot match by its shape keeps the key of the file.
        target = key if key in own else by_ending.get(ending)
        if target and own[target].shape != state[key].shape:
            shapes = f"{tuple(state[key].shape)} instead of {tuple(own[target].shape)}"
            wrong.append(f"{target} {shapes}")
    if wrong:
        yield (
            f"the file has other shapes than the model: {list_some(wrong, 3)}; check "
            "MODEL.RESNETS.DEPTH, .NUM_GROUPS and .WIDTH_PER_GROUP"
        )


def _count_blocks(keys: Iterable[str]) -> Counter:
    blocks = {match.groups() for key in keys if (match := _BLOCK.search(key))}
    return Counter(stage for stage, _ in blocks)


def _by_ending(keys: Iterable[str]) -> dict[str, str]:
    """Key relative to the ResNet -> key."""
    return {match[1]: key for key in keys if (match := _BODY.search(key))}


def _norms_without_statistics(keys: Iterable[str], others: Iterable[str]) -> list[str]:
    """Norms of `keys` with BN statistics, which are in `others` without them."""
    ending = ".running_mean"
    names = [key[: -len(ending)] for key in keys if key.endswith(f".norm{ending}")]
    return [n for n in names if f"{n}{ending}" not in others and f"{n}.weight" in others]


def _compare_norms(own: State, state: State, norm: str, fit: Fit) -> None:
    """Finds norms of another type or at other places; `norm` is the type in the metadata."""
    if unused := _norms_without_statistics(state, {*own, *_by_ending(own)}):
        fit.problems.append(
            f"the file has BN statistics and the model another norm at {list_some(unused)}; "
            "check MODEL.RESNETS.NORM"
        )
    without = _norms_without_statistics(own, state)
    if without and norm == "GN":
        fit.problems.append(
            f"the weights were trained with GN and the model has BN at {list_some(without)}; check "
            "MODEL.RESNETS.NORM"
        )
    elif without:
        fit.warnings.append(
            f"the file has no BN statistics for {list_some(without)}; only FrozenBN works without "
            "them"
        )
    # the convs of a BiT ResNet have the same names and shapes as those of another one
    if any(map(in_resnet, state)) and is_bit(own) != is_bit(state):
        one, other = ("model", "file") if is_bit(own) else ("file", "model")
        fit.problems.append(
            f"the norm layers are before the convs in the {one} (BiT) and behind them in the "
            f"{other}; check MODEL.BACKBONE.NAME (build_bit_* or build_ws_*)"
        )


def _compare_ws(
    convs: Iterable[str],
    needed: Mapping[str, WSForm],
    given: Mapping[str, WSForm],
    fold: bool,
    fit: Fit,
) -> None:
    plain: list[str] = []
    affine, other = [], []
    factors: dict[str, None] = {}
    for conv in convs:
        here, there = needed.get(conv), given.get(conv)
        if here and not there:
            (fit.filled if here.affine else plain).append(conv)
        elif there and not here:
            fit.foldable[conv] = there
        elif here and there and here != there:
            forms = f"({there}) in the file and ({here}) in the model"
            if here.affine != there.affine:
                affine.append(f"{conv} is {forms}; set MODEL.WS.AFFINE {there.affine}")
            elif outputs_differ(here, there):
                other.append(f"{conv} is {forms}")
            else:
                factors[f"WS is {forms}, which differ by a constant factor only"] = None
    fit.warnings += factors
    keys = ", ".join(dict.fromkeys(row.key for row in REGISTRATIONS))
    keys += "; names in ws_detectron.modeling.REGISTRATIONS"
    if plain:
        fit.problems.append(
            f"{len(plain)} convs are WS in the model and were trained without it "
            f"({list_some(plain, 3)}): use weights trained with WS, or turn WS off in this part "
            f"(MODEL.WS.*; {keys}), or {_FROM_PLAIN}"
        )
    if affine:
        fit.problems.append(f"affine WS differs in {len(affine)} convs: {affine[0]}")
    if other:
        fit.problems.append(
            f"{len(other)} convs have another form of WS: {other[0]}; check MODEL.WS.MODE and "
            "MODEL.WS.EPS"
        )
    if fit.foldable and not fold:
        fit.problems.append(
            f"{len(fit.foldable)} convs were trained with WS and are plain in the model "
            f"({list_some(list(fit.foldable), 3)}): use the parts with WS ({keys}), or fold the "
            "weights (tools/fold_checkpoint.py, or WSCheckpointer(model, fold=True))"
        )


def _form(conv: str, given: Mapping[str, WSForm]) -> Optional[WSForm]:
    """The file's WS form of a conv in the model, whose name may have a longer prefix."""
    parts = conv.split(".")
    endings = (".".join(parts[start:]) for start in range(len(parts)))
    return next((given[ending] for ending in endings if ending in given), None)


def outputs_differ(one: WSForm, other: WSForm) -> bool:
    """Whether a conv and its norm layer compute something else with another form of WS."""
    # "paper" and "official" differ by a factor sqrt(n / (n - 1)), which the norm layer removes
    # where no beta is added.
    factor_only = {one.mode, other.mode} == {"paper", "official"} and not one.affine
    same_mode = one.mode == other.mode or factor_only
    return (one.eps, one.affine) != (other.eps, other.affine) or not same_mode


def _judge_unknown_ws(
    needs: WeightMetadata, convs: list[str], affine: list[str], author: str, fit: Fit
) -> None:
    forms = {conv: needs.ws_convs.get(conv) for conv in convs}
    fit.filled += [c for c, form in forms.items() if form and form.affine and c not in affine]
    if unread := [c for c in affine if not (form := forms[c]) or not form.affine]:
        fit.problems.append(
            f"{len(unread)} convs have affine WS in the file only ({list_some(unread, 3)}); set "
            "MODEL.WS.AFFINE True, and MODEL.WS.MODE and .EPS as in their training"
        )
    ws_convs = [conv for conv, form in forms.items() if form and conv not in fit.filled]
    if ws_convs and author == "Caffe2":
        fit.problems.append(
            "the model has WS, and a Caffe2-style file does not say whether its weights were "
            "trained with WS; convert those of the WS authors first: "
            f"tools/convert_weights.py --source ws-authors-caffe2; for plain ones {_FROM_PLAIN}"
        )
    elif ws_convs and author.lower() in ("torchvision", "pycls", "detectron2 model zoo"):
        fit.problems.append(
            f"the model has WS ({list_some(ws_convs, 3)}), and the weights of {author} were "
            "trained without it: use weights trained with WS, or a model without WS, or "
            f"{_FROM_PLAIN}"
        )
    elif ws_convs or ((needs.norm == "GN" or fit.filled) and not author):
        here = "affine WS, which takes them as plain" if fit.filled else "WS"
        fit.warnings.append(
            "the file does not say whether its convs were trained with WS, and the model has "
            + (here if needs.ws_convs else "no WS")
            + ". If they differ, the results will be wrong; the weights themselves do not tell"
        )


def _compare_settings(needs: WeightMetadata, metadata: WeightMetadata) -> Iterator[str]:
    # Half a grey level is below the rounding of pixels and above that of published decimals.
    tolerances = {"MODEL.PIXEL_MEAN": 0.5, "MODEL.PIXEL_STD": 0.05}
    trained = metadata.settings()
    for key, ours in needs.settings().items():
        theirs = trained.get(key, ours)
        if key in tolerances and len(ours) == len(theirs):
            same = np.allclose(ours, theirs, rtol=0, atol=tolerances[key])
            ours, theirs = np.round(ours, 4).tolist(), np.round(theirs, 4).tolist()
        else:
            same = ours == theirs
        if not same:
            stock = " (32 in detectron2)" * (key == "MODEL.WS.GN_GROUPS")
            yield f"{key}{stock} is {ours}; the weights were trained with {theirs}"
