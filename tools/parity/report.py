"""Writes the results of a comparison as JSON and Markdown."""

import datetime
import importlib.metadata
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ws_detectron.utils.io import write_json, write_text

from .measures import Measure

_PACKAGES = ("torch", "torchvision", "detectron2", "mmdet", "mmengine", "mmcv-lite", "timm")

Results = dict[str, dict[str, list[Measure]]]


def all_hold(results: Results) -> bool:
    """Whether every measure is within its limit."""
    return all(m.holds for groups in results.values() for group in groups.values() for m in group)


def write_report(results: Results, settings: dict[str, Any], folder: Path) -> None:
    """Writes `parity.json` with all measures and `README.md` with the worst ones.

    Args:
        results: measures by model and group.
        settings: seed, image sizes and whatever else is needed to repeat the run.
        folder: of both files.
    """
    environment = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "hardware": f"{os.cpu_count()} CPU cores, no GPU ({platform.machine()})",
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    content = {
        "environment": environment,
        "settings": settings,
        "results": {
            model: {name: [asdict(m) for m in group] for name, group in groups.items()}
            for model, groups in results.items()
        },
    }
    write_json(folder / "parity.json", content)
    write_text(folder / "README.md", _markdown(results, environment, settings))


def _markdown(results: Results, environment: dict[str, str], settings: dict[str, Any]) -> str:
    detectors = {model: groups for model, groups in results.items() if "detections" in groups}
    resnets = {model: groups for model, groups in results.items() if "detections" not in groups}
    lines = [
        "# Output parity with the systems that weights come from",
        "",
        "Written by `tools/check_parity.py`. Each model is built by its own system with random",
        "weights, saved, converted by `ws_detectron.checkpoint`, and run on the same images in",
        "both systems. Differences are max \\|a - b\\| / max \\|a\\| over a tensor, the largest of",
        "all images and layers. RoIAlign and the inner loop of NMS are torchvision's kernels on",
        "both sides, because mmcv-lite has none; everything above them is each system's own code.",
        "",
        f"- command: `{settings['command']}`",
        f"- seed {settings['seed']}, {settings['images']} COCO val2017 images at "
        f"{settings['short_side']} pixels (float64 layers: the first one)",
        "- " + ", ".join(f"{name} {value}" for name, value in environment.items()),
        "",
        "## Detectors of mmdetection",
        "",
        "Limits: 1e-5 in float32, 1e-10 in float64; all detections in both, boxes within 0.01",
        "pixels, scores within 2e-4, 99.9 % of the pixels of each mask.",
        "",
        "| model | float32 | float64 | detections | in one only | box (pixels) | score | mask |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, groups in detectors.items():
        found = {m.what: m.value for m in groups["detections"]}
        mask = found.get("share of equal mask pixels")
        lines.append(
            f"| {model} | {_worst(groups['float32'])} | {_worst(groups['float64'])} "
            f"| at least {found['detections']:.0f} | {found['detections of one side only']:.0f} "
            f"| {found['box, pixels']:.1e} | {found['score']:.1e} "
            f"| {'' if mask is None else f'{mask:.6f}'} |"
        )
    if detectors:
        lines += ["", "The same for all of them:", ""]
        settings_of_first = next(iter(detectors.values()))
        lines += [
            f"- {m.what}: {m.value:.1e} (limit {m.limit:g})"
            for m in settings_of_first["settings"] + settings_of_first["files"][:1]
        ]
    lines += ["", "## ResNets, res2 to res5", "", "| model | float32 | float64 |", "|---|---|---|"]
    for model, groups in resnets.items():
        lines.append(f"| {model} | {_worst(groups['float32'])} | {_worst(groups['float64'])} |")
    resizing = settings.get("resizing")
    if resizing:
        lines += [
            "",
            "## What differs by design",
            "",
            f"Image resizing, on {resizing['images']:.0f} images at 800 pixels: mean absolute "
            f"difference {resizing['mean_grey_levels']:.2f} grey levels, largest "
            f"{resizing['largest_grey_levels']:.0f}; {resizing['images_of_other_size']:.0f} images "
            "of another size. The rest is in [docs/weights.md](../../docs/weights.md).",
        ]
    return "\n".join(lines) + "\n"


def _worst(group: list[Measure]) -> str:
    measure = max(group, key=lambda m: m.value)
    return f"{measure.value:.1e} ({measure.what})"
