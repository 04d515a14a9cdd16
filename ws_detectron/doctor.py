"""Reports what is installed, what is missing or broken, and how to fix it.

Run as `python -m ws_detectron.doctor`. It must work where torch or detectron2 is missing or
broken, so only the standard library is imported at module level.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

INSTALL_DETECTRON2 = (
    "run `python tools/install_detectron2.py` from the repository, or install it as "
    "https://detectron2.readthedocs.io/en/latest/tutorials/install.html says"
)
INSTALL_TORCH = "install matching torch and torchvision as https://pytorch.org/get-started says"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    `remedy` marks a problem that prevents training; `note` is advice.
    """

    subject: str
    found: str
    remedy: Optional[str] = None
    note: Optional[str] = None


def check_python() -> Iterator[Finding]:
    version = ".".join(str(number) for number in sys.version_info[:3])
    old = sys.version_info < (3, 9)
    yield Finding("Python", version, "use Python 3.9 or newer" if old else None)


def check_torch() -> Iterator[Finding]:
    torch, problem = _import("torch", INSTALL_TORCH)
    if problem is not None:
        yield problem
        return
    remedy = INSTALL_TORCH if _number(torch.__version__) < (2, 1) else None
    yield Finding("torch", torch.__version__ + (", needs 2.1 or newer" if remedy else ""), remedy)


def check_torchvision() -> Iterator[Finding]:
    torchvision, problem = _import("torchvision", INSTALL_TORCH)
    if problem is not None:
        yield problem
        return
    yield Finding("torchvision", torchvision.__version__)
    import torch

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        yield _check_ops(device)


def _check_ops(device: str) -> Finding:
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
        return Finding(subject, _describe(error), f"torch and torchvision differ: {INSTALL_TORCH}")
    return Finding(subject, "work")


def check_cuda() -> Iterator[Finding]:
    torch, problem = _import("torch", INSTALL_TORCH)
    if problem is not None:
        return
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        try:
            torch.ones(1, device=f"cuda:{index}").item()
        except Exception as error:
            yield Finding(f"cuda:{index}", f"{found}: {_describe(error)}", INSTALL_TORCH)
        else:
            yield Finding(f"cuda:{index}", found)
    if count == 0:
        note = "training runs on the CPU: good for the quickstart and tests, too slow for COCO"
        if Path("/proc/driver/nvidia/version").exists():
            note = f"there is an NVIDIA driver, so torch does not fit it: {INSTALL_TORCH}"
        yield Finding("CUDA devices", "none", note=note)


def check_detectron2() -> Iterator[Finding]:
    detectron2, problem = _import("detectron2", INSTALL_DETECTRON2)
    if problem is not None:
        yield problem
        return
    version = str(getattr(detectron2, "__version__", "unknown version"))
    file = getattr(detectron2, "__file__", None)  # a clone in the current folder has none
    folder = os.path.dirname(file) if file else "a folder without __init__.py"
    found = f"{version} at {folder}"
    if not (0, 5) <= _number(version):
        yield Finding("detectron2", f"{found}, needs 0.5 or newer", INSTALL_DETECTRON2)
        return
    # `import detectron2` loads almost nothing; a mismatch with torch, NumPy or Pillow shows here.
    for name in ("detectron2.modeling", "detectron2.engine", "detectron2.evaluation"):
        _, problem = _import(name, f"it does not fit torch, NumPy or Pillow: {INSTALL_DETECTRON2}")
        if problem is not None:
            yield problem
            return
    yield Finding("detectron2", found)
    yield _check_compiled_ops()


def _check_compiled_ops() -> Finding:
    subject = "detectron2's compiled ops"
    missing = "none: rotated boxes, deformable convs and the fast COCO evaluator are not available"
    spec = importlib.util.find_spec("detectron2._C")
    if spec is None:
        return Finding(subject, missing)
    if (spec.origin or "").endswith(".py"):
        return Finding(subject, f"{missing} (pure-Python build)")
    _, problem = _import("detectron2._C", f"build detectron2 for this torch: {INSTALL_DETECTRON2}")
    return problem or Finding(subject, "load")


def check_libraries() -> Iterator[Finding]:
    remedies = {
        "numpy": "pip install numpy",
        "PIL": "pip install Pillow",
        "fvcore": "pip install fvcore",
        "iopath": "pip install iopath",
        "pycocotools": "pip install pycocotools",
        "cv2": "pip install opencv-python-headless (or opencv-python, never both)",
    }
    for name, remedy in remedies.items():
        module, problem = _import(name, remedy)
        yield problem or Finding(name, _version(name, module))
    notes = {
        "tensorboard": "without it, training writes no TensorBoard events: pip install tensorboard",
        "matplotlib": "pictures and plots need it: pip install matplotlib",
    }
    for name, note in notes.items():
        module, problem = _import(name, note)
        found = _version(name, module) if problem is None else problem.found
        yield Finding(name, found, note=note if problem else None)


