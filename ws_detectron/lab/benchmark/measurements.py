"""The measurements by the names of their commands, and how they are saved."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional, Union

import torch

from ws_detectron.errors import UserError
from ws_detectron.utils.environment import environment
from ws_detectron.utils.io import check_folder, write_json

from .benchmark_report import table, title
from .classifier import measure_classifier
from .detector_step import measure_inference, measure_steps
from .operation import measure_group_norm, measure_operation

MEASUREMENTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "operation": measure_operation,
    "group_norm": measure_group_norm,
    "step": measure_steps,
    "variants": measure_steps,
    "inference": measure_inference,
    "classifier": measure_classifier,
}
GPU: dict[str, dict[str, Any]] = {
    "group_norm": {},
    "step": {"variants": ["gn", "gn_ws", "bn", "gn_split", "gn_ws_split"]},
    "operation": {},
    "inference": {},
}
"""Measurements of `measure_gpu` and their options, the most important first."""
PACKAGES = ("torch", "torchvision", "detectron2", "triton", "numpy")


def measure(what: str, output: Union[str, Path], **options: Any) -> str:
    """Measures, saves as `<output>/<device>_<what>.json`, and returns title and table.

    Args:
        what: a key of `MEASUREMENTS`.
        output: a folder; made if it does not exist.
        options: arguments of that measurement.
    """
    modes = options.get("modes", ["plain"])
    name = f"{options.get('device', 'cpu')}_{what}"
    if modes != ["plain"]:
        name += "_modes" if len(modes) > 1 else f"_{modes[0]}"
    path = Path(output, f"{name}.json")
    check_folder(output)
    about = {
        **environment(PACKAGES),
        "threads": torch.get_num_threads(),
        "seed": options.get("seed", 0),
        "command": f"python tools/benchmark.py {shlex.join(sys.argv[1:])}",
    }
    content: dict[str, Any] = {"about": about, "kind": what, "parts": []}
    for part in MEASUREMENTS[what](**options):
        content["parts"].append(part)
        write_json(path, content)  # after each part, in case the next is interrupted
    return f"{title(name)}\n\n{table(content)}"


def measure_gpu(
    output: Union[str, Path], budget: Optional[float] = None, **options: Any
) -> Iterator[str]:
    """Runs all measurements of `GPU` and saves each when it is finished.

    Args:
        output: as for `measure`.
        budget: seconds after which no measurement is started.
        options: arguments of every measurement.

    Yields:
        Title and table of each, or a message that it is skipped.

    Raises:
        UserError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("gpu needs a CUDA device, and torch sees none; see `operation` and `step`")
    start = time.monotonic()
    for what, more in GPU.items():
        spent = time.monotonic() - start
        if budget is not None and spent > budget:
            yield f"{what} is skipped: {spent:.0f} s of {budget:.0f} s are spent"
        else:
            yield measure(what, output, device="cuda", **options, **more)
