"""Records: a study goes on where nothing but they are left."""

import hashlib
import json
import os
import runpy
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from ws_detectron.errors import ConfigError, UserError
from ws_detectron.lab.study import Options, Study, read_study_results, run_study
from ws_detectron.lab.study.cell_state import FAILED, FINISHED, RUNNING, is_finished, write_state
from ws_detectron.lab.study.cells import search_cells, study_cells
from ws_detectron.lab.study.records import FILES
from ws_detectron.lab.study.slurm import JOB

SEARCH = {"grid": {"SOLVER.BASE_LR": [0.02, 0.04]}, "images": 40, "batches": [4], "seed": 9}


Recorded = tuple[Study, Options, Path]


@pytest.fixture
def recorded(make_study, options: Options, tmp_path: Path) -> Recorded:
    """A study of one cell for each arm that has run, the options that it ran with, its records."""
    study, records = make_study(seeds=[1], batches=[4]), tmp_path / "records"
    kept = Options(options.train_net, records=records)
    run_study(study, kept, print)
    return study, kept, records


def report_of(results) -> list:
    return [(r.cell.name, r.word, r.ap, r.record, len(r.run.rows)) for r in results.cells]


def test_a_study_goes_on_from_its_records(make_study, options: Options, tmp_path: Path) -> None:
    study, records = make_study(search=SEARCH), tmp_path / "records"
    kept = Options(options.train_net, records=records, seeds=[1])
    run_study(study, kept, print)
    names = {path.name for path in records.iterdir()}
    assert (
        "bn_4img_seed1" in names and "search_gn_4img_BASE_LR_0.04" in names and len(names) == 4 + 4
    )
    # the stand-in writes no config
    files = {path.name for path in (records / "bn_4img_seed1").iterdir()}
    assert files == {*FILES} - {"config.yaml"}

    shutil.rmtree(study.output)
    lines: list[str] = []
    everything = run_study(study, Options(options.train_net, records=records), lines.append)
    assert any("4 finished cells taken from" in line for line in lines)
    assert [result.word for result in everything.cells] == ["finished"] * 8
    ran = {path.parent.name for path in study.output.glob("*/*/starts.txt")}
    assert ran == {f"{arm}_{batch}img_seed2" for arm in ("bn", "gn") for batch in (1, 4)}

    shutil.rmtree(study.output)
    again = run_study(study, Options(options.train_net, records=records), print)
    assert report_of(again) == report_of(everything)
    assert not [*study.output.glob("*/*/starts.txt")]


def test_failed_runs_of_a_search_are_recorded_and_failed_cells_are_not(
    make_study, options: Options, tmp_path: Path
) -> None:
    study, records = make_study(search=SEARCH), tmp_path / "records"
    lost = study.output / "search" / "gn_4img_BASE_LR_0.04"
    for folder in (lost, study.output / "cells" / "bn_4img_seed1"):
        folder.mkdir(parents=True)
        (folder / "fail").touch()
    kept = Options(options.train_net, records=records, seeds=[1])
    ran = run_study(study, kept, print)
    names = {path.name for path in records.iterdir()}
    assert len(names) == 4 + 3 and "bn_4img_seed1" not in names

    shutil.rmtree(study.output)
    again = run_study(study, kept, print)
    assert not (lost / "starts.txt").exists()
    assert [r.cell.choice for r in again.cells] == [r.cell.choice for r in ran.cells]
    assert (study.output / "cells" / "bn_4img_seed1" / "starts.txt").exists()


