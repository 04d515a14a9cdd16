"""Installs a pure-Python build of detectron2 0.6 if no detectron2 is installed.

An importable detectron2 >= 0.5 is left unchanged. Otherwise a source distribution of the release
is downloaded by pip (with your index settings) and its SHA-256 is checked. It contains the Python
files of detectron2 but not the C++ ones. So the patches in `detectron2_patches/` are applied, and a
wheel of version 0.6+purepy (or 0.5+purepy) is built and installed, with detectron2's own scripts in
`share/detectron2/tools` of the environment. Install torch, torchvision, setuptools and wheel first.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

PATCHES = Path(__file__).with_name("detectron2_patches")


class InstallError(Exception):
    """The installation failed; the user sees only the message."""


class Release(NamedTuple):
    """Where the Python files of a version come from, and `detectron2_patches/<number>-*.patch`."""

    number: str
    sdist: str
    sha256: str
    patches: tuple[str, ...]
    requirements: tuple[str, ...]

    @property
    def version(self) -> str:
        return f"{self.number}+purepy"


# Those of setup.py without `future` and `pydot` (caffe2 export only) and `black` (LazyConfig.to_py
# only), and with numpy, which it does not list.
REQUIREMENTS = (
    *("Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.8"),
    *("tabulate", "cloudpickle", "tqdm>4.29.0", "tensorboard", "fvcore<0.1.6,>=0.1.5"),
    *("iopath<0.1.10,>=0.1.7", "omegaconf>=2.1", "hydra-core>=1.1", "numpy"),
)
NAMES = ("compiled-ops", "libraries", "numpy", "torch")
RELEASES = {
    release.number: release
    for release in (
        Release(
            "0.5",
            "detectron2-cdo==0.5",
            "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18",
            NAMES,
            REQUIREMENTS,
        ),
        Release(
            "0.6",
            "pb1-detectron2==0.6",
            "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29",
            NAMES,
            REQUIREMENTS,
        ),
    )
}
DEFAULT = RELEASES["0.6"]
TORCH = ("torch>=2.1", "torchvision>=0.16")
PROJECTS = {
    "PointRend/point_rend": "point_rend",
    "DeepLab/deeplab": "deeplab",
    "Panoptic-DeepLab/panoptic_deeplab": "panoptic_deeplab",
}
METADATA = """\
Metadata-Version: 2.1
Name: detectron2
Version: {version}
Summary: detectron2 v{number} as a pure-Python build, patched for current PyTorch, NumPy and Pillow
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache 2.0
License-File: LICENSE
Requires-Python: >=3.9
{requires}

The Python files of detectron2 v{number} without its compiled ops: rotated boxes, deformable
convolution and the fast COCO evaluator are missing. Its scripts are in share/detectron2/tools of
the environment. Built by tools/install_detectron2.py of ws_detectron with these patches
({fingerprint}):

