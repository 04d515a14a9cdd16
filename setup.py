"""Packaging of ws_detectron; everything static about the tools stands in pyproject.toml.

Four things that the package imports are not among its dependencies, because the wrong choice
would break the user's environment:

- torch and torchvision: pip counts vendor builds such as `2.1.0a0+nv23.10` as older than 2.1 and
  would replace them, and CUDA builds come from an index of their own.
- detectron2: no registry has it. Whoever took the name there would be installed.
- OpenCV: four distributions provide `cv2`, and two of them in one environment break each other.

`ws-doctor` says which of them is missing and how to get it.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "ws_detectron" / "__init__.py").read_text("utf-8"), re.M
)
if VERSION is None:
    raise RuntimeError("ws_detectron/__init__.py holds no line `__version__ = ...`")
README = ROOT / "README.md"


class BuildWithConfigs(build_py):
    """Puts the repository's configs/ into the wheel as ws_detectron/configs/.

    An editable install takes them from the repository, see `ws_detectron.model_zoo`.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "ws_detectron", "configs")
        shutil.rmtree(target, ignore_errors=True)
        configs = ROOT / "configs"
        for source in sorted([*configs.rglob("*.yaml"), *configs.rglob("*.py")]):
            copy = target / source.relative_to(configs)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


setup(
    name="ws_detectron",
    version=VERSION[1],
    description="Weight Standardization and Group Normalization for Detectron2",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ws_detectron", "ws_detectron.*"]),
    py_modules=["ws_doctor"],
    entry_points={"console_scripts": ["ws-doctor = ws_doctor:main"]},
    package_data={"ws_detectron": ["py.typed"]},
    cmdclass={"build_py": BuildWithConfigs},
    python_requires=">=3.9",
    # All of detectron2's own, without versions: an environment in which detectron2 works stays
    # as it is. The configs need an fvcore that takes a list of `_BASE_` files.
    install_requires=[
        "fvcore>=0.1.5.post20211023",
        "iopath",
        "numpy",
        "Pillow",
        "portalocker",
        "pycocotools",
        "PyYAML",
        "tabulate",
        "tqdm",
    ],
    extras_require={
        "dev": [
            *("ipykernel", "mypy", "nbclient", "pre-commit", "psutil", "pytest", "pytest-timeout"),
            *("pytest-xdist", "ruff"),
        ],
        "export": ["onnx", "onnxruntime"],
        "fast-eval": ["faster-coco-eval>=1.6.8"],
        "lab": ["markdown", "matplotlib", "omegaconf", "pandas", "scipy"],
        "plots": ["matplotlib"],
        "slurm": ["submitit"],
    },
    zip_safe=False,
)
