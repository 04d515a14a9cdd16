"""Reports what is installed, what is missing or broken, and how to fix it.

Needs no other package: it tells what is wrong where torch or detectron2 is missing or broken. The
exit status is 1 if training cannot work.
"""

# Outside of the package, whose import would fail there; imports only the standard library before
# it looks.

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

EXAMPLES = """
examples:
  ws-doctor
  ws-doctor --json > report.json                      # for a bug report

  # in a clone, before anything is installed; with data sets
  python -m ws_doctor
  DETECTRON2_DATASETS=~/datasets python -m ws_doctor
"""
INSTALL_DETECTRON2 = (
    "run `python tools/install_detectron2.py` from the repository, or install it as "
    "https://detectron2.readthedocs.io/en/latest/tutorials/install.html says"
)
BUILD_DETECTRON2 = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)
INSTALL_TORCH = "install matching torch and torchvision as https://pytorch.org/get-started says"
NEEDED = {
    "numpy": "pip install numpy",
    "PIL": "pip install Pillow",
    "fvcore": "pip install fvcore",
    "iopath": "pip install iopath",
    "pycocotools": "pip install pycocotools",
    "cv2": "pip install opencv-python-headless (or opencv-python, never both)",
}
NEWEST_TORCH = (2, 14)  # with which the tests ran, see results/matrix
OPTIONAL = {
    "tensorboard": "without it, training writes no TensorBoard events: pip install tensorboard",
    "matplotlib": "pictures and plots need it: pip install matplotlib",
    "psutil": "detectron2's benchmark.py needs it: pip install psutil",
    "onnx": "detectron2's export_model.py --format onnx needs it: pip install onnx",
}
# What is kept there, the variable that moves it, and where it is without the variable.
CACHES = (
    ("downloaded weights", "FVCORE_CACHE", "~/.torch/iopath_cache"),
    ("generated data sets", "WS_DETECTRON_CACHE", "~/.cache/ws_detectron"),
    ("compiled kernels", "TRITON_CACHE_DIR", "~/.triton/cache"),
)
LITTLE_SPACE = 2 * 2**30  # bytes; a converted detector has 0.2 GB


class Finding(NamedTuple):
    """One line of the report; `remedy` marks a problem that prevents training, `note` is advice."""

    subject: str
    found: str
    remedy: str = ""
    note: str = ""


class Problem(Exception):
    """Ends a check with the finding that is its argument."""


def check_torch() -> Iterator[Finding]:
    torch = load("torch", INSTALL_TORCH)
    if numbers(torch.__version__) < (2, 1):
        yield Finding("torch", f"{torch.__version__}, needs 2.1 or newer", INSTALL_TORCH)
    else:
        newest = ".".join(map(str, NEWEST_TORCH))
        note = f"newer than {newest}, the newest tested; if something fails, install torch {newest}"
        newer = numbers(torch.__version__) > NEWEST_TORCH
        yield Finding("torch", torch.__version__, note=note if newer else "")
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for device in devices:
        properties = torch.cuda.get_device_properties(device)
        found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        try:
            torch.ones(1, device=device).item()
        except Exception as error:
            yield Finding(device, f"{found}: {describe(error)}", INSTALL_TORCH)
        else:
            yield Finding(device, found)
    if not devices:
        note = "training runs on the CPU: good for the quickstart and tests, too slow for COCO"
        if Path("/proc/driver/nvidia/version").exists():
            note = f"there is an NVIDIA driver, so torch does not fit it: {INSTALL_TORCH}"
        yield Finding("CUDA devices", "none", note=note)
    yield Finding("torchvision", load("torchvision", INSTALL_TORCH).__version__)
    for device in ["cpu", *devices]:
        yield check_ops(device)
    if torch.backends.mps.is_available():
        finding = check_ops("mps")
        advice = (
            "MODEL.DEVICE mps: no training was tested on it; PYTORCH_ENABLE_MPS_FALLBACK=1 runs "
            "ops that it lacks on the CPU, and MODEL.DEVICE cpu always works"
        )
        yield finding._replace(remedy="", note=advice)


def check_ops(device: str) -> Finding:
    """Runs the two compiled ops that detectron2's models need."""
    subject = f"nms and roi_align on {device}"
    try:
        import torch
        from torchvision.ops import nms, roi_align

        boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0]], device=device)
        kept = nms(boxes, torch.tensor([0.5, 1.0], device=device), 0.5).tolist()
        pooled = roi_align(torch.ones(1, 1, 8, 8, device=device), [boxes], 2)
        if kept != [1] or not torch.equal(pooled, torch.ones_like(pooled)):
            return Finding(subject, "wrong results", INSTALL_TORCH)
    except Exception as error:
        return Finding(subject, describe(error), f"torch and torchvision differ: {INSTALL_TORCH}")
    return Finding(subject, "work")


