"""Installs a pure-Python build of detectron2 v0.5 if no detectron2 is installed.

An importable detectron2 >= 0.5 is left unchanged. Otherwise the source distribution
`detectron2-cdo==0.5` is downloaded by pip (with your index settings) and its SHA-256 is checked.
It contains the Python files of detectron2 v0.5 but not the C++ ones. So the patches in
`detectron2_build/patches.py` are applied, and a wheel of version 0.5+purepy is built and
installed. Install torch, torchvision, setuptools and wheel first.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from detectron2_build.patches import PatchError
from detectron2_build.wheel import (
    REQUIREMENTS,
    SDIST,
    SDIST_SHA256,
    VERSION,
    BuildError,
    assemble,
    check_hash,
    fingerprint,
    pack,
)

# Without empty and relative entries of sys.path, which would find a folder named detectron2 in the
# current directory, such as a clone of its repository.
PROBE = """
import json, os, sys
sys.path = [p for p in sys.path if os.path.isabs(p)]
import importlib.util
if importlib.util.find_spec("detectron2") is None:
    print(json.dumps(None))
else:
    import detectron2
    import detectron2.engine, detectron2.evaluation, detectron2.model_zoo, detectron2.modeling
    print(json.dumps([detectron2.__version__, os.path.dirname(detectron2.__file__)]))
"""


class InstallError(Exception):
    """The installation failed; the user sees only the message."""


def version_number(version: str) -> tuple[int, int]:
    """The first two numbers of a version, `(0, 0)` if there are none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def own_build() -> Optional[str]:
    """METADATA of the installed detectron2 if this script built it, otherwise None."""
    try:
        installed = importlib.metadata.distribution("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return None
    return (installed.read_text("METADATA") or "") if installed.version == VERSION else None


def find_detectron2() -> Optional[tuple[str, str]]:
    """Version and folder of the installed detectron2, None if there is none.

    Raises:
        InstallError: the installed detectron2 cannot be imported or is older than 0.5.
    """
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    remedy = "Repair it, or remove it with `python -m pip uninstall detectron2` and run this again."
    if probe.returncode != 0:
        error = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise InstallError(f"the installed detectron2 cannot be imported: {error}\n{remedy}")
    found = json.loads(probe.stdout.strip().splitlines()[-1])
    if found is None:
        return None
    version, folder = found
    if version_number(version) < (0, 5):
        raise InstallError(f"detectron2 {version} at {folder} is older than 0.5.\n{remedy}")
    return version, folder


def usable_detectron2() -> Optional[tuple[str, str]]:
    """Like `find_detectron2`, but None also if a build of this script must be replaced."""
    build = own_build()
    if build is not None and fingerprint() not in build:
        print(f"detectron2 {VERSION} was built with other patches: building it again")
        return None
    try:
        return find_detectron2()
    except InstallError as error:
        if build is None:
            raise
        print(f"{str(error).splitlines()[0]}; installing {VERSION} again")
        return None


def check_prerequisites() -> None:
    """Checks what the build needs.

    Raises:
        InstallError: a package is missing, or torch is too old.
    """
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise InstallError(f"pip must be installed first: {sys.executable} -m ensurepip") from None
    names = ("torch", "torchvision", "setuptools", "wheel")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise InstallError(
            f"{' and '.join(missing)} must be installed first: "
            f"{sys.executable} -m pip install {' '.join(missing)}"
        )
    version = importlib.metadata.version("torch")
    if version_number(version) < (2, 1):
        raise InstallError(f"torch {version} is too old, 2.1 or newer is needed")


def pip(*arguments: str, folder: Optional[Path] = None) -> None:
    """Runs this interpreter's pip, or the one in `folder`, with output to the terminal.

    Raises:
        InstallError: pip failed.
    """
    environment = dict(os.environ)
    if folder is not None:
        paths = [str(folder), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "pip", *arguments]
    if subprocess.run(command, env=environment).returncode != 0:
        raise InstallError(f"`pip {' '.join(arguments)}` failed, its output is above")


def download(folder: Path) -> Path:
    """Downloads the source distribution into `folder` and returns its path."""
    # `pip download` runs setup.py to read the metadata; with a hash in the requirement, it checks
    # the file first. setup.py imports torch, so build isolation is off.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
    older_pip = None
    if version_number(importlib.metadata.version("pip")) >= (26, 3):
        # From 26.3 on, pip refuses this file because an optional extra in it is a URL.
        older_pip = folder / "pip"
        pip("install", "--no-deps", "--target", str(older_pip), "pip==25.3")
    pip(
        *("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"),
        *("--dest", str(folder), "--requirement", str(requirement)),
        folder=older_pip,
    )
    found = sorted(folder.glob("*.tar.gz"))
    if len(found) != 1:
        raise InstallError(f"pip left {[p.name for p in found]} instead of one .tar.gz file")
    check_hash(found[0])
    return found[0]


def build_and_install(wheel_dir: Optional[Path], constraint: Optional[Path]) -> None:
    """Builds the wheel, keeps it in `wheel_dir` if given, and installs it.

    Args:
        wheel_dir: folder to keep the wheel in, None to discard it.
        constraint: pip constraints file for the dependencies.
    """
    check_prerequisites()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = assemble(download(folder), folder)
        output = wheel_dir or folder / "wheel"
        pack(tree, output)
        requirements = list(REQUIREMENTS)
        if importlib.util.find_spec("cv2") is None:
            # Of the four distributions with cv2, this one works without libGL, as on servers.
            requirements.append("opencv-python-headless")
        constraints = ["--constraint", str(constraint)] if constraint else []
        pip("install", *constraints, *requirements)
        # Never from an index, where anyone could register the name detectron2.
        pip(
            *("install", "--no-deps", "--no-index", "--force-reinstall"),
            *("--find-links", str(output), f"detectron2=={VERSION}"),
        )


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n"
        "  python -m pip install torch torchvision setuptools wheel\n"
        "  python tools/install_detectron2.py",
    )
    parser.add_argument("--constraint", type=Path, help="pip constraints file for dependencies")
    parser.add_argument("--wheel-dir", type=Path, help="keep the wheel in this folder")
    options = parser.parse_args(arguments)
    try:
        found = usable_detectron2()
        if found is not None:
            print(f"using detectron2 {found[0]} at {found[1]}, unchanged")
            return 0
        build_and_install(options.wheel_dir, options.constraint)
        version, folder = find_detectron2() or ("", "")
        print(f"installed detectron2 {VERSION} (module version {version}) at {folder}")
    except (InstallError, BuildError, PatchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