{reasons}
"""
WHEEL = """\
Wheel-Version: 1.0
Generator: install_detectron2.py
Root-Is-Purelib: true
Tag: py3-none-any
"""


def patches(release: Release) -> list[Path]:
    return [PATCHES / f"{release.number}-{name}.patch" for name in release.patches]


def metadata(release: Release) -> str:
    """METADATA of the wheel; a build with another source or other patches has another one."""
    texts = [path.read_text("utf-8") for path in patches(release)]
    return METADATA.format(
        number=release.number,
        version=release.version,
        requires="\n".join(f"Requires-Dist: {name}" for name in (*TORCH, *release.requirements)),
        fingerprint=hashlib.sha256("".join([release.sha256, *texts]).encode()).hexdigest()[:16],
        reasons="\n\n".join(text.partition("\n--- ")[0].strip() for text in texts),
    )


def apply_patch(patch: Path, tree: Path) -> None:
    """Applies a unified diff; every line that it keeps or removes must be where it says.

    Raises:
        InstallError: it does not fit; names patch, file and line.
    """
    diffs = re.split(r"^--- (.+)\n\+\+\+ b/(.+)\n", patch.read_text("utf-8"), flags=re.MULTILINE)
    for source, name, text in zip(diffs[1::3], diffs[2::3], diffs[3::3]):
        path = tree / name
        if path.exists() is (source == "/dev/null"):
            state = "exists already" if path.exists() else "is missing"
            raise InstallError(f"{patch.name}: {name} {state}")
        old = path.read_bytes().decode().splitlines(keepends=True) if path.exists() else []
        new: list[str] = []
        done = 0
        hunks = re.split(r"^@@ -(\d+).*\n", text, flags=re.MULTILINE)
        for number, hunk in zip(hunks[1::2], hunks[2::2]):
            lines = hunk.splitlines(keepends=True)
            before = [line[1:] for line in lines if line[0] != "+"]
            start = max(int(number) - 1, 0)  # a new file starts at 0
            if old[start : start + len(before)] != before:
                raise InstallError(f"{patch.name}: {name} has other lines from line {number} on")
            new += old[done:start] + [line[1:] for line in lines if line[0] != "-"]
            done = start + len(before)
        path.write_bytes("".join(new + old[done:]).encode())


def build_tree(sdist: Path, folder: Path, release: Release) -> Path:
    """Unpacks and patches the source distribution; returns the file tree of the wheel.

    Raises:
        InstallError: it is another file than the patches are for, or one does not fit.
    """
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != release.sha256:
        raise InstallError(f"{sdist.name} has sha256 {digest}, expected {release.sha256}")
    shutil.unpack_archive(sdist, folder)  # its content is known by its hash
    source, tree = folder / sdist.name.removesuffix(".tar.gz"), folder / "tree"
    shutil.move(source / "detectron2", tree / "detectron2")
    for origin, name in PROJECTS.items():
        shutil.move(source / "projects" / origin, tree / "detectron2" / "projects" / name)
    for patch in patches(release):
        apply_patch(patch, tree)
    # A wheel's data folder is unpacked into the environment, and removed with the package.
    data = tree / f"detectron2-{release.version}.data" / "data"
    shutil.move(source / "tools", data / "share" / "detectron2" / "tools")
    info = tree / f"detectron2-{release.version}.dist-info"
    info.mkdir()
    shutil.copy(source / "LICENSE", info)
    (info / "METADATA").write_text(metadata(release), encoding="utf-8")
    (info / "WHEEL").write_text(WHEEL)
    (info / "top_level.txt").write_text("detectron2\n")
    return tree


PROBE = """
import detectron2.engine, detectron2.evaluation, detectron2.model_zoo, detectron2.modeling
print(detectron2.__version__)
"""


def usable_detectron2(release: Release) -> Optional[str]:
    """Version and folder of the installed detectron2, None if `release` must be built.

    That is where there is none, or one of this script that is broken, of another release or has
    other patches.

    Raises:
        InstallError: another one cannot be imported or is older than 0.5.
    """
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # the latter is a folder of that name
        return None
    try:
        built = importlib.metadata.distribution("detectron2")
    except importlib.metadata.PackageNotFoundError:  # a clone on PYTHONPATH
        built = None
    own = built is not None and built.version.endswith("+purepy")
    if built is not None and own and built.read_text("METADATA") != metadata(release):
        print(f"detectron2 {built.version} is of another release or patches: building it again")
        return None
    # In a folder without a clone of detectron2, which would be imported instead.
    command = [sys.executable, "-c", PROBE]
    probe = subprocess.run(command, cwd=PATCHES, stdout=subprocess.PIPE, text=True)
    found = f"detectron2 at {Path(spec.origin).parent}"
    if probe.returncode == 0:
        version = probe.stdout.split()[-1]
        if version_number(version) >= (0, 5):
            return found.replace(" at", f" {version} at")
        problem = f"{found} is {version}, which is older than 0.5"
    else:
        problem = f"{found} cannot be imported, its error is above"
    if own:
        print(f"{problem}: building it again")
        return None
    raise InstallError(
        f"{problem}\nRepair it, or remove it with `python -m pip uninstall detectron2` "
        "and run this again."
    )


def version_number(version: str) -> tuple[int, int]:
    """The first two numbers of a version, `(0, 0)` if there are none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def check_prerequisites() -> None:
    """Checks what the build needs.

    Raises:
        InstallError: a package is missing, or torch is too old.
    """
    installed = {
        str(found.metadata["Name"]).lower() for found in importlib.metadata.distributions()
    }
    names = ("pip", "torch", "torchvision", "setuptools", "wheel")
    missing = [name for name in names if name not in installed]
    if missing:
        command = "ensurepip" if "pip" in missing else f"pip install {' '.join(missing)}"
        raise InstallError(
            f"{' and '.join(missing)} must be installed first: {sys.executable} -m {command}"
        )
    version = importlib.metadata.version("torch")
    if version_number(version) < (2, 1):
        raise InstallError(f"torch {version} is too old, 2.1 or newer is needed")


