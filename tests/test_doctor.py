"""The doctor's report, in this environment and in broken ones."""

import importlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Optional

import pytest
import torch
import torchvision

import ws_detectron
import ws_doctor
from ws_doctor import Finding, Problem

ROOT = Path(__file__).parents[1]


def by_subject(check: Iterator[Finding]) -> dict[str, Finding]:
    """The findings of a check, also the one that ends it."""
    findings = []
    try:
        findings += list(check)
    except Problem as problem:
        findings += problem.args
    return {finding.subject: finding for finding in findings}


def test_this_environment_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert ws_doctor.main([]) == 0
    output = capsys.readouterr().out
    assert f"torch                      {torch.__version__}\n" in output
    assert "nms and roi_align on cpu   work\n" in output
    assert "detectron2's compiled ops" in output
    assert output.endswith("training can work\nnext:\n  python tools/quickstart.py\n")


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
    done = subprocess.run(
        [sys.executable, "-m", "ws_doctor"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("problem: torch: "))
    assert expected in line
    assert line.endswith(ws_doctor.INSTALL_TORCH)
    assert ("`make set-up`" in done.stdout) == (expected == "not installed")
    verdict, *_, last = done.stdout[done.stdout.index("training cannot work") :].splitlines()
    assert verdict == f"training cannot work, problems: {done.stdout.count('problem: ')}"
    assert last.startswith("  solve the first, torch: ") and ws_doctor.INSTALL_TORCH in last
    # detectron2 and this package need torch; the later checks still run
    assert "problem: detectron2" in done.stdout
    assert "problem: ws_detectron: " in done.stdout
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
    (finding,) = by_subject(ws_doctor.check_detectron2()).values()
    assert finding.found.startswith(expected)
    assert finding.found.endswith("needs 0.5 or newer")
    assert finding.remedy == ws_doctor.INSTALL_DETECTRON2


def test_detectron2_that_breaks_on_use_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = importlib.import_module

    def broken(name: str) -> ModuleType:
        if name == "detectron2.engine":
            raise AttributeError("module 'PIL.Image' has no attribute 'LINEAR'")
        return import_module(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    (finding,) = by_subject(ws_doctor.check_detectron2()).values()
    assert finding.subject == "detectron2.engine"
    assert finding.found == "AttributeError: module 'PIL.Image' has no attribute 'LINEAR'"
    assert finding.remedy.endswith(ws_doctor.INSTALL_DETECTRON2)


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        ws_doctor.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "examples:\n  ws-doctor\n" in text and "  python -m ws_doctor\n" in text
    assert "Reports what is installed" in text and "exit status is 1" in " ".join(text.split())


def test_check_that_fails_becomes_a_problem_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bad() -> Iterator[Finding]:
        yield Finding("first", "fine")
        raise RuntimeError("unforeseen\nsecond line")

    def good() -> Iterator[Finding]:
        yield Finding("last", "fine")

    monkeypatch.setattr(ws_doctor, "CHECKS", (bad, good))
    _, first, problem, last = ws_doctor.examine()
    assert (first.subject, last.subject) == ("first", "last")
    assert problem.subject == "bad" and problem.remedy
    assert problem.found.startswith("RuntimeError: unforeseen (test_doctor.py:")


@pytest.mark.parametrize("name", ["PIL", "cv2", "matplotlib", "tensorboard"])
def test_missing_library_is_a_problem_or_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    finding = by_subject(ws_doctor.check_libraries())[name]
    assert finding.found == "not installed"
    needed = name in ("PIL", "cv2")
    assert "pip install" in (finding.remedy if needed else finding.note)
    assert not (finding.note if needed else finding.remedy)
    (tmp_path / f"{name}.py").write_text("raise ValueError('Key backend: no such backend')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name)
    finding = by_subject(ws_doctor.check_libraries())[name]
    assert finding.found == "ValueError: Key backend: no such backend"
    assert bool(finding.remedy) is needed and bool(finding.note) is not needed


@pytest.mark.parametrize(
    ("version", "old"),
    [("2.0.1+cu118", True), ("2.1.0a0+32f93b1", False), ("2.11.0+cu130", False), ("x", True)],
)
def test_old_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch, version: str, old: bool) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    finding = by_subject(ws_doctor.check_torch())["torch"]
    assert finding.found == version + (", needs 2.1 or newer" if old else "")
    assert bool(finding.remedy) is old


@pytest.mark.parametrize(("version", "newer"), [("2.14.1+cu130", False), ("2.15.0", True)])
def test_torch_newer_than_tested_is_a_note(monkeypatch, version: str, newer: bool) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    finding = by_subject(ws_doctor.check_torch())["torch"]
    assert (finding.found, finding.remedy) == (version, "")
    assert ("install torch 2.14" in finding.note) is newer


def missing_op(*arguments: object) -> None:
    raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize(
    ("nms", "found", "remedy"),
    [
        (
            missing_op,
            "RuntimeError: operator torchvision::nms does not exist",
            "torch and torchvision differ",
        ),
        (lambda *arguments: torch.tensor([0]), "wrong results", "install matching"),
    ],
)
def test_torchvision_whose_ops_fail_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, nms, found: str, remedy: str
) -> None:
    monkeypatch.setattr(torchvision.ops, "nms", nms)
    finding = by_subject(ws_doctor.check_torch())["nms and roi_align on cpu"]
    assert finding.found == found
    assert finding.remedy.startswith(remedy)


@pytest.mark.parametrize("works", [True, False])
def test_cuda_device_is_named_and_tried(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    def ones(*arguments: object, device: str) -> SimpleNamespace:
        assert device == "cuda:0"
        if not works:
            raise RuntimeError("CUDA error: no kernel image is available\nmore")
        return SimpleNamespace(item=lambda: 1.0)

    properties = SimpleNamespace(name="A Card", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(ws_doctor, "check_ops", lambda device: Finding(f"ops on {device}", "work"))
    findings = by_subject(ws_doctor.check_torch())
    assert "ops on cuda:0" in findings and "CUDA devices" not in findings
    finding = findings["cuda:0"]
    assert finding.found.startswith("A Card, 24 GiB")
    assert ("no kernel image" in finding.found) is not works
    assert (finding.remedy == "") is works


@pytest.mark.parametrize("available", [True, False])
def test_ops_are_tried_on_mps_and_never_stop_a_training(monkeypatch, available: bool) -> None:
    ops = {"cpu": Finding("cpu", "work"), "mps": Finding("mps", "NotImplementedError", "remedy")}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available)
    monkeypatch.setattr(ws_doctor, "check_ops", ops.get)
    findings = by_subject(ws_doctor.check_torch())
    assert ("mps" in findings) is available
    if available:
        assert findings["mps"].found == "NotImplementedError" and not findings["mps"].remedy
        assert "PYTORCH_ENABLE_MPS_FALLBACK=1" in findings["mps"].note


def test_no_cuda_device_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    finding = by_subject(ws_doctor.check_torch())["CUDA devices"]
    assert (finding.found, finding.remedy) == ("none", "")
    assert finding.note


@pytest.mark.parametrize(
    ("origin", "expected", "problem"),
    [
        (None, "none: rotated boxes", False),
        ("/x/detectron2/_C.py", "none: rotated boxes", False),
        ("/x/detectron2/_C.cpython-311-x86_64-linux-gnu.so", "undefined symbol", True),
    ],
    ids=["absent", "placeholder", "broken"],
)
def test_compiled_ops(
    monkeypatch: pytest.MonkeyPatch, origin: Optional[str], expected: str, problem: bool
) -> None:
    load = ws_doctor.load

    def broken(name: str, remedy: str) -> ModuleType:
        if name == "detectron2._C":
            raise Problem(Finding(name, "ImportError: undefined symbol: _ZN2at", remedy))
        return load(name, remedy)

    spec = SimpleNamespace(origin=origin) if origin else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(ws_doctor, "load", broken)
    *_, finding = by_subject(ws_doctor.check_detectron2()).values()
    assert expected in finding.found
    assert bool(finding.remedy) is problem
    assert ("pip install --no-build-isolation" in finding.note) is not problem


def test_what_stops_scripts_of_detectron2_is_named(tmp_path: Path, monkeypatch) -> None:
    def load(name: str, remedy: str) -> ModuleType:
        raise Problem(Finding(name, "needs pkg_resources, not installed", remedy))

    monkeypatch.setattr(ws_doctor, "load", load)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("DETECTRON2_ENV_MODULE", raising=False)
    zoo, scripts, module = ws_doctor.check_scripts()
    assert zoo.note.endswith("need it: pip install 'setuptools<82'")
    assert scripts.found.startswith("not in ") and "clone" in scripts.note
    assert module.note.endswith(": export DETECTRON2_ENV_MODULE=ws_detectron.env")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("DETECTRON2_ENV_MODULE", "my_module")
    folder = tmp_path / "share" / "detectron2" / "tools"
    folder.mkdir(parents=True)
    found = {finding.found: finding.note + finding.remedy for finding in ws_doctor.check_scripts()}
    assert found == {"loads": "", str(folder): "", "my_module": ""}


@pytest.mark.parametrize("works", [True, False])
def test_why_triton_cannot_be_used_is_said(monkeypatch, works: bool) -> None:
    def standardize_weight(weight: torch.Tensor) -> None:
        if not works:
            logging.getLogger("ws_detectron.layers.standardize").warning("no compiler (%s)", "gcc")

    assert list(ws_doctor.check_triton()) == [] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.ones(shape))
    monkeypatch.setattr(ws_detectron, "standardize_weight", standardize_weight)
    (finding,) = ws_doctor.check_triton()
    assert finding.found == ("works" if works else "no compiler (gcc)")
    assert ("a C compiler" in finding.note) is not works
    assert not finding.remedy


@pytest.mark.parametrize(("free", "little"), [(2**30, True), (2**40, False)])
def test_caches_on_a_full_disk_name_the_variable(
    tmp_path: Path, monkeypatch, free: int, little: bool
) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "weights"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    finding = by_subject(ws_doctor.check_system())["downloaded weights"]
    assert finding.found == f"{tmp_path / 'weights'}, {free / 2**30:.1f} GiB free"
    assert ("set FVCORE_CACHE" in finding.note) is little


def test_windows_has_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Windows" not in by_subject(ws_doctor.check_system())
    monkeypatch.setattr(sys, "platform", "win32")
    assert "--num-gpus 1" in by_subject(ws_doctor.check_system())["Windows"].note


@pytest.mark.parametrize("remedy", ["", "fix it"])
def test_json_has_all_findings(monkeypatch, capsys, remedy: str) -> None:
    findings = [Finding("Python", "3.11", note="new"), Finding("torch", "2.0", remedy)]
    monkeypatch.setattr(ws_doctor, "examine", lambda: iter(findings))
    assert ws_doctor.main(["--json"]) == bool(remedy)
    found = json.loads(capsys.readouterr().out)
    assert found["training_can_work"] is not bool(remedy)
    assert [Finding(**entry) for entry in found["findings"]] == findings


def test_data_sets_are_counted_or_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    findings = by_subject(ws_doctor.check_datasets())
    assert findings["data sets"].found == f"{tmp_path} (DETECTRON2_DATASETS)"
    for subject in ("COCO train2017", "COCO val2017", "Fashion-MNIST"):
        assert findings[subject].remedy == ""
        assert "DETECTRON2_DATASETS" in findings[subject].note
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "instances_train2017.json").touch()
    (tmp_path / "coco" / "train2017").mkdir()
    for name in ("1.jpg", "2.jpg", "notes.txt"):
        (tmp_path / "coco" / "train2017" / name).touch()
    (tmp_path / "coco" / "val2017").mkdir()
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
    (tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz").touch()
    findings = by_subject(ws_doctor.check_datasets())
    assert "2 images" in findings["COCO train2017"].found
    assert findings["COCO train2017"].note == ""
    # images without annotations are of no use
    assert "instances_val2017.json" in findings["COCO val2017"].found
    assert findings["COCO val2017"].note
    assert "1 files" in findings["Fashion-MNIST"].found


def test_the_module_of_the_package_is_another_way_in() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ws_detectron.doctor"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "\ntraining can work\nnext:\n" in done.stdout, done.stderr
