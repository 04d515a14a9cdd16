"""The normalization methods that are compared, by name."""

from dataclasses import dataclass

REPORT_ORDER, DETECTOR_ORDER = "report", "detector"
ORDERS = (REPORT_ORDER, DETECTOR_ORDER)
"""conv -> ReLU -> norm as in the report, and conv -> norm -> ReLU as in detectors."""


@dataclass(frozen=True)
class Arm:
    """What is done to activations and to weights.

    Attributes:
        title: for tables and figures.
        norm: layer behind each conv and the hidden dense layer: "", "BN", "LN" or "GN".
        ws: Weight Standardization of every conv.
        weight_norm: Weight Normalization (arXiv:1602.07868) of every conv and dense layer.
    """

    title: str
    norm: str = ""
    ws: bool = False
    weight_norm: bool = False


ARMS = {
    "none": Arm("none"),
    "bn": Arm("BN", norm="BN"),
    "ln": Arm("LN", norm="LN"),
    "gn": Arm("GN", norm="GN"),
    "wn": Arm("WN", weight_norm=True),
    "bn_ws": Arm("BN+WS", norm="BN", ws=True),
    "gn_ws": Arm("GN+WS", norm="GN", ws=True),
}