def run(*arguments: str) -> None:
    """Runs this interpreter with output to the terminal.

    Raises:
        InstallError: the command failed.
    """
    if subprocess.run([sys.executable, *arguments]).returncode != 0:
        raise InstallError(f"`python {' '.join(arguments)}` failed, its output is above")


def download(folder: Path, release: Release) -> Path:
    """Downloads the source distribution into `folder` and returns its path."""
    # `pip download` runs setup.py to read the metadata; with a hash in the requirement, it checks
    # the file first. setup.py imports torch, so build isolation is off.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{release.sdist} --hash=sha256:{release.sha256}\n")
    pip = ["-m", "pip"]
    if version_number(importlib.metadata.version("pip")) >= (26, 3):
        # From 26.3 on, pip refuses this file because an optional extra in it is a URL.
        run(*pip, "install", "--no-deps", "--target", str(folder / "older"), "pip==25.3")
        pip = [str(folder / "older" / "pip")]
    run(
        *(*pip, "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"),
        *("--dest", str(folder), "--requirement", str(requirement)),
    )
    found = sorted(folder.glob("*.tar.gz"))
    if len(found) != 1:
        raise InstallError(f"pip left {[p.name for p in found]} instead of one .tar.gz file")
    return found[0]


def build_and_install(
    release: Release, wheel_dir: Optional[Path], constraint: Optional[Path]
) -> None:
    """Builds the wheel, keeps it in `wheel_dir` if given, and installs it.

    Args:
        release: a row of `RELEASES`.
        wheel_dir: folder to keep the wheel in, None to discard it.
        constraint: pip constraints file for the dependencies.
    """
    check_prerequisites()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = build_tree(download(folder, release), folder, release)
        output = wheel_dir or folder / "wheel"
        output.mkdir(parents=True, exist_ok=True)
        run("-m", "wheel", "pack", "--dest-dir", str(output), str(tree))
        requirements = list(release.requirements)
        if importlib.util.find_spec("cv2") is None:
            # Of the four distributions with cv2, this one works without libGL, as on servers.
            requirements.append("opencv-python-headless")
        constraints = ["--constraint", str(constraint)] if constraint else []
        run("-m", "pip", "install", *constraints, *requirements)
        # Never from an index, where anyone could register the name detectron2.
        run(
            *("-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall"),
            *("--find-links", str(output), f"detectron2=={release.version}"),
        )


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n"
        "  python -m pip install torch torchvision setuptools wheel\n"
        "  python tools/install_detectron2.py",
    )
    parser.add_argument(
        "--release",
        choices=sorted(RELEASES),
        default=DEFAULT.number,
        help="detectron2 release to build where none is installed (default: %(default)s)",
    )
    parser.add_argument("--constraint", type=Path, help="pip constraints file for dependencies")
    parser.add_argument("--wheel-dir", type=Path, help="keep the wheel in this folder")
    options = parser.parse_args(arguments)
    release = RELEASES[options.release]
    try:
        found = usable_detectron2(release)
        if found is not None:
            print(f"using {found}, unchanged")
        else:
            build_and_install(release, options.wheel_dir, options.constraint)
            print(f"installed {release.version}: {usable_detectron2(release)}")
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
