"""Describes machine and versions, to be recorded with measurements."""

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import detectron2
import torch

import ws_detectron


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """Date, machine, system and versions.

    Args:
        packages: distributions to list with their versions, if installed.
    """
    found: dict[str, Any] = {
        "date": utc_now(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_average_at_start": round(os.getloadavg()[0], 1)
        if hasattr(os, "getloadavg")
        else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "ws_detectron": package_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run_environment(device: str) -> dict[str, Any]:
    """Device, threads, versions and date, as `run_record.json` of a training has them.

    Args:
        device: "cpu" or "cuda".
    """
    return {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else cpu_model(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "detectron2": detectron2.__version__,
        },
        "ws_detectron": package_version(),
        "date": utc_now()[:10],
    }


def utc_now() -> str:
    """Date and time to the minute, such as "2026-01-02 03:04 UTC"."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def package_version() -> str:
    """Version of this package; in a clone with the commit, and whether code differs from it."""
    root = Path(ws_detectron.__file__).resolve().parent.parent
    where = _git(root, "rev-parse", "--show-toplevel", "--short=12", "HEAD")
    top, _, commit = where.rpartition("\n")
    # If the package is installed inside another repository, the commit is not ours.
    if not top or Path(top).resolve() != root:
        return ws_detectron.__version__
    code = ("ws_detectron", "configs", "tools")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *code)
    return f"{ws_detectron.__version__}, commit {commit}{' with changes' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str:
    """The output of git; empty without git, or in a repository that git does not trust."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            check=True,
            text=True,
            errors="replace",
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def cpu_model() -> str:
    """Model name of the processor, on Linux; elsewhere what `platform` says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
