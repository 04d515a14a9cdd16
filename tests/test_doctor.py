"""The doctor's report, in this environment and in broken ones."""

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Optional

import pytest
import torch

from ws_detectron import doctor
from ws_detectron.doctor import Finding

ROOT = Path(__file__).parents[1]


def by_subject(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def run_broken(code: str, *arguments: str, path: Path) -> subprocess.CompletedProcess:
    """Python in the repository with `path` before everything installed."""
    return subprocess.run(
        [sys.executable, *arguments, code],
        cwd=ROOT,
        env={"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )


def test_this_environment_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    output = capsys.readouterr().out
    assert f"torch                      {torch.__version__}\n" in output
    assert "nms and roi_align on cpu   work\n" in output
    assert "detectron2's compiled ops" in output
    assert output.endswith("training can work\n")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("raise OSError('libcudart.so.12: no such file')", "OSError: libcudart.so.12"),
        ("raise ModuleNotFoundError(name='torch')", "not installed"),
    ],
)
def test_broken_torch_is_a_problem_with_a_remedy_and_no_traceback(
    tmp_path: Path, content: str, expected: str
) -> None:
    (tmp_path / "torch.py").write_text(content + "\n")
    done = run_broken("ws_detectron.doctor", "-m", path=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("problem: torch: "))
    assert expected in line
    assert line.endswith(doctor.INSTALL_TORCH)
    assert ("`make set-up`" in done.stdout) == (expected == "not installed")
    # detectron2 and this package need torch; the later checks still run
    assert "problem: detectron2: " in done.stdout
    assert "problem: ws_detectron.modeling: " in done.stdout
    assert "Fashion-MNIST" in done.stdout


@pytest.mark.parametrize(
    ("version", "expected"),
    [({}, "unknown version at a folder without __init__.py"), ({"__version__": "0.4.1"}, "0.4.1")],
    ids=["clone in the current folder", "old"],
)
def test_detectron2_that_is_none_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, version: dict[str, str], expected: str
) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", SimpleNamespace(**version))
    (finding,) = doctor.check_detectron2()
    assert finding.found.startswith(expected)
    assert finding.found.endswith("needs 0.5 or newer")
    assert finding.remedy == doctor.INSTALL_DETECTRON2


