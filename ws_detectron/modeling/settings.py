"""`WSSettings`: the values of the config node MODEL.WS, checked."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from detectron2.config import CfgNode

from ws_detectron.errors import ConfigError
from ws_detectron.layers import DEFAULT_WS_EPS, DEFAULT_WS_MODE, WS_MODES


@dataclass(frozen=True)
class WSSettings:
    """Which parts of a model are standardized, and how.

    Attributes:
        backbone: standardize the bottom-up network (stem and shortcuts included).
        fpn: standardize the lateral and output convs of the FPN.
        box_head: standardize the convs of the box head.
        mask_head: standardize the convs of the mask head, before its deconvolution.
        retinanet_head: standardize the towers of RetinaNet's head.
        sem_seg_head: standardize the semantic head of Panoptic FPN.
        mode: `mode` of `standardize_weight`.
        eps: `eps` of `standardize_weight`.
        gn_groups: number of groups where one of these parts has NORM "GN"; 32 in detectron2
            (arXiv:1803.08494, table 3).

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