def check_package() -> Iterator[Finding]:
    remedy = "fix the problems above, then run `pip install -e .` in the repository"
    for name in ("ws_detectron.modeling", "ws_detectron.config", "ws_detectron.model_zoo"):
        module, problem = _import(name, remedy)
        if problem is not None:
            yield problem
            return
    import ws_detectron

    configs = len(module.config_names())
    found = f"{ws_detectron.__version__} at {os.path.dirname(ws_detectron.__file__)}"
    yield Finding("ws_detectron", f"{found}, {configs} configs", None if configs else remedy)


def check_datasets() -> Iterator[Finding]:
    variable = os.environ.get("DETECTRON2_DATASETS")
    root = Path(variable or "datasets")
    source = "DETECTRON2_DATASETS" if variable else "DETECTRON2_DATASETS is not set; default"
    yield Finding("data sets", f"{root} ({source})")
    advice = "set DETECTRON2_DATASETS to the folder that holds `{}` to train on it"
    for split in ("train2017", "val2017"):
        annotations = root / "coco" / "annotations" / f"instances_{split}.json"
        images = root / "coco" / split
        subject = f"COCO {split}"
        missing = [path for path in (annotations, images) if not path.exists()]
        if missing:
            note = advice.format("coco/")
            yield Finding(subject, f"no {' and no '.join(map(str, missing))}", note=note)
            continue
        count = sum(1 for entry in os.scandir(images) if entry.name.endswith(".jpg"))
        yield Finding(subject, f"{annotations}, {count} images in {images}")
    folder = root / "FashionMNIST" / "raw"
    files = sorted(path.name for path in folder.glob("*-ubyte*")) if folder.is_dir() else []
    if files:
        yield Finding("Fashion-MNIST", f"{len(files)} files in {folder}")
    else:
        note = advice.format("FashionMNIST/raw/")
        yield Finding("Fashion-MNIST", f"no files in {folder}", note=note)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_torch,
    check_torchvision,
    check_cuda,
    check_detectron2,
    check_libraries,
    check_package,
    check_datasets,
)


def examine(
    checks: Sequence[Callable[[], Iterator[Finding]]] = CHECKS,
) -> Iterator[Finding]:
    """Runs the checks; an exception in one becomes a problem, and the next one runs."""
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            location = f"{os.path.basename(frame.filename)}:{frame.lineno}"
            yield Finding(check.__name__, f"{_describe(error)} ({location})", "see the message")


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Prints the report.

    Returns:
        The exit status: 1 if training cannot work, 0 otherwise.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ws_detectron.doctor",
        description="Reports what is installed, what is missing or broken, and how to fix it. "
        "The exit status is 1 if training cannot work.",
        epilog="example: DETECTRON2_DATASETS=~/datasets python -m ws_detectron.doctor",
    )
    parser.parse_args(arguments)
    findings = []
    for finding in examine():
        print(f"{finding.subject:<26} {finding.found}", flush=True)
        findings.append(finding)
    problems = [f for f in findings if f.remedy is not None]
    print()
    for finding in findings:
        if finding.note is not None:
            print(f"note: {finding.subject}: {finding.note}")
    for finding in problems:
        print(f"problem: {finding.subject}: {finding.found}; {finding.remedy}")
    print(f"training cannot work, problems: {len(problems)}" if problems else "training can work")
    if any(finding.found == "not installed" for finding in problems):
        print("in a clone of the repository, `make set-up` installs everything into .venv")
    return 1 if problems else 0


def _import(name: str, remedy: str) -> tuple[Any, Optional[Finding]]:
    """The module, or None and the problem with importing it."""
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        missing = "not installed" if error.name == name else f"needs {error.name}, not installed"
        return None, Finding(name, missing, remedy)
    except Exception as error:  # a broken build raises anything: OSError, AttributeError, ...
        return None, Finding(name, _describe(error), remedy)


def _describe(error: BaseException) -> str:
    """The exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _number(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `(2, 11, 0)` for `"2.11.0+cu130"`, `()` for `"main"`."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _version(name: str, module: Any) -> str:
    """A module's version, or its distribution's where the module has none."""
    version = getattr(module, "__version__", None)
    if version is None:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "installed"
    return str(version)


if __name__ == "__main__":
    sys.exit(main())