def check_detectron2() -> Iterator[Finding]:
    detectron2 = load("detectron2", INSTALL_DETECTRON2)
    version = str(getattr(detectron2, "__version__", "unknown version"))
    file = getattr(detectron2, "__file__", None)  # a clone in the current folder has none
    found = f"{version} at {os.path.dirname(file) if file else 'a folder without __init__.py'}"
    if numbers(version) < (0, 5):
        raise Problem(Finding("detectron2", f"{found}, needs 0.5 or newer", INSTALL_DETECTRON2))
    # `import detectron2` loads almost nothing; a mismatch with torch, NumPy or Pillow shows here.
    for name in ("modeling", "engine", "evaluation"):
        remedy = f"it does not fit torch, NumPy or Pillow: {INSTALL_DETECTRON2}"
        load(f"detectron2.{name}", remedy)
    yield Finding("detectron2", found)
    spec = importlib.util.find_spec("detectron2._C")
    if spec is None or str(spec.origin).endswith(".py"):  # of a pure-Python build
        missing = "none: rotated boxes, deformable convs and the fast COCO evaluator are missing"
        note = f"who needs them builds detectron2's main branch (C++ compiler): {BUILD_DETECTRON2}"
        yield Finding("detectron2's compiled ops", missing, note=note)
    else:
        load("detectron2._C", f"build detectron2 for this torch: {INSTALL_DETECTRON2}")
        yield Finding("detectron2's compiled ops", "load")


def check_scripts() -> Iterator[Finding]:
    """What detectron2's own scripts need, and the training of this package does not."""
    try:
        load("detectron2.model_zoo", "")
    except Problem as problem:
        found = problem.args[0].found
        remedy = "pip install 'setuptools<82'" if "pkg_resources" in found else INSTALL_DETECTRON2
        note = f"demo.py and scripts that name detectron2's configs need it: {remedy}"
        yield Finding("detectron2.model_zoo", found, note=note)
    else:
        yield Finding("detectron2.model_zoo", "loads")
    scripts = Path(sys.prefix, "share", "detectron2", "tools")
    clone = "they are tools/ of a clone of https://github.com/facebookresearch/detectron2"
    there = scripts.is_dir()
    found = str(scripts) if there else f"not in {scripts}"
    yield Finding("detectron2's scripts", found, note="" if there else clone)
    module = os.environ.get("DETECTRON2_ENV_MODULE")
    note = "detectron2's scripts need it for our configs: export DETECTRON2_ENV_MODULE="
    note = "" if module else f"{note}ws_detectron.env"
    yield Finding("DETECTRON2_ENV_MODULE", module or "not set", note=note)


def check_libraries() -> Iterator[Finding]:
    for name in (*NEEDED, *OPTIONAL):
        remedy, note = NEEDED.get(name, ""), OPTIONAL.get(name, "")
        try:
            yield Finding(name, getattr(load(name, remedy), "__version__", "installed"))
        except Problem as problem:
            yield problem.args[0]._replace(note=note)


def check_package() -> Iterator[Finding]:
    remedy = "fix the problems above, then run `pip install -e .` in the repository"
    package = load("ws_detectron", remedy)
    configs = len(load("ws_detectron.model_zoo", remedy).config_names())
    found = f"{package.__version__} at {os.path.dirname(str(package.__file__))}, {configs} configs"
    yield Finding("ws_detectron", found, "" if configs else remedy)


def check_triton() -> Iterator[Finding]:
    """Has a filter standardized on the GPU; the package logs why it cannot use Triton."""
    try:
        torch, package = load("torch", ""), load("ws_detectron", "")
    except Problem:  # found by the checks of these two
        return
    if not torch.cuda.is_available():
        return
    reasons: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: reasons.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ws_detectron")
    logger.addHandler(handler)
    package.standardize_weight(torch.rand(2, 4, 1, 1, device="cuda"))
    logger.removeHandler(handler)
    note = (
        "training works without it, with more kernel launches; Triton needs the version that torch "
        "was built with, a C compiler (gcc, or another in CC) and Python's headers"
    )
    found = reasons[0].splitlines()[0] if reasons else "works"
    yield Finding("Triton", found, note=note if reasons else "")