def test_detectron2_that_breaks_on_use_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = importlib.import_module

    def broken(name: str) -> ModuleType:
        if name == "detectron2.engine":
            raise AttributeError("module 'PIL.Image' has no attribute 'LINEAR'")
        return import_module(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    (finding,) = doctor.check_detectron2()
    assert finding.subject == "detectron2.engine"
    assert finding.found == "AttributeError: module 'PIL.Image' has no attribute 'LINEAR'"
    assert (finding.remedy or "").endswith(doctor.INSTALL_DETECTRON2)


def test_the_package_itself_still_reports_what_breaks_it(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: no such file')\n")
    done = run_broken("import ws_detectron", "-c", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("OSError: libcudart.so.12: no such file\n")


@pytest.mark.skipif(sys.version_info < (3, 10), reason="Python 3.9 does not say what it runs")
def test_other_modules_that_are_run_meet_what_breaks_it(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: no such file')\n")
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("import ws_detectron\n")
    (package / "train.py").write_text("print('trains without WS')\n")
    done = run_broken("mine.train", "-m", path=tmp_path)
    assert done.returncode == 1 and "trains without WS" not in done.stdout
    assert done.stderr.endswith("OSError: libcudart.so.12: no such file\n")


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        doctor.main(["--help"])
    assert caught.value.code == 0
    assert "python -m ws_detectron.doctor" in capsys.readouterr().out


def test_check_that_fails_becomes_a_problem_and_the_next_one_runs() -> None:
    def bad() -> Iterator[Finding]:
        yield Finding("first", "fine")
        raise RuntimeError("unforeseen\nsecond line")

    def good() -> Iterator[Finding]:
        yield Finding("last", "fine")

    first, problem, last = doctor.examine([bad, good])
    assert (first.subject, last.subject) == ("first", "last")
    assert problem.subject == "bad"
    assert problem.found.startswith("RuntimeError: unforeseen (test_doctor.py:")
    assert problem.remedy is not None


@pytest.mark.parametrize("name", ["numpy", "PIL", "fvcore", "iopath", "pycocotools", "cv2"])
def test_missing_library_is_a_problem(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    finding = by_subject(doctor.check_libraries())[name]
    assert finding.found == "not installed"
    assert "pip install" in (finding.remedy or "")


@pytest.mark.parametrize("name", ["matplotlib", "tensorboard"])
def test_what_training_does_not_need_is_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    finding = by_subject(doctor.check_libraries())[name]
    assert (finding.found, finding.remedy) == ("not installed", None)
    assert f"pip install {name}" in (finding.note or "")
    (tmp_path / f"{name}.py").write_text("raise ValueError('Key backend: no such backend')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name)
    finding = by_subject(doctor.check_libraries())[name]
    assert finding.found == "ValueError: Key backend: no such backend"
    assert finding.remedy is None and finding.note


def test_old_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.0.1+cu118"))
    (finding,) = doctor.check_torch()
    assert finding.found == "2.0.1+cu118, needs 2.1 or newer"
    assert finding.remedy is not None


def test_torchvision_without_its_ops_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def nms(*arguments: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", nms)
    finding = by_subject(doctor.check_torchvision())["nms and roi_align on cpu"]
    assert finding.found == "RuntimeError: operator torchvision::nms does not exist"
    assert (finding.remedy or "").startswith("torch and torchvision differ")


def test_wrong_results_of_the_ops_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    monkeypatch.setattr(torchvision.ops, "nms", lambda *arguments: torch.tensor([0]))
    finding = by_subject(doctor.check_torchvision())["nms and roi_align on cpu"]
    assert finding.found == "wrong results"
    assert finding.remedy is not None


@pytest.mark.parametrize("works", [True, False])
def test_cuda_device_is_named_and_tried(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    def ones(*arguments: object, device: str) -> SimpleNamespace:
        assert device == "cuda:0"
        if not works:
            raise RuntimeError("CUDA error: no kernel image is available\nmore")
        return SimpleNamespace(item=lambda: 1.0)

    properties = SimpleNamespace(name="A Card", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch, "ones", ones)
    (finding,) = doctor.check_cuda()
    assert finding.subject == "cuda:0"
    assert finding.found.startswith("A Card, 24 GiB")
    assert ("no kernel image" in finding.found) is not works
    assert (finding.remedy is None) is works


def test_no_cuda_device_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (finding,) = doctor.check_cuda()
    assert finding.found == "none"
    assert finding.remedy is None
    assert finding.note is not None


@pytest.mark.parametrize(
    ("origin", "expected", "problem"),
    [
        (None, "none: rotated boxes", False),
        ("/x/detectron2/_C.py", "(pure-Python build)", False),
        ("/x/detectron2/_C.cpython-311-x86_64-linux-gnu.so", "undefined symbol", True),
    ],
    ids=["absent", "placeholder", "broken"],
)
def test_compiled_ops(
    monkeypatch: pytest.MonkeyPatch, origin: Optional[str], expected: str, problem: bool
) -> None:
    def find_spec(name: str) -> Optional[SimpleNamespace]:
        assert name == "detectron2._C"
        return SimpleNamespace(origin=origin) if origin else None

    def import_module(name: str) -> None:
        raise ImportError("undefined symbol: _ZN2at")

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib, "import_module", import_module)
    finding = doctor._check_compiled_ops()
    assert expected in finding.found
    assert (finding.remedy is not None) is problem


def test_missing_data_sets_are_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    findings = by_subject(doctor.check_datasets())
    assert findings["data sets"].found == f"{tmp_path / 'nowhere'} (DETECTRON2_DATASETS)"
    for subject in ("COCO train2017", "COCO val2017", "Fashion-MNIST"):
        assert findings[subject].remedy is None
        assert "DETECTRON2_DATASETS" in (findings[subject].note or "")


def test_data_sets_that_are_there_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "instances_train2017.json").touch()
    (tmp_path / "coco" / "train2017").mkdir()
    for name in ("1.jpg", "2.jpg", "notes.txt"):
        (tmp_path / "coco" / "train2017" / name).touch()
    (tmp_path / "coco" / "val2017").mkdir()
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
    (tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz").touch()
    findings = by_subject(doctor.check_datasets())
    assert "2 images" in findings["COCO train2017"].found
    assert findings["COCO train2017"].note is None
    # images without annotations are of no use
    assert "instances_val2017.json" in findings["COCO val2017"].found
    assert findings["COCO val2017"].note is not None
    assert "1 files" in findings["Fashion-MNIST"].found


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.11.0+cu130", (2, 11, 0)), ("2.1.0a0+32f93b1", (2, 1, 0)), ("main", ()), ("0.6", (0, 6))],
)
def test_version_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert doctor._number(version) == numbers
