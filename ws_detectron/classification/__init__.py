"""The Fashion-MNIST classifier of the 2019 report: a check of WS and GN that takes minutes."""

from .arms import ARMS, DETECTOR_ORDER, ORDERS, REPORT_ORDER, Arm
from .model import build_classifier
from .settings import TrainingSettings
from .training import train

__all__ = [
    "ARMS",
    "Arm",
    "DETECTOR_ORDER",
    "ORDERS",
    "REPORT_ORDER",
    "TrainingSettings",
    "build_classifier",
    "train",
]
