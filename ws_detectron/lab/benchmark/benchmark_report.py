"""Writes the tables of docs/performance.md from measurements in JSON.

A measurement is `{"about", "kind", "parts"}`. Each part has `facts`, which hold for all its
candidates; `seconds`, name -> seconds of each round; and for some measurements `peak_bytes`,
`cpu_seconds`, `gpu` (see `timing.gpu_work`) and `refused` (reasons), by name.
"""

import json
import os
from collections.abc import Mapping, Sequence
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
    unit: str
    digits: int
    ratio_digits: int


FORMATS = {
    "step": TableFormat("training step", "ms", 0, 3),
    "variants": TableFormat("training step", "ms", 0, 3),
    "inference": TableFormat("inference", "ms", 0, 3),
    "operation": TableFormat("operation", "ms", 1, 2),
    "group_norm": TableFormat("GN", "ms", 2, 2),
    "classifier": TableFormat("classifier", "s / epoch", 1, 2),
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
    varied = [key for key, values in facts.items() if len(set(values)) > 1]
    rows = []
    for number, part in enumerate(parts):
        where = {key.replace("_", " "): facts[key][number] for key in varied}
        for name in part["seconds"]:
            rows.append({**where, form.candidate: name, **_columns(content["kind"], part, name)})
        for name in part.get("refused", {}):
            rows.append({**where, form.candidate: name, form.unit: "does not run"})
    headers = {key: key for row in rows for key in row}
    text = tabulate(
        [[row.get(key, "") for key in headers] for row in rows],
        list(headers), tablefmt="github", disable_numparse=True,
    )  # fmt: skip
    rounds = max((len(values) for part in parts for values in part["seconds"].values()), default=0)
    shared = [f"{k.replace('_', ' ')} {v[0]}" for k, v in facts.items() if k not in varied]
    reasons = {name: why for part in parts for name, why in part.get("refused", {}).items()}
    below = [f"{rounds} rounds; {', '.join(shared)}."]
    below += [f"{name} does not run: {why}." for name, why in reasons.items()]
    return text + "\n\n" + "\n\n".join(below) + "\n"


def _columns(kind: str, part: Mapping[str, Any], name: str) -> dict[str, str]:
    form = FORMATS[kind]
    scale = 1000 if form.unit == "ms" else 1
    seconds = part["seconds"][name]
    columns = {form.unit: _spread([scale * value for value in seconds], form.digits)}
    fastest = f"{scale * min(seconds):.{form.digits}f}"
    for header, base in _baselines(kind, part["seconds"], name).items():
        ratios = [value / to for value, to in zip(seconds, base)]
        columns[header] = _spread(ratios, form.ratio_digits)
        times = f" ({min(seconds) / min(base):.{form.ratio_digits}f})"
    columns["fastest (times)"] = fastest + times
    if "peak_bytes" in part:
        peak = part["peak_bytes"].get(name)
        columns["peak, MiB"] = "" if peak is None else f"{peak / 2**20:.0f}"
    if "cpu_seconds" in part:
        columns["CPU time, s"] = f"{spread(part['cpu_seconds'][name])[0]:.{form.digits}f}"
    for header, key in (("GPU busy", "busy_seconds"), ("host", "host_seconds")):
        if part.get("gpu"):
            columns[f"{header}, ms"] = f"{1000 * part['gpu'][name][key]:.2f}"
    if part.get("gpu"):
        columns["kernel launches"] = str(part["gpu"][name]["launches"])
    return columns


def _baselines(
    kind: str, seconds: Mapping[str, Sequence[float]], name: str
) -> dict[str, Sequence[float]]:
    """Column header -> baseline seconds of each round, by which a candidate's are divided."""
    if kind == "operation":
        floor = [FLOOR_IN_COPIES * value for value in seconds[COPY]]
        return {"times the floor": floor, "times ours (official)": seconds[OURS["official"]]}
    first = next(iter(seconds))
    compiled = f"{first}, compiled"
    same = compiled if name.endswith(", compiled") and compiled in seconds else first
    return {f"times {first}": seconds[same]}


def _spread(values: Sequence[float], digits: int) -> str:
    median, low, high = (f"{value:.{digits}f}" for value in spread(values))
    return f"{median} ({low} to {high})"


def _shown(fact: object) -> str:
    if isinstance(fact, float):
        return f"{fact:.2g}"
    return f"{fact:,}" if isinstance(fact, int) else str(fact)
