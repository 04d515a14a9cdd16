"""Measurements as JSON, and their tables on docs/performance.md.

A measurement is `{"about", "kind", "parts"}`. Each part has `facts`, which hold for all its
candidates; `seconds`, name -> of each round; and of some kinds `peak_bytes`, `cpu_seconds`, `gpu`
(see `timing.gpu_work`) and `refused` (reasons), by name.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

from tabulate import tabulate

from ws_detectron.errors import DataError
from ws_detectron.utils.io import write_text

from .coco_eval_timing import BACKENDS
from .operation import COPY, OURS
from .timing import spread

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
FLOOR_IN_COPIES = 2.5
"""Forward: read W, write W_hat. Backward: read W_hat or W and the gradient, write the gradient.
Five passes over the bytes, of which a copy makes two."""


class Kind(NamedTuple):
    """How the seconds of a kind of measurement are shown."""

    candidate: str
    unit: str
    digits: int
    ratio_digits: int


KINDS = {
    "step": Kind("training step", "ms", 0, 3),
    "variants": Kind("training step", "ms", 0, 3),
    "inference": Kind("inference", "ms", 0, 3),
    "operation": Kind("operation", "ms", 1, 2),
    "group_norm": Kind("GN", "ms", 2, 2),
    "classifier": Kind("classifier", "s / epoch", 1, 2),
    "coco_eval": Kind("evaluator", "s", 2, 1),
}
"""In the order of the page."""


def title(name: str) -> str:
    """Of a measurement, by the name of its file: device and what was measured."""
    device, _, what = name.partition("_")
    what = "COCO evaluation" if what == "coco_eval" else what.replace("_", " ").capitalize()
    return f"{what} on a {'GPU' if device == 'cuda' else 'CPU'}"


def update_page(page: Union[str, Path], folder: Union[str, Path]) -> None:
    """Writes the tables of all measurements in `folder` between the two marks of the page.

    Raises:
        DataError: the page has no such marks, or the folder no measurements.
    """
    page = Path(page)
    text = page.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise DataError(f"{page}: needs the lines {BEGIN} and {END}, each once")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(page, f"{before}{BEGIN}\n{page_tables(folder, page.parent)}{END}{after}")


def page_tables(folder: Union[str, Path], page_folder: Union[str, Path]) -> str:
    """All measurements of a folder, with links to their files from a page in `page_folder`."""
    measured = {path: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    if not measured:
        raise DataError(f"{folder}: holds no measurements (*.json); make them first")
    order = list(KINDS)
    sections = []
    for path, content in sorted(measured.items(), key=lambda m: order.index(m[1]["kind"])):
        about = content["about"]
        machine = about["gpu"] if path.stem.startswith("cuda") else about["cpu"]
        timed = BACKENDS if content["kind"] == "coco_eval" else ("torch",)
        versions = ", ".join(f"{package} {about[package]}" for package in timed)
        link = Path(os.path.relpath(path, page_folder)).as_posix()
        sections.append(
            f"\n### {title(path.stem)}\n\n{machine}, {about['cores']} cores, {versions}, "
            f"{about['date']} ([all rounds and versions]({link})):\n\n"
            f"    {about['command']}\n\n{table(content)}"
        )
    return "".join(sections) + "\n"


def table(content: Mapping[str, Any]) -> str:
    """The table of one measurement, a row for each candidate of each part.

    Facts in which parts differ are columns; the others stand below, as do reasons why a candidate
    does not run.
    """
    parts, kind = content["parts"], KINDS[content["kind"]]
    facts = {key: [_shown(part["facts"][key]) for part in parts] for key in parts[0]["facts"]}
    varied = [key for key, values in facts.items() if len(set(values)) > 1]
    rows = []
    for number, part in enumerate(parts):
        where = {key.replace("_", " "): facts[key][number] for key in varied}
        for name in part["seconds"]:
            rows.append({**where, kind.candidate: name, **_columns(content["kind"], part, name)})
        for name in part.get("refused", {}):
            rows.append({**where, kind.candidate: name, kind.unit: "does not run"})
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


def _columns(kind_name: str, part: Mapping[str, Any], name: str) -> dict[str, str]:
    kind = KINDS[kind_name]
    scale = 1000 if kind.unit == "ms" else 1
    seconds = part["seconds"][name]
    columns = {kind.unit: _spread([scale * value for value in seconds], kind.digits)}
    fastest = f"{scale * min(seconds):.{kind.digits}f}"
    for header, base in _baselines(kind_name, part["seconds"], name).items():
        ratios = [value / to for value, to in zip(seconds, base)]
        columns[header] = _spread(ratios, kind.ratio_digits)
        times = f" ({min(seconds) / min(base):.{kind.ratio_digits}f})"
    columns["fastest (times)"] = fastest + times
    if "peak_bytes" in part:
        peak = part["peak_bytes"].get(name)
        columns["peak, MiB"] = "" if peak is None else f"{peak / 2**20:.0f}"
    if "cpu_seconds" in part:
        columns["CPU time, s"] = f"{spread(part['cpu_seconds'][name])[0]:.{kind.digits}f}"
    for header, key in (("GPU busy", "busy_seconds"), ("host", "host_seconds")):
        if part.get("gpu"):
            columns[f"{header}, ms"] = f"{1000 * part['gpu'][name][key]:.2f}"
    if part.get("gpu"):
        columns["kernel launches"] = str(part["gpu"][name]["launches"])
    return columns


def _baselines(
    kind: str, seconds: Mapping[str, Sequence[float]], name: str
) -> dict[str, Sequence[float]]:
    """Header -> the seconds that those of a candidate are related to, round by round."""
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
