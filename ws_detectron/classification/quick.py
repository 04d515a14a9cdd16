"""The quick check: a part of one epoch at batch 2, where GN+WS learns and BN does not."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from .progress import Progress
from .settings import TrainingSettings
from .training import train

IMAGES, BATCH_SIZE = 6000, 2


@dataclass(frozen=True)
class Bar:
    """What an arm must reach.

    Attributes:
        arm: of `ARMS`.
        least, most: bounds of its test accuracy.
    """

    arm: str
    least: float
    most: float


# Chance is 0.1.
BARS = (Bar("gn_ws", least=0.7, most=1.0), Bar("bn", least=0.0, most=0.5))


def quick_check(
    folder: Path,
    *,
    say: Callable[[str], None],
    progress: Callable[[str], Progress],
    data_dir: Optional[Path] = None,
    device: str = "cpu",
) -> list[str]:
    """Trains GN+WS and BN for one epoch on 6,000 images, two at a time.

    Args:
        folder: of the two runs; finished ones are not run again.
        say: takes a line for each arm.
        progress: makes what shows a training, from its name.
        data_dir: see `train`.
        device: "cpu" or "cuda".

    Returns:
        What missed its bar, a line each.

    Raises:
        UserError: the data are missing or damaged.
    """
    missed = []
    for bar in BARS:
        settings = TrainingSettings(bar.arm, BATCH_SIZE, epochs=1, images=IMAGES, device=device)
        result = train(
            settings,
            folder / settings.name,
            data_dir=data_dir,
            resume=True,
            progress=progress(settings.name),
        )
        accuracy = result["test_accuracy"]
        wanted = f"at least {bar.least:.0%}" if bar.least else f"at most {bar.most:.0%}"
        passed = bar.least <= accuracy <= bar.most
        line = f"{bar.arm} at batch {BATCH_SIZE}: test accuracy {accuracy:.1%}, expected {wanted}"
        say(f"{'passed' if passed else 'FAILED'}: {line}")
        if not passed:
            missed.append(line)
    return missed
