"""The config keys that this package adds to detectron2's; `WSSettings` are those of MODEL.WS."""

import logging
from copy import copy
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.logger import log_first_n

from ws_detectron.errors import ConfigError
from ws_detectron.layers import DEFAULT_WS_EPS, DEFAULT_WS_MODE, WS_MODES


@dataclass(frozen=True)
class WSSettings:
    """Which parts of a model are standardized, and how; MODEL.WS has them under upper-case keys.

    They affect only the parts in `ws_detectron.modeling.REGISTRATIONS`.

    Attributes:
        backbone: standardize the bottom-up network (stem and shortcuts included).
        fpn: standardize the lateral and output convs of the FPN.
        box_head: standardize the convs of the box head.
        mask_head: standardize the convs of the mask head, before its deconvolution.
        retinanet_head: standardize the towers of RetinaNet's head.
        sem_seg_head: standardize the semantic head of Panoptic FPN.
        mode: `mode` of `standardize_weight`; weights from BiT or timm need "bit", and "paper" is
            the formula of the paper.
        affine: start from a network that was trained without WS: each filter keeps the mean and
            scale that it has in the plain weights (arXiv:2006.02334). mmcv's ConvAWS2d has mode
            "aws".
        eps: `eps` of `standardize_weight`; timm has 1e-6 (its BiT models 1e-8).
        gn_groups: number of groups where one of these parts has NORM "GN"; 32 in detectron2
            (arXiv:1803.08494, table 3). Change it for channel counts that 32 does not divide.

    Raises:
        ConfigError: a value is not allowed; names its config key.
    """

    backbone: bool = True
    fpn: bool = True
    box_head: bool = True
    mask_head: bool = True
    retinanet_head: bool = True
    sem_seg_head: bool = True
    mode: str = DEFAULT_WS_MODE
    affine: bool = False
    eps: float = DEFAULT_WS_EPS
    gn_groups: int = 32

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(getattr(type(self), name), bool):  # a switch, or AFFINE
                _require(name, value, value in (True, False), "a boolean")
        _require("mode", self.mode, self.mode in WS_MODES, f"one of {', '.join(WS_MODES)}")
        is_number = isinstance(self.eps, (int, float)) and not isinstance(self.eps, bool)
        _require("eps", self.eps, is_number and 0 < self.eps < 1, "a number between 0 and 1")
        is_int = isinstance(self.gn_groups, int) and not isinstance(self.gn_groups, bool)
        _require("gn_groups", self.gn_groups, is_int and self.gn_groups >= 1, "an integer >= 1")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "WSSettings":
        """Reads MODEL.WS.

        A config without that node gets the defaults, with a warning: a project may import
        ws_detectron and name one of its builders without calling `add_ws_config`.

        Raises:
            ConfigError: a key is unknown, or a value is not allowed; names the key.
        """
        node = cfg.MODEL.get("WS")
        if node is None:
            message = f"the config has no MODEL.WS, so its defaults are used; {_FORGOTTEN}"
            log_first_n(logging.WARNING, message, name=__name__)
            node = {}
        known = [key.name.upper() for key in fields(cls)]
        for key in node:
            if key not in known:
                raise ConfigError(f"MODEL.WS.{key} is not a key; allowed: {', '.join(known)}")
        return cls(**{key.lower(): value for key, value in node.items()})

    def as_config(self) -> dict[str, Any]:
        """The settings under their config keys: `{"BACKBONE": True, ...}`."""
        return {name.upper(): value for name, value in asdict(self).items()}


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"MODEL.WS.{name.upper()} must be {allowed}; got {value!r}")


_ADDED = {
    "MODEL.WS": WSSettings().as_config(),
    "SOLVER": {
        "ACCUMULATE_STEPS": 1,
        "REFERENCE_IMS_PER_BATCH": 0,
        "EPOCHS": 0,
        "CHECKPOINT_KEEP": 0,
    },
    "DATASETS": {"REGISTER": []},
}
_FORGOTTEN = (
    "call ws_detectron.add_ws_config(cfg) after get_cfg(): it adds the keys of ws_detectron"
)


def add_ws_config(cfg: CfgNode) -> None:
    """Adds the node MODEL.WS, see `WSSettings`, and four training keys to a config, in place.

    ==============================  =======  ==================================================
    SOLVER.ACCUMULATE_STEPS         1        forward and backward passes per optimizer step, for
                                             batches that do not fit into memory
                                             (`ws_detectron.engine.accumulation`)
    SOLVER.REFERENCE_IMS_PER_BATCH  0 (off)  batch size that LR and schedule are given for; they
                                             are scaled to IMS_PER_BATCH
                                             (`ws_detectron.engine.scaling`)
    SOLVER.EPOCHS                   0 (off)  length of the training in passes over its images;
                                             MAX_ITER then only says which part of it milestones,
                                             warm-up and periods are (`ws_detectron.engine.scaling`)
    SOLVER.CHECKPOINT_KEEP          0 (all)  number of periodic checkpoints to keep, the newest
    DATASETS.REGISTER               []       your own data sets in COCO format
                                             (`ws_detectron.data.register_coco_sets`)
    ==============================  =======  ==================================================

    Existing keys keep their values and missing ones are added, so this may be called twice.

    Args:
        cfg: as returned by `detectron2.config.get_cfg()`.
    """
    if "WS" not in cfg.MODEL:
        cfg.MODEL.WS = CfgNode()
    for name, defaults in _ADDED.items():
        for key, default in defaults.items():
            attrgetter(name)(cfg).setdefault(key, copy(default))


def name_forgotten_call(message: str) -> str:
    """What to add to the error of a config that lacks a key: which call adds ours; else ""."""
    ours = ["MODEL.WS", *(f"{name}.{key}" for name, keys in _ADDED.items() for key in keys)]
    return f"; {_FORGOTTEN}" if message.rpartition(" ")[2] in ours else ""
