"""Installs detectron2 where there is none, as a pure-Python build of v0.5.

An importable detectron2 >= 0.5 is used untouched. Otherwise the source distribution
`detectron2-cdo==0.5` is downloaded through pip (your index settings hold) and checked against its
sha256. It carries the Python files of detectron2 v0.5 but not the C++ ones, so it cannot be built
as it is: the patches in `detectron2_build/patches.py` are applied, and a wheel of version
0.5+purepy is built and installed. torch, torchvision, setuptools and wheel must be there before.
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

# Empty and relative entries of sys.path would let a folder called detectron2 in the current
# directory (a clone of its repository, say) pass for the installed package.
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
    """What stops the installation; its message is all the user sees."""


def version_number(version: str) -> tuple[int, int]:
    """The first two numbers of a version; `(0, 0)` where there are none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def own_build() -> Optional[str]:
    """METADATA of the installed detectron2 if this script built it, else None."""
    try:
        installed = importlib.metadata.distribution("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return None
    return (installed.read_text("METADATA") or "") if installed.version == VERSION else None


def find_detectron2() -> Optional[tuple[str, str]]:
    """The version and folder of the importable detectron2, None where there is none.

    Raises:
        InstallError: a detectron2 is there but cannot be imported or is older than 0.5.
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
    """Like `find_detectron2`, but None also where a build of this script is to be made anew."""
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
    """
    Raises:
        InstallError: a package needed to build is missing, or torch is too old.
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
    """Runs pip of this interpreter, or the pip in `folder`; its output goes to the terminal.

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
    # With a hash in the requirement pip checks the file before it runs the setup.py in it, which
    # `pip download` does to read the metadata. That setup.py imports torch, hence no isolation.
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
        wheel_dir: where to keep the wheel, None to discard it.
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
            # Four distributions provide cv2; this one needs no libGL and works on servers.
            requirements.append("opencv-python-headless")
        constraints = ["--constraint", str(constraint)] if constraint else []
        pip("install", *constraints, *requirements)
        # Never from an index: nobody owns the name detectron2 there.
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
            print(f"using detectron2 {found[0]} at {found[1]}, untouched")
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
