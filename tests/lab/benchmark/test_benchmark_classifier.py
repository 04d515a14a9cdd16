import stat
import sys
from pathlib import Path

import pytest
import torch

from ws_detectron.errors import UserError
from ws_detectron.lab.benchmark import classifier
from ws_detectron.lab.benchmark.benchmark_report import tables
from ws_detectron.lab.benchmark.classifier import measure_classifier

# Stands for an interpreter that has Keras: is ready, and answers every line.
STAND_IN = """#!{python}
import sys
with open("{log}", "a") as log:
    log.write(" ".join(sys.argv[2:]) + "\\n")
    print("{greeting}", flush=True)
    for _ in sys.stdin:
        log.write("run\\n")
        print(0.1, flush=True)
"""


def stand_in(folder: Path, greeting: str) -> str:
    path = folder / "python"
    path.write_text(STAND_IN.format(python=sys.executable, log=folder / "log", greeting=greeting))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_every_arm_is_timed_in_every_round_and_related_to_bn() -> None:
    part = measure_classifier(["bn", "gn_ws"], 4, "cpu", rounds=3, warmup=0, steps=2)
    assert {name: len(values) for name, values in part["seconds"].items()} == {"bn": 3, "gn_ws": 3}
    ratios = [a / b for a, b in zip(part["seconds"]["gn_ws"], part["seconds"]["bn"])]
    assert part["times_bn"]["gn_ws"]["median"] == pytest.approx(sorted(ratios)[1])
    assert part["times_keras"] == {}
    # 8 images take some milliseconds, 50,000 over a second
    assert all(value > 1 for values in part["seconds"].values() for value in values)


def test_compiled_is_related_to_compiled_bn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "compile_model", lambda model, device: model)
    part = measure_classifier(["bn", "gn"], 4, "cpu", rounds=2, warmup=0, steps=2, compiled=True)
    seconds = part["seconds"]
    ratios = [a / b for a, b in zip(seconds["gn, compiled"], seconds["bn, compiled"])]
    assert part["times_bn"]["gn, compiled"]["median"] == pytest.approx(sum(ratios) / 2)
    assert part["times_bn"]["bn, compiled"]["median"] == 1


def test_keras_runs_beside_it(tmp_path: Path) -> None:
    # bn and gn_ws have a scale and a shift for each of 704 channels
    python = stand_in(tmp_path, f"ready: keras 3 on a stand-in, {1_676_266 + 2 * 704} parameters")
    part = measure_classifier(
        ["bn", "gn_ws"], 4, "cpu", rounds=3, warmup=1, steps=2, keras_python=python
    )
    log = (tmp_path / "log").read_text().splitlines()
    assert log.count("run") == 2 * (1 + 3)
    assert f"--arm bn --batch-size 4 --threads {torch.get_num_threads()} --images 8" in log
    # 50,000 images at the 0.1 s that the stand-in says it took for 8
    assert part["seconds"]["bn, Keras"] == pytest.approx([625.0] * 3)
    assert set(part["times_keras"]) == {"bn", "gn_ws", "bn, Keras", "gn_ws, Keras"}
    table = tables({"kind": "classifier", "parts": [part]})
    assert "keras 3 on a stand-in" in table and "times the same arm in Keras" in table


def test_another_network_and_another_device_are_refused(tmp_path: Path) -> None:
    python = stand_in(tmp_path, "ready: keras 3 on a stand-in, 7 parameters")
    with pytest.raises(UserError, match="7 parameters'; ours has 1677674 parameters"):
        measure_classifier(["bn"], 4, "cpu", rounds=1, warmup=0, steps=1, keras_python=python)
    with pytest.raises(UserError, match="times Keras on the CPU; the device is cuda"):
        measure_classifier(["bn"], 4, "cuda", rounds=1, warmup=0, steps=1, keras_python=python)


def test_a_keras_that_ends_is_named(tmp_path: Path) -> None:
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\necho 'ready: keras, 1677674 parameters'\n")
    path.chmod(0o755)
    with pytest.raises(UserError, match="ended while it was timed"):
        measure_classifier(["bn"], 4, "cpu", rounds=1, warmup=0, steps=1, keras_python=str(path))


def test_an_interpreter_without_keras_is_named(tmp_path: Path) -> None:
    python = stand_in(tmp_path, "")
    with pytest.raises(UserError, match="needed there: pip install tensorflow-cpu"):
        measure_classifier(["bn"], 4, "cpu", rounds=1, warmup=0, steps=1, keras_python=python)
    with pytest.raises(UserError, match="cannot run .*/missing: No such file"):
        missing = str(tmp_path / "missing")
        measure_classifier(["bn"], 4, "cpu", rounds=1, warmup=0, steps=1, keras_python=missing)
