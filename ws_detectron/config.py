"""The config keys that this package adds to detectron2's; `WSSettings` are those of MODEL.WS."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from detectron2.config import CfgNode

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
    eps: float = DEFAULT_WS_EPS
    gn_groups: int = 32

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(getattr(type(self), name), bool):  # a switch has a boolean default
                _require(name, value, value in (True, False), "a boolean")
        _require("mode", self.mode, self.mode in WS_MODES, f"one of {', '.join(WS_MODES)}")
        is_number = isinstance(self.eps, (int, float)) and not isinstance(self.eps, bool)
        _require("eps", self.eps, is_number and 0 < self.eps < 1, "a number between 0 and 1")
        is_int = isinstance(self.gn_groups, int) and not isinstance(self.gn_groups, bool)
        _require("gn_groups", self.gn_groups, is_int and self.gn_groups >= 1, "an integer >= 1")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "WSSettings":
        """Reads MODEL.WS.

        A config without that node gets the defaults: a project may import ws_detectron and name
        one of its builders without calling `add_ws_config`.

        Raises:
            ConfigError: a key is unknown, or a value is not allowed; names the key.
        """
        node = cfg.MODEL.get("WS", {})
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


def add_ws_config(cfg: CfgNode) -> None:
    """Adds the node MODEL.WS, see `WSSettings`, and four training keys to a config, in place.

    ==============================  =======  ==================================================
    SOLVER.ACCUMULATE_STEPS         1        forward and backward passes per optimizer step, for
                                             batches that do not fit into memory
                                             (`ws_detectron.engine.accumulation`)
    SOLVER.REFERENCE_IMS_PER_BATCH  0 (off)  batch size that LR and schedule are given for; they
                                             are scaled to IMS_PER_BATCH
                                             (`ws_detectron.engine.scaling`)
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
    for node, defaults in (
        (cfg.MODEL.WS, WSSettings().as_config()),
        (cfg.SOLVER, {"ACCUMULATE_STEPS": 1, "REFERENCE_IMS_PER_BATCH": 0, "CHECKPOINT_KEEP": 0}),
        (cfg.DATASETS, {"REGISTER": []}),
    ):
        for key, default in defaults.items():
            node.setdefault(key, default)
