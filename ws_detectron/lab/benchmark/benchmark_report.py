"""Measurements as JSON, as Markdown tables, and as the performance section of the README."""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

from tabulate import tabulate

from ws_detectron.errors import DataError
from ws_detectron.utils.io import write_json, write_text

from .classifier import bn_beside, same_in_keras
from .operation import COPY, FLOOR_IN_COPIES, OURS, SPLIT_NORM, STOCK_NORM

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
_MIB = 2**20
_SHOWN = ("step", "inference", "operation")  # in the README, in this order; others are linked
# of a detector's measurement -> how they are stated where they are the same for all parts
_SETTINGS = {
    "images": "{} image(s) per step",
    "variant": "variant {}",
    "short_side": "short side {} pixels",
}


def write_measurement(
    folder: Union[str, Path], name: str, about: Mapping[str, Any], measured: Mapping[str, Any]
) -> str:
    """Writes `<name>.json` and `<name>.md`; returns the text of the latter.

    Args:
        folder: made if need be.
        name: device and what was measured, such as `cpu_operation`.
        about: environment and command.
        measured: `{"kind": "operation", "group_norm", "detector" or "classifier", ...}`.
    """
    content = {"about": dict(about), **measured}
    write_json(Path(folder, f"{name}.json"), content)
    facts = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in about.items())
    text = f"# {title(name)}\n\n{tables(content)}\n{facts}\n"
    write_text(Path(folder, f"{name}.md"), text)
    return text


def title(name: str) -> str:
    device, _, kind = name.partition("_")
    return f"{kind.replace('_', ' ').capitalize()} on {'a GPU' if device == 'cuda' else 'a CPU'}"


def tables(content: Mapping[str, Any]) -> str:
    """The tables of one measurement, with a line that says what their columns mean."""
    if content["kind"] == "operation":
        return _operation_table(content)
    if content["kind"] == "group_norm":
        return _group_norm_table(content["parts"])
    if content["kind"] == "classifier":
        return "\n".join(_classifier_table(part) for part in content["parts"])
    return _detector_table(content["parts"])


def update_readme(readme: Union[str, Path], folder: Union[str, Path]) -> None:
    """Writes the measurements in `folder` between the two marks of the README.

    The tables of `_SHOWN` in full, what most readers look for; links to the others.

    Raises:
        DataError: the README has no such marks, or the folder no measurements.
    """
    readme, files = Path(readme), sorted(Path(folder).glob("*.json"))
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise DataError(f"{readme}: needs the lines {BEGIN} and {END}, each once")
    if not files:
        raise DataError(f"{folder}: holds no measurements (*.json); make them first")
    kinds = {file: file.stem.partition("_")[2] for file in files}
    sections = [_section(file) for kind in _SHOWN for file in files if kinds[file] == kind]
    links = [_link(file, readme) for file in files if kinds[file] not in _SHOWN]
    if links:
        sections.append("Measured as well:\n\n" + "".join(links))
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    write_text(readme, head + BEGIN + "\n\n" + "\n".join(sections) + "\n" + END + tail)


def _section(file: Path) -> str:
    content = json.loads(file.read_text())
    about = content["about"]
    machine = about.get("gpu") if file.stem.startswith("cuda") else about["cpu"]
    return (
        f"**{title(file.stem)}** ({machine}, {about['cores']} cores, torch {about['torch']}, "
        f"{about['date']}; `{about['command']}`)\n\n{tables(content)}"
    )


def _link(file: Path, readme: Path) -> str:
    target = Path(os.path.relpath(file.with_suffix(".md"), readme.parent)).as_posix()
    return f"- [{title(file.stem)}]({target}), {json.loads(file.read_text())['about']['date']}\n"


def _operation_table(content: Mapping[str, Any]) -> str:
    rows: list[Sequence[str]] = []
    for name, milliseconds in content["milliseconds"].items():
        peak = content["peak_bytes"].get(name)
        rows.append(
            [
                name,
                _spread(milliseconds, 1),
                _spread(content["times_floor"][name], 2),
                "1.00" if name == OURS["official"] else _spread(content["times_ours"][name], 2),
                "" if peak is None else f"{peak / _MIB:.0f}",
                *_gpu_columns(content, name),
            ]
        )
    headers = ["operation", "ms", "times the floor", "times ours (official)", "peak, MiB"]
    headers += _gpu_headers([content])
    host = content.get("host_milliseconds")
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return f"""{table}

Forward and backward over {content["filters"]} conv weights with {content["values"]:,} values in
float32, {content["threads"]} CPU threads. Medians (and quartiles) over
{len(content["seconds"][COPY])} rounds that ran all of them in turns; ratios are taken within a
round. The floor is {FLOOR_IN_COPIES} times the copy of the same bytes: what must be read and
written at least.
{_host_line(host) if host else ""}"""