def check_system() -> Iterator[Finding]:
    if sys.platform == "win32":
        yield Finding(
            "Windows",
            platform.version(),
            note="not tested; NCCL does not exist for it, so train with --num-gpus 1; write paths "
            "with / in configs and KEY VALUE pairs",
        )
    for content, variable, default in CACHES:
        folder = Path(os.path.expanduser(os.environ.get(variable) or default)).absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        problem = "" if os.access(there, os.W_OK) else ", not writable"
        note = f"set {variable} to a folder on a disk with space"
        note = note if problem or free < LITTLE_SPACE else ""
        yield Finding(content, f"{folder}, {free / 2**30:.1f} GiB free{problem}", note=note)


def check_datasets() -> Iterator[Finding]:
    variable = os.environ.get("DETECTRON2_DATASETS")
    root = Path(variable or "datasets")
    source = "DETECTRON2_DATASETS" if variable else "DETECTRON2_DATASETS is not set; default"
    yield Finding("data sets", f"{root} ({source})")
    advice = "set DETECTRON2_DATASETS to the folder that holds `{}` to train on it"
    for split in ("train2017", "val2017"):
        images = root / "coco" / split
        annotations = root / "coco" / "annotations" / f"instances_{split}.json"
        if annotations.exists() and images.exists():
            count = len(list(images.glob("*.jpg")))
            yield Finding(f"COCO {split}", f"{annotations}, {count} images in {images}")
        else:
            missing = " and no ".join(str(p) for p in (annotations, images) if not p.exists())
            yield Finding(f"COCO {split}", f"no {missing}", note=advice.format("coco/"))
    folder = root / "FashionMNIST" / "raw"
    files = len(list(folder.glob("*-ubyte*")))
    note = "" if files else advice.format("FashionMNIST/raw/")
    yield Finding("Fashion-MNIST", f"{files or 'no'} files in {folder}", note=note)


CHECKS = (
    check_torch,
    check_detectron2,
    check_scripts,
    check_libraries,
    check_package,
    check_triton,
    check_system,
    check_datasets,
)


def examine() -> Iterator[Finding]:
    """Runs the checks; an exception in one becomes a problem, and the next one runs."""
    old = sys.version_info < (3, 9)
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", version, "use Python 3.9 or newer" if old else "")
    for check in CHECKS:
        try:
            yield from check()
        except Problem as problem:
            yield problem.args[0]
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            location = f"{os.path.basename(frame.filename)}:{frame.lineno}"
            yield Finding(check.__name__, f"{describe(error)} ({location})", "see the message")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report.

    Returns:
        The exit status: 1 if training cannot work, 0 otherwise.
    """
    parser = argparse.ArgumentParser(
        prog="ws-doctor",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for bug reports")
    as_json = parser.parse_args(arguments).json
    findings = []
    for finding in examine():
        if not as_json:
            print(f"{finding.subject:<26} {finding.found}", flush=True)
        findings.append(finding)
    problems = [finding for finding in findings if finding.remedy]
    if as_json:
        entries = [finding._asdict() for finding in findings]
        print(json.dumps({"training_can_work": not problems, "findings": entries}, indent=1))
        return 1 if problems else 0
    print()
    for finding in findings:
        if finding.note:
            print(f"note: {finding.subject}: {finding.note}")
    for finding in problems:
        print(f"problem: {finding.subject}: {finding.found}; {finding.remedy}")
    if not problems:
        print("training can work\nnext:\n  python tools/quickstart.py")
        return 0
    first = problems[0]
    print(f"training cannot work, problems: {len(problems)}\nnext:")
    if any(finding.found == "not installed" for finding in problems):
        print("  `make set-up` in a clone of the repository installs everything into .venv; or")
    print(f"  solve the first, {first.subject}: {first.remedy}; then run this again")
    return 1


def load(name: str, remedy: str) -> ModuleType:
    """Imports a module; raises `Problem` where that fails."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = "not installed" if error.name == name else f"needs {error.name}, not installed"
        raise Problem(Finding(name, missing, remedy)) from None
    except Exception as error:  # a broken build raises anything: OSError, AttributeError, ...
        raise Problem(Finding(name, describe(error), remedy)) from None


def describe(error: Exception) -> str:
    """The exception in one line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, `()` if there are none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, match.groups())) if match else ()


if __name__ == "__main__":
    sys.exit(main())