def test_data_may_lie_elsewhere_on_another_machine(
    make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ws_detectron.engine.prepare.register_coco_sets", absolute)
    study = make_study(overrides={"DATASETS.REGISTER": [["mine", "mine.json", "images"]]})
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        cell = study_cells(study, {})[0]
        assert cell.settings["DATASETS.REGISTER"][0][1] == str(tmp_path / place / "mine.json")
        if place == "one":
            write_state(cell, FINISHED)
    assert is_finished(cell)


def test_another_device_is_no_other_setting(make_study) -> None:
    on_cpu, on_gpu = (study_cells(make_study(device=d), {})[0] for d in ("cpu", "cuda"))
    assert on_cpu.settings["MODEL.DEVICE"] == "cpu" != on_gpu.settings["MODEL.DEVICE"]
    write_state(on_cpu, FINISHED)
    assert is_finished(on_gpu)
    write_state(on_cpu, RUNNING)  # its record would name the GPU alone
    with pytest.raises(ConfigError, match="DEVICE was 'cpu' and is 'cuda'.* --device it was begun"):
        is_finished(on_gpu)
    write_state(on_cpu, FAILED, lost=True)  # is tried again, from its checkpoint
    with pytest.raises(ConfigError, match="MODEL.DEVICE"):
        is_finished(on_gpu)
    on_cpu, on_gpu = (search_cells(make_study(search=SEARCH, device=d))[0] for d in ("cpu", "cuda"))
    write_state(on_cpu, FAILED, lost=True)  # is not
    assert not is_finished(on_gpu)


def absolute(entries: Sequence[list[str]]) -> list[list[str]]:
    """`register_coco_sets` on a machine that has not registered them yet."""
    return [[name, *map(os.path.abspath, paths)] for name, *paths in entries]


@pytest.mark.parametrize(
    "cause, reason", [("die", "killed by signal 9"), ("refuse", "no CUDA device was found")]
)
def test_a_run_of_a_search_that_did_not_diverge_has_not_lost(
    make_study, options: Options, tmp_path: Path, cause: str, reason: str
) -> None:
    """Its arm waits for it: without it, another LR could be chosen."""
    study, records = make_study(search=SEARCH), tmp_path / "records"
    killed = study.output / "search" / "gn_4img_BASE_LR_0.04"
    killed.mkdir(parents=True)
    (killed / cause).touch()
    kept = Options(options.train_net, records=records, seeds=[1])
    ran = run_study(study, kept, print)
    assert {r.cell.arm for r in ran.cells} == {"bn"}
    assert f"search_{killed.name}" not in {path.name for path in records.iterdir()}
    (state,) = [r.state for r in ran.search if r.cell.folder == killed]
    assert state and state.state == "failed" and reason in state.reason

    (killed / cause).unlink()
    again = run_study(study, kept, print)
    assert len((killed / "starts.txt").read_text().splitlines()) == 2
    assert [r.word for r in again.search] == ["finished"] * 4
    assert f"search_{killed.name}" in {path.name for path in records.iterdir()}
    assert {r.cell.choice["SOLVER.BASE_LR"] for r in again.cells if r.cell.arm == "gn"} == {0.04}


def test_a_report_needs_nothing_but_the_records(
    make_study, options: Options, tmp_path: Path
) -> None:
    study, records = make_study(search=SEARCH), tmp_path / "records"
    ran = run_study(study, Options(options.train_net, records=records, seeds=[1]), print)
    shutil.rmtree(study.output)
    found = read_study_results(study, records)
    assert report_of(found) == report_of(ran) and found.cells[0].word == "finished"
    assert [r.ap for r in found.search] == [r.ap for r in ran.search] != [{}] * 4
    assert not study.output.exists()


def tree(*folders: Path) -> dict[str, str]:
    """Path -> hash of every file; of a folder ""."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for folder in folders
        for path in folder.rglob("*")
    }


def test_reading_changes_no_file(
    make_study, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With cells that are finished in both places, in one of them, running, or nowhere."""
    study, records = make_study(search=SEARCH), tmp_path / "records"
    ran = run_study(study, Options(options.train_net, records=records, seeds=[1]), print)
    running = study.output / "cells" / "bn_4img_seed1"
    state = json.loads((running / "cell.json").read_text())
    (running / "cell.json").write_text(json.dumps({**state, "state": "running"}))
    (running / "model_0000001.pth").write_text("half of a run")
    shutil.rmtree(study.output / "cells" / "gn_1img_seed1")
    shutil.rmtree(records / "gn_4img_seed1")
    (study.output / "study.lock").unlink()
    before = tree(tmp_path)
    found = read_study_results(study, records)
    assert report_of(found) == report_of(ran)
    tool = str(Path(__file__).parents[3] / "tools" / "run_study.py")
    report = ["--report-only", "--records", str(records), "--report", str(tmp_path / "report")]
    monkeypatch.setattr("sys.argv", [tool, str(tmp_path / "study.yaml"), *report])
    with pytest.raises(SystemExit):  # seed 2 is missing
        runpy.run_path(tool, run_name="__main__")
    assert (tmp_path / "report" / "index.html").is_file()
    shutil.rmtree(tmp_path / "report")
    assert tree(tmp_path) == before


def test_cells_that_finished_before_are_recorded(
    make_study, options: Options, tmp_path: Path
) -> None:
    study, records = make_study(seeds=[1], batches=[4]), tmp_path / "records"
    run_study(study, options, print)
    assert not records.exists()
    run_study(study, Options(options.train_net, records=records), print)
    assert {path.name for path in records.iterdir()} == {"bn_4img_seed1", "gn_4img_seed1"}


def test_a_record_takes_the_place_of_what_is_unfinished(recorded: Recorded) -> None:
    study, kept, _ = recorded
    folder = study.output / "cells" / "bn_4img_seed1"
    state = json.loads((folder / "cell.json").read_text())
    (folder / "cell.json").write_text(json.dumps({**state, "state": "running"}))
    (folder / "metrics.json").write_text("")
    results = run_study(study, kept, print)
    assert len(results.cells[0].run.rows) == 21 and not (folder / "starts.txt").exists()


def test_a_record_does_not_take_the_folder_of_a_queued_job(recorded: Recorded) -> None:
    study, kept, records = recorded
    folder = study.output / "cells" / "bn_4img_seed1"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / JOB).write_text("17")
    with pytest.raises(UserError, match="is job 17"):
        run_study(study, kept, print)
    assert [path.name for path in folder.iterdir()] == [JOB]
    (folder / JOB).unlink()
    run_study(study, kept, print)
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in (records / folder.name).iterdir()
    }


def test_a_record_of_other_settings_is_refused(recorded: Recorded) -> None:
    study, kept, records = recorded
    shutil.rmtree(study.output)
    path = records / "bn_4img_seed1" / "cell.json"
    state = json.loads(path.read_text())
    state["settings"]["SOLVER.BASE_LR"] = 7
    path.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="records/bn_4img_seed1 holds .* SOLVER.BASE_LR was 7"):
        run_study(study, kept, print)
    assert not (study.output / "cells" / "bn_4img_seed1").exists()
