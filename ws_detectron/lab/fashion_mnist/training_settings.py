"""What a training computes: its variant, its recipe and its settings."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Optional

from ws_detectron.errors import UserError

TRAIN_IMAGES = 50_000
REPORT_GROUPS = 32
"""Groups of the report's GN, the default of Keras: one channel per group for 32 channels."""

REPORT_ORDER, DETECTOR_ORDER = "report", "detector"
ORDERS = (REPORT_ORDER, DETECTOR_ORDER)
"""conv -> ReLU -> norm as in the report, and conv -> norm -> ReLU as in detectors."""

SCHEDULES = ("cosine", "constant")
WARMUP = 0.1
"""Share of all steps during which the LR rises linearly."""

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
"""For parameters with more than one dimension; biases and norm layers have none."""

RECIPE = {
    "optimizer": "SGD with Nesterov momentum",
    "momentum": MOMENTUM,
    "weight_decay": WEIGHT_DECAY,
    "warmup": WARMUP,
}
"""What no option changes: all variants share it, so that they differ in normalization alone. The
report does not say which optimizer it used."""

DEFAULT_LRS = {2: 0.0015, 32: 0.02, 128: 0.05}
"""Batch size -> highest LR. Other sizes scale linearly from the nearest of these (by ratio)."""


@dataclass(frozen=True)
class Variant:
    """A choice of normalization.

    Attributes:
        title: for tables and figures.
        norm: the layer after each conv and after the hidden dense layer: "", "BN", "LN" or "GN".
        ws: Weight Standardization of every conv.
        weight_norm: Weight Normalization (arXiv:1602.07868) of every conv and dense layer.
    """

    title: str
    norm: str = ""
    ws: bool = False
    weight_norm: bool = False


VARIANTS = {
    "none": Variant("none"),
    "bn": Variant("BN", norm="BN"),
    "ln": Variant("LN", norm="LN"),
    "gn": Variant("GN", norm="GN"),
    "wn": Variant("WN", weight_norm=True),
    "bn_ws": Variant("BN+WS", norm="BN", ws=True),
    "gn_ws": Variant("GN+WS", norm="GN", ws=True),
}


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of one training; the defaults are the report's.

    Attributes:
        variant: a key of `VARIANTS`.
        batch_size: images per step; the last step of an epoch may have fewer.
        epochs: passes over the training images.
        lr: highest LR; None: `default_lr(batch_size)`.
        schedule: one of `SCHEDULES`.
        seed: for the split, the initial weights, the order of images and dropout.
        order: one of `ORDERS`.
        groups: of GN.
        images: training images, a multiple of 50; validation and test get a fifth each.
        amp: bfloat16 autocast.
        compile: torch.compile, with CUDA graphs on a GPU.
        device: "cpu" or "cuda".

    Raises:
        UserError: a value is not allowed; names the option.
    """

    variant: str
    batch_size: int
    epochs: int = 10
    lr: Optional[float] = None
    schedule: str = "cosine"
    seed: int = 0
    order: str = REPORT_ORDER
    groups: int = REPORT_GROUPS
    images: int = TRAIN_IMAGES
    amp: bool = False
    compile: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        _require("variant", self.variant, self.variant in VARIANTS, " or ".join(VARIANTS))
        _require("order", self.order, self.order in ORDERS, " or ".join(ORDERS))
        _require("schedule", self.schedule, self.schedule in SCHEDULES, " or ".join(SCHEDULES))
        _require("epochs", self.epochs, self.epochs >= 1, "at least 1")
        _require("seed", self.seed, self.seed >= 0, "0 or more")
        _require("groups", self.groups, self.groups in (1, 2, 4, 8, 16, 32), "1, 2, 4, 8, 16 or 32")
        divisible = 50 <= self.images <= TRAIN_IMAGES and self.images % 50 == 0
        _require("images", self.images, divisible, f"a multiple of 50 up to {TRAIN_IMAGES}")
        low = 2 if VARIANTS[self.variant].norm == "BN" else 1
        rule = f"from {low} to the number of training images"
        _require("batch-size", self.batch_size, low <= self.batch_size <= self.images, rule)
        if low == 2 and self.images % self.batch_size == 1:
            raise UserError(
                f"--batch-size {self.batch_size} leaves one image of {self.images} for the last "
                "batch, too few for the statistics of BN; choose another batch size"
            )
        if self.lr is None:
            object.__setattr__(self, "lr", default_lr(self.batch_size))
        _require("lr", self.lr, bool(self.lr and self.lr > 0), "above 0")

    @property
    def held_out(self) -> int:
        """Number of validation images, and of test images."""
        return self.images // 5

    @property
    def name(self) -> str:
        """A folder name that distinguishes all runs of a grid."""
        parts = [self.variant, f"batch{self.batch_size}"]
        parts += [f"{self.order}-order"] if self.order != REPORT_ORDER else []
        parts += [f"groups{self.groups}"] if self.groups != REPORT_GROUPS else []
        return "_".join([*parts, f"seed{self.seed}"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def default_lr(batch_size: int) -> float:
    """The highest LR for a batch size, see `DEFAULT_LRS`."""
    nearest = min(DEFAULT_LRS, key=lambda known: abs(math.log(known / batch_size)))
    return DEFAULT_LRS[nearest] * batch_size / nearest


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as read from a file, where "arm" is the old name of "variant" (until 0.2)."""
    return {"variant" if name == "arm" else name: value for name, value in settings.items()}


def first_difference(
    one: Mapping[str, Any], other: Mapping[str, Any], names: Optional[Iterable[str]] = None
) -> Optional[tuple[str, Any, Any]]:
    """The first setting that differs, as (name, value in `one`, value in `other`), or None.

    Args:
        one, other: settings; a missing one, as in the files of an older version, is None.
        names: which to compare; None: all in `one`.
    """
    for name in one if names is None else names:
        if one.get(name) != other.get(name):
            return name, one.get(name), other.get(name)
    return None


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"--{name} is {value}; allowed: {allowed}")
