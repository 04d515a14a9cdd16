"""Turns the source distribution of detectron2 v0.5 into a patched pure-Python wheel."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from .patches import PATCHES

VERSION = "0.5+purepy"
SDIST = "detectron2-cdo==0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
PROJECTS = {
    "PointRend/point_rend": "point_rend",
    "DeepLab/deeplab": "deeplab",
    "Panoptic-DeepLab/panoptic_deeplab": "panoptic_deeplab",
}
# setup.py of v0.5 without `future` and `pydot` (caffe2 export only) and `black` (LazyConfig.to_py
# only), and with torch, torchvision and numpy, which it does not list.
REQUIREMENTS = (
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.6",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore<0.1.6,>=0.1.5",
    "iopath<0.1.10,>=0.1.7",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
    "numpy",
)
TORCH_REQUIREMENTS = ("torch>=2.1", "torchvision>=0.16")
METADATA = """\
Metadata-Version: 2.1
Name: detectron2
Version: {version}
Summary: detectron2 v0.5 as a pure-Python build, patched for current PyTorch, NumPy and Pillow
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache 2.0
License-File: LICENSE
Requires-Python: >=3.9
{requires}

The Python files of detectron2 v0.5 without its compiled ops: rotated boxes, deformable
convolution and the fast COCO evaluator are missing. Built by tools/install_detectron2.py of
ws_detectron with these patches ({fingerprint}):

{patches}
"""


class BuildError(Exception):
    """The build failed; the user sees only the message."""


def fingerprint() -> str:
    """Identifies the build, so that one made with older patches is replaced."""
    parts = [SDIST_SHA256, METADATA, REQUIREMENTS, [vars(p) for p in PATCHES]]
    content = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def check_hash(path: Path) -> None:
    """Checks that a file is the source distribution that the patches are for.

    Raises:
        BuildError: it is another file.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise BuildError(f"{path.name} has sha256 {digest}, expected {SDIST_SHA256}")


def assemble(sdist: Path, folder: Path) -> Path:
    """Unpacks and patches the source distribution; returns the file tree of the wheel.

    Raises:
        PatchError: a patch does not fit.
    """
    shutil.unpack_archive(sdist, folder)  # its content is known by its hash
    source = folder / "detectron2_cdo-0.5"
    tree = folder / "tree"
    shutil.move(str(source / "detectron2"), str(tree / "detectron2"))
    for origin, name in PROJECTS.items():
        shutil.move(str(source / "projects" / origin), str(tree / "detectron2/projects" / name))
    for patch in PATCHES:
        patch.apply(tree)
    info = tree / f"detectron2-{VERSION}.dist-info"
    info.mkdir()
    shutil.copy(source / "LICENSE", info / "LICENSE")
    (info / "METADATA").write_text(metadata(), encoding="utf-8")
    (info / "WHEEL").write_text(
        "Wheel-Version: 1.0\nGenerator: install_detectron2.py\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n"
    )
    (info / "top_level.txt").write_text("detectron2\n")
    return tree


def metadata() -> str:
    """The METADATA file of the wheel."""
    return METADATA.format(
        version=VERSION,
        requires="\n".join(f"Requires-Dist: {r}" for r in (*TORCH_REQUIREMENTS, *REQUIREMENTS)),
        fingerprint=fingerprint(),
        patches="\n".join(f"- {p.name} ({p.file}): {p.reason}" for p in PATCHES),
    )


def pack(tree: Path, folder: Path) -> None:
    """Writes the wheel of a tree, as returned by `assemble`, into `folder`.

    Raises:
        BuildError: the `wheel` package failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "wheel", "pack", "--dest-dir", str(folder), str(tree)]
    if subprocess.run(command).returncode != 0:
        raise BuildError("the package `wheel` could not write the wheel, its output is above")
