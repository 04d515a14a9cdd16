"""The measurements by the names of their commands, how they are saved, and their tables.

A measurement is saved as `{"about", "kind", "parts"}`. Each part has `facts`, which hold for all
its candidates; `seconds`, name -> seconds of each round; and for some measurements `peak_bytes`,
`gpu` (see `timing.gpu_work`) and `refused` (reasons), by name.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from tabulate import tabulate

from ws_detectron.errors import DataError, UserError
from ws_detectron.utils.environment import environment
from ws_detectron.utils.io import check_folder, write_json, write_text

from .classifier import measure_classifier
from .detector_step import measure_exports, measure_inference, measure_steps
from .operation import COPY, OURS, measure_group_norm, measure_operation
from .timing import spread
from .train_loader import measure_loader

MEASUREMENTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "operation": measure_operation,
    "group_norm": measure_group_norm,
    "step": measure_steps,
    "variants": partial(measure_steps, variants=("bn", "frozen_bn", "sync_bn", "gn", "gn_ws")),
    "inference": measure_inference,
    "exports": measure_exports,
    "classifier": measure_classifier,
    "loader": measure_loader,
}
"""Their arguments are the options of the command line."""
GPU: dict[str, dict[str, Any]] = {
    "group_norm": {},
    "step": {"variants": ["gn", "gn_ws", "bn", "gn_split", "gn_ws_split"]},
    "operation": {},
    "inference": {},
}
"""Measurements of `measure_gpu` and their options, the most important first."""
PACKAGES = ("torch", "torchvision", "detectron2", "triton", "numpy", "onnxruntime")
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
FLOOR_IN_COPIES = 2.5
"""Forward: read W, write W_hat. Backward: read W_hat or W and the gradient, write the gradient.
Five passes over the bytes, of which a copy makes two."""


class TableFormat(NamedTuple):
    """How the seconds of a measurement are shown."""

    candidate: str
    digits: int
    ratio_digits: int
    unit: str = "ms"
    scale: float = 1000


FORMATS = {
    "step": TableFormat("training step", 0, 3),
    "variants": TableFormat("training step", 0, 3),
    "inference": TableFormat("inference", 0, 3),
    "exports": TableFormat("inference", 0, 3),
    "operation": TableFormat("operation", 1, 2),
    "group_norm": TableFormat("GN", 2, 2),
    "classifier": TableFormat("classifier", 1, 2, "s / epoch", 1),
    "loader": TableFormat("loader", 1, 3, "ms / image"),
}
"""By the `kind` of a measurement, in the order of the page."""


def measure(what: str, output: Union[str, Path], **options: Any) -> str:
    """Measures, saves as `<output>/<device>_<what>.json`, and returns title and table.

    Args:
        what: a key of `MEASUREMENTS`.
        output: a folder; made if it does not exist.
        options: arguments of that measurement.
    """
    name = f"{options['device']}_{what}"
    modes = options.get("modes", ["plain"])
    if len(modes) > 1:
        name += "_modes"
    elif modes[0] != "plain":
        name += f"_{modes[0]}"
    check_folder(output)
    about = {
        **environment(PACKAGES),
        "threads": torch.get_num_threads(),
        "command": f"python tools/benchmark.py {shlex.join(sys.argv[1:])}",
    }
    content: dict[str, Any] = {"about": about, "kind": what, "parts": []}
    for part in MEASUREMENTS[what](**options):
        content["parts"].append(part)
        # after each part, in case the next is interrupted
        write_json(Path(output, f"{name}.json"), content)
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


def title(name: str) -> str:
    """The title of a measurement, from the name of its file, `<device>_<what>`."""
    device, _, what = name.partition("_")
    return f"{what.replace('_', ' ').capitalize()} on a {'GPU' if device == 'cuda' else 'CPU'}"


def update_page(page: Union[str, Path], folder: Union[str, Path]) -> None:
    """Writes the tables of all measurements in `folder` between the two markers of the page.

    Raises:
        DataError: the page lacks the markers, or the folder has no measurements.
    """
    page = Path(page)
    text = page.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise DataError(f"{page}: needs the lines {BEGIN} and {END}, each once")
    measured = {path: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    if not measured:
        raise DataError(f"{folder}: holds no measurements (*.json); make them first")
    order = list(FORMATS)
    sections = []
    for path, content in sorted(measured.items(), key=lambda m: order.index(m[1]["kind"])):
        about = content["about"]
        machine = about["gpu"] if path.stem.startswith("cuda") else about["cpu"]
        link = Path(os.path.relpath(path, page.parent)).as_posix()
        sections.append(
            f"\n### {title(path.stem)}\n\n{machine}, {about['cores']} cores, "
            f"torch {about['torch']}, {about['date']} ([all rounds and versions]({link})):\n\n"
            f"    {about['command']}\n\n{table(content)}"
        )
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(page, f"{before}{BEGIN}\n{''.join(sections)}\n{END}{after}")


def table(content: Mapping[str, Any]) -> str:
    """The table of one measurement, a row for each candidate of each part.

    Facts that differ between parts are columns; the others are below the table, and so are the
    reasons why a candidate does not run.
    """
    parts, form = content["parts"], FORMATS[content["kind"]]
    facts = {key: [_shown(part["facts"][key]) for part in parts] for key in parts[0]["facts"]}
    rows: list[dict[str, str]] = []
    below = [""]
    for number, part in enumerate(parts):
        where = {key.replace("_", " "): v[number] for key, v in facts.items() if len(set(v)) > 1}
        for name in part["seconds"]:
            rows.append({**where, form.candidate: name, **_columns(content["kind"], part, name)})
        for name, reason in part.get("refused", {}).items():
            rows.append({**where, form.candidate: name, form.unit: "does not run"})
            below.append(f"{name} does not run: {reason}.")
    rounds = max((len(values) for part in parts for values in part["seconds"].values()), default=0)
    shared = [f"{k.replace('_', ' ')} {v[0]}" for k, v in facts.items() if len(set(v)) == 1]
    below[0] = f"{rounds} rounds; {', '.join(shared)}."
    text = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    return "\n\n".join([text, *dict.fromkeys(below)]) + "\n"


def _columns(kind: str, part: Mapping[str, Any], name: str) -> dict[str, str]:
    form, seconds = FORMATS[kind], part["seconds"]
    mine = [form.scale * value for value in seconds[name]]
    first = next(iter(seconds))
    if kind == "operation":
        floor = [FLOOR_IN_COPIES * value for value in seconds[COPY]]
        baselines = {
            "times the floor": floor,
            "times ours (official)": seconds[OURS["official"]],
        }
    elif name.endswith(", compiled") and f"{first}, compiled" in seconds:
        baselines = {f"times {first}": seconds[f"{first}, compiled"]}
    else:
        baselines = {f"times {first}": seconds[first]}
    columns = {form.unit: _spread(mine, form.digits)}
    for header, base in baselines.items():
        ratios = [a / (form.scale * b) for a, b in zip(mine, base)]
        columns[header] = _spread(ratios, form.ratio_digits)
    fastest = min(mine) / (form.scale * min(base))
    columns["fastest (times)"] = f"{min(mine):.{form.digits}f} ({fastest:.{form.ratio_digits}f})"
    if "peak_bytes" in part:
        peak = part["peak_bytes"].get(name)
        columns["peak, MiB"] = "" if peak is None else f"{peak / 2**20:.0f}"
    if part.get("gpu"):
        work = part["gpu"][name]
        columns["GPU busy, ms"] = f"{1000 * work['busy_seconds']:.2f}"
        columns["host, ms"] = f"{1000 * work['host_seconds']:.2f}"
        columns["kernel launches"] = str(work["launches"])
    return columns


def _spread(values: list[float], digits: int) -> str:
    median, low, high = (f"{value:.{digits}f}" for value in spread(values))
    return f"{median} ({low} to {high})"


def _shown(fact: object) -> str:
    if isinstance(fact, float):
        return f"{fact:.2g}"
    return f"{fact:,}" if isinstance(fact, int) else str(fact)
