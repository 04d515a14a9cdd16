"""What building any WS part, backbone or head, has in common."""

import logging

from detectron2.layers import get_norm
from torch import nn

from ws_detectron.errors import ConfigError

from .convert import convert_to_ws
from .settings import WSSettings

logger = logging.getLogger(__name__)


def standardize_part(module: nn.Module, ws: WSSettings, *, part: str, norm_key: str) -> None:
    """Standardizes one part of a model and logs what was converted.

    Args:
        module: the part.
        ws: eps and mode.
        part: its place in the model, for messages.
        norm_key: the config key that decides whether norm layers follow its convs.

    Raises:
        ConfigError: no conv of the part is followed by a norm layer, so WS could do nothing.
    """
    report = convert_to_ws(module, ws.eps, ws.mode)
    if not report.converted:
        raise ConfigError(
            f"WS needs convs with a norm layer behind them, and {part} has none; check {norm_key} "
            '(allowed: "GN", "BN", "SyncBN", "FrozenBN") or build this part without WS'
        )
    logger.info("WS (%s, eps %g) in %s: %s", ws.mode, ws.eps, part, report)


def check_norm(key: str, norm: str) -> None:
    """Raises ConfigError where `norm` is a name that this detectron2 does not know."""
    try:
        get_norm(norm, 32)
    except KeyError:
        raise ConfigError(
            f'{key} is {norm!r}; allowed: "", "BN", "SyncBN", "FrozenBN", "GN" and what else '
            "detectron2.layers.get_norm of the installed version knows"
        ) from None
