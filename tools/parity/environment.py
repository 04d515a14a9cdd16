"""Creates a virtual environment with mmdetection, timm and detectron2."""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = ("torch==2.11.0", "torchvision==0.26.0")
OTHERS = ("mmdet==3.3.0", "mmengine==0.10.7", "mmcv-lite==2.1.0", "timm==1.0.31", "six")


def make_environment(folder: Path) -> Path:
    """Creates a virtual environment with everything that the comparison needs, about 6 GB.

    Packages come from your pip index. detectron2 is built by tools/install_detectron2.py; mmcv is
    the variant without compiled ops.

    Args:
        folder: of the new environment.

    Returns:
        Its Python interpreter.
    """
    venv.EnvBuilder(with_pip=True).create(folder)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"

    def run(*arguments: str) -> None:
        subprocess.run([str(python), *arguments], check=True)

    run("-m", "pip", "install", "setuptools<81", "wheel", *TORCH)
    run("-m", "pip", "install", *OTHERS)
    run(str(ROOT / "tools" / "install_detectron2.py"))
    run("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    return python
