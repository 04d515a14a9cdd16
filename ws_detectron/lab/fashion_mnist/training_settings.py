"""`TrainingSettings`: all that decides what a training computes, checked."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Optional

from ws_detectron.errors import UserError

from .model import REPORT_GROUPS
from .recipe import SCHEDULES, default_lr
from .variants import ARMS, ORDERS, REPORT_ORDER

TRAIN_IMAGES = 50_000


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of one training; the defaults are the report's.

    Attributes:
        arm: one of `ARMS`.
        batch_size: images in a step; the last step of an epoch may have fewer.
        epochs: passes over the training images.
        lr: highest LR; None: `default_lr(batch_size)`.
        schedule: one of `SCHEDULES`.
        seed: of the split, the random weights, the order of images and dropout.
        order: one of `ORDERS`.
        groups: of GN.
        images: training images, a multiple of 50; validation and test then have a fifth each.
        amp: bfloat16 autocast.
        compile: torch.compile, with CUDA graphs on a GPU.
        device: "cpu" or "cuda".

    Raises:
        UserError: a value is not allowed; names the option.
    """

    arm: str
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
        _require("arm", self.arm, self.arm in ARMS, " or ".join(ARMS))
        _require("order", self.order, self.order in ORDERS, " or ".join(ORDERS))
        _require("schedule", self.schedule, self.schedule in SCHEDULES, " or ".join(SCHEDULES))
        _require("epochs", self.epochs, self.epochs >= 1, "at least 1")
        _require("seed", self.seed, self.seed >= 0, "0 or more")
        _require("groups", self.groups, self.groups in (1, 2, 4, 8, 16, 32), "1, 2, 4, 8, 16 or 32")
        rule = f"a multiple of 50 up to {TRAIN_IMAGES}"
        _require("images", self.images, self._images_work(), rule)
        low = 2 if ARMS[self.arm].norm == "BN" else 1
        rule = f"from {low} to the number of training images"
        _require("batch-size", self.batch_size, low <= self.batch_size <= self.images, rule)
        if low == 2 and self.images % self.batch_size == 1:
            raise UserError(
                f"--batch-size {self.batch_size} leaves a last batch of one image of "
                f"{self.images}, of which BN cannot take statistics; choose another"
            )
        if self.lr is None:
            object.__setattr__(self, "lr", default_lr(self.batch_size))
        _require("lr", self.lr, bool(self.lr and self.lr > 0), "above 0")

    def _images_work(self) -> bool:
        return 50 <= self.images <= TRAIN_IMAGES and self.images % 50 == 0

    @property
    def held_out(self) -> int:
        """Images of validation, and of the test."""
        return self.images // 5

    @property
    def name(self) -> str:
        """A folder name; tells apart what a grid varies."""
        parts = [self.arm, f"batch{self.batch_size}"]
        parts += [f"{self.order}-order"] if self.order != REPORT_ORDER else []
        parts += [f"groups{self.groups}"] if self.groups != REPORT_GROUPS else []
        return "_".join([*parts, f"seed{self.seed}"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def first_difference(
    one: Mapping[str, Any], other: Mapping[str, Any], names: Optional[Iterable[str]] = None
) -> Optional[tuple[str, Any, Any]]:
    """The first of `names` (None: all of `one`) with two values, and these; None where all agree.

    A setting that is missing, as in the files of an older version, is None.
    """
    for name in one if names is None else names:
        if one.get(name) != other.get(name):
            return name, one.get(name), other.get(name)
    return None


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"--{name} is {value}; allowed: {allowed}")
