"""Writes the tables of docs/performance.md from measurements in JSON.

A measurement is `{"about", "kind", "parts"}`. Each part has `facts`, which hold for all its
candidates; `seconds`, name -> seconds of each round; and for some measurements `peak_bytes`, `gpu`
(see `timing.gpu_work`) and `refused` (reasons), by name.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Union

from tabulate import tabulate

from ws_detectron.errors import DataError
from ws_detectron.utils.io import write_text

from .operation import COPY, OURS
from .timing import spread

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
    "operation": TableFormat("operation", 1, 2),
    "group_norm": TableFormat("GN", 2, 2),
    "classifier": TableFormat("classifier", 1, 2, "s / epoch", 1),
}
"""By the `kind` of a measurement, in the order of the page."""


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
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(page, f"{before}{BEGIN}\n{page_tables(folder, page.parent)}{END}{after}")


def page_tables(folder: Union[str, Path], page_folder: Union[str, Path]) -> str:
    """The tables of the measurements in a folder, with links to files relative to `page_folder`."""
    measured = {path: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    if not measured:
        raise DataError(f"{folder}: holds no measurements (*.json); make them first")
    order = list(FORMATS)
    sections = []
    for path, content in sorted(measured.items(), key=lambda m: order.index(m[1]["kind"])):
        about = content["about"]
        machine = about["gpu"] if path.stem.startswith("cuda") else about["cpu"]
        link = Path(os.path.relpath(path, page_folder)).as_posix()
        sections.append(
            f"\n### {title(path.stem)}\n\n{machine}, {about['cores']} cores, "
            f"torch {about['torch']}, {about['date']} ([all rounds and versions]({link})):\n\n"
            f"    {about['command']}\n\n{table(content)}"
        )
    return "".join(sections) + "\n"


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