def _host_line(host: Mapping[str, Mapping[str, float]]) -> str:
    forward, backward = (
        f"{host[name]['least']:.2f} ms (median {host[name]['median']:.2f})"
        for name in ("forward", "backward")
    )
    return f"""
On one thread, with kernels that do nothing, the host spends {forward} more in the
forward of a part of all these convs than in that of plain convs, and {backward}
more in the backward.
"""


def _group_norm_table(parts: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for part in parts:
        stock, split = (1000 * part["network"][name] for name in (STOCK_NORM, SPLIT_NORM))
        faster = sum(
            statistics.median(a) < statistics.median(b)
            for a, b in zip(part["seconds"][SPLIT_NORM], part["seconds"][STOCK_NORM])
        )
        rows.append(
            [
                part["images"],
                part["groups"],
                part["images"] * part["groups"],
                f"{stock:.2f}",
                f"{split:.2f}",
                f"{part['ratio']:.2f}",
                f"{faster} of {len(part['shapes'])}",
            ]
        )
    rounds = len(parts[0]["seconds"][STOCK_NORM][0])
    headers = ["images", "groups", "images x groups", f"{STOCK_NORM}, ms", f"{SPLIT_NORM}, ms"]
    headers += ["times", "shapes where split is faster"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return f"""{table}

GN alone, forward and backward in float32, over all features of R-50-FPN: for each shape the median
of {rounds} interleaved rounds, summed over the norms of the network.
"""


def _gpu_headers(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    return ["GPU busy, ms", "launches"] if any(part.get("gpu") for part in parts) else []


def _gpu_columns(part: Mapping[str, Any], name: str) -> list[str]:
    if not part.get("gpu"):
        return []
    work = part["gpu"].get(name)
    return (
        ["", ""] if work is None else [f"{1000 * work['busy_seconds']:.2f}", str(work["launches"])]
    )


def _detector_table(parts: Sequence[Mapping[str, Any]]) -> str:
    """One table for all parts, with a column for each setting in which they differ."""
    settings = {key: list(dict.fromkeys(part[key] for part in parts)) for key in _SETTINGS}
    varied = [key for key, values in settings.items() if len(values) > 1]
    rows: list[Sequence[str]] = []
    refused: dict[str, str] = {}
    for part in parts:
        where = [str(part[key]) for key in varied]
        least = {name: min(seconds) for name, seconds in part["seconds"].items()}
        to = next(iter(least.values()), math.nan)
        for name in part["seconds"]:
            rows.append(
                [
                    *where,
                    name,
                    _spread({k: 1000 * v for k, v in part["median_seconds"][name].items()}, 0),
                    _spread(part["ratios"][name], 3),
                    f"{1000 * least[name]:.0f} ({least[name] / to:.3f})",
                    f"{part['peak_bytes'][name] / _MIB:.0f}",
                    *_gpu_columns(part, name),
                ]
            )
        for name, why in part["refused"].items():
            rows.append([*where, name, "does not run", "", "", ""])
            refused[name] = why
    first = parts[0]
    baseline = next(iter(first["seconds"]), "-")
    headers = [
        *varied, first["what"], "ms", f"times {baseline}", "fastest, ms (times)", "peak, MiB",
        *_gpu_headers(parts),
    ]  # fmt: skip
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    rounds = len(next(iter(first["seconds"].values()), []))
    fixed = [text.format(settings[key][0]) for key, text in _SETTINGS.items() if key not in varied]
    reasons = "".join(f"\n{name} does not run: {why}.\n" for name, why in refused.items())
    return f"""{table}

Mask R-CNN R-{first.get("depth", 50)}-FPN 4conv1fc, {", ".join(fixed)}; medians (and
quartiles) over {rounds} rounds in turns, ratios within a round; and the fastest round of each, as a
busy machine can only add to it.
{reasons}"""


def _classifier_table(part: Mapping[str, Any]) -> str:
    fastest = {name: min(seconds) for name, seconds in part["seconds"].items()}
    rows = []
    for name, seconds in fastest.items():
        row = [name, _spread(part["epoch_seconds"][name], 1), f"{seconds:.1f}"]
        for ratios, base in (("times_bn", bn_beside(name)), ("times_keras", same_in_keras(name))):
            if name in part[ratios]:
                row += [_spread(part[ratios][name], 2), f"{seconds / fastest[base]:.2f}"]
            else:
                row += ["", ""]
        rows.append(row)
    headers = ["classifier", "s / epoch", "fastest, s"]
    headers += ["times bn", "fastest", "times the same arm in Keras", "fastest"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    keras = f" {part['keras']}." if "keras" in part else ""
    return f"""{table}

Fashion-MNIST classifier, batch {part["batch_size"]}: training time for 50,000 images, from
{part["steps"]} steps in each of {part["rounds"]} rounds in turns; medians (and quartiles), ratios
within a round; and the fastest round of each, as a busy machine can only add to it. What is
compiled is related to BN compiled.{keras}
"""


def _spread(values: Mapping[str, float], digits: int) -> str:
    median, low, high = (f"{values[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"
