"""Records: a study continues from them, without the folders of its runs."""

import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Optional

import pytest
from small_study import reach

from ws_detectron.errors import ConfigError
from ws_detectron.evaluation.coco_eval import TASKS
from ws_detectron.lab.study import Options, Study, read_study_results, run_study
from ws_detectron.lab.study.plan import StudyRun, search_runs, study_runs
from ws_detectron.lab.study.records import (
    DIVERGED,
    FAILED,
    FINISHED,
    LOCK,
    RUNNING,
    Record,
    add_records,
    choose,
    final_scores,
    read_records,
    read_result,
    read_state,
    write_records,
    write_state,
)
from ws_detectron.lab.study.report import at_the_edge
from ws_detectron.lab.study.workers import JOB

SEARCH = {"grid": {"SOLVER.BASE_LR": [0.02, 0.04]}, "images": 40, "batches": [4], "seed": 9}


Recorded = tuple[Study, Options, Path]


@pytest.fixture
def recorded(make_study, options: Options, tmp_path: Path) -> Recorded:
    """A finished study of one run per variant, the options that it ran with, its records."""
    study, records = make_study(seeds=[1], batches=[4]), tmp_path / "records"
    kept = Options(records=records)
    run_study(study, kept, print)
    return study, kept, records


def is_finished(run: StudyRun) -> bool:
    state = read_state(run)
    return state is not None and state.state == FINISHED


def report_of(results) -> list:
    return [(r.run.name, r.scores, r.record) for r in results.runs]


def test_a_study_continues_from_its_records(make_study, options: Options, tmp_path: Path) -> None:
    study, records = make_study(search=SEARCH), tmp_path / "records"
    kept = Options(records=records, seeds=[1])
    run_study(study, kept, print)
    names = read_records(records).keys()
    assert {"bn_4img_seed1", "search_gn_4img_BASE_LR_0.04"} <= names and len(names) == 4 + 4
    assert {path.name for path in records.iterdir()} == {"runs.jsonl", "metrics.csv", LOCK}

    shutil.rmtree(study.output)
    lines: list[str] = []
    everything = run_study(study, Options(records=records), lines.append)
    assert any("4 runs taken from" in line for line in lines)
    assert [result.status for result in everything.runs] == ["finished"] * 8
    ran = {path.parent.name for path in study.output.glob("*/*/starts.txt")}
    assert ran == {f"{variant}_{batch}img_seed2" for variant in ("bn", "gn") for batch in (1, 4)}

    shutil.rmtree(study.output)  # a report needs nothing but the records
    found = read_study_results(study, records)
    assert report_of(found) == report_of(everything) and not study.output.exists()
    assert [r.scores for r in found.search] == [r.scores for r in everything.search] != [{}] * 4
    assert report_of(run_study(study, Options(records=records), print)) == report_of(everything)
    assert not [*study.output.glob("*/*/starts.txt")]


def test_failed_runs_of_a_search_are_recorded_and_failed_runs_are_not(
    make_study, options: Options, tmp_path: Path
) -> None:
    study, records = make_study(search=SEARCH), tmp_path / "records"
    lost = study.output / "search" / "gn_4img_BASE_LR_0.04"
    for folder in (lost, study.output / "runs" / "bn_4img_seed1"):
        folder.mkdir(parents=True)
        (folder / "fail").touch()
    kept = Options(records=records, seeds=[1])
    ran = run_study(study, kept, print)
    names = read_records(records).keys()
    assert len(names) == 4 + 3 and "bn_4img_seed1" not in names

    shutil.rmtree(study.output)
    again = run_study(study, kept, print)
    assert not (lost / "starts.txt").exists()
    assert [r.run.choice for r in again.runs] == [r.run.choice for r in ran.runs]
    assert (study.output / "runs" / "bn_4img_seed1" / "starts.txt").exists()


def test_data_may_be_stored_elsewhere_on_another_machine(
    make_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ws_detectron.engine.prepare.register_coco_sets", absolute)
    study = make_study(overrides={"DATASETS.REGISTER": [["mine", "mine.json", "images"]]})
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        run = study_runs(study, {})[0]
        assert run.settings["DATASETS.REGISTER"][0][1] == str(tmp_path / place / "mine.json")
        if place == "one":
            write_state(run, FINISHED)
    assert is_finished(run)


def test_another_device_is_no_other_setting(make_study) -> None:
    on_cpu, on_gpu = (study_runs(make_study(device=d), {})[0] for d in ("cpu", "cuda"))
    assert on_cpu.settings["MODEL.DEVICE"] == "cpu" != on_gpu.settings["MODEL.DEVICE"]
    write_state(on_cpu, FINISHED)
    assert is_finished(on_gpu)
    write_state(on_cpu, RUNNING)  # its record would name the GPU alone
    with pytest.raises(ConfigError, match="DEVICE was 'cpu' and is 'cuda'.* --device it was begun"):
        is_finished(on_gpu)
    write_state(on_cpu, DIVERGED)  # is tried again, from its checkpoint
    with pytest.raises(ConfigError, match="MODEL.DEVICE"):
        is_finished(on_gpu)
    on_cpu, on_gpu = (search_runs(make_study(search=SEARCH, device=d))[0] for d in ("cpu", "cuda"))
    write_state(on_cpu, DIVERGED)  # is not
    assert not is_finished(on_gpu)
    write_state(on_cpu, FAILED)  # is
    with pytest.raises(ConfigError, match="MODEL.DEVICE"):
        is_finished(on_gpu)


def absolute(entries: Sequence[list[str]]) -> list[list[str]]:
    """`register_coco_sets` on a machine that has not registered them yet."""
    return [[name, *map(os.path.abspath, paths)] for name, *paths in entries]


@pytest.mark.parametrize(
    "cause, reason", [("die", "killed by signal 9"), ("refuse", "no CUDA device was found")]
)
def test_a_run_of_a_search_that_did_not_diverge_is_tried_again(
    make_study, options: Options, tmp_path: Path, cause: str, reason: str
) -> None:
    """Its variant is not trained before it has ended, as the choice may depend on it."""
    study, records = make_study(search=SEARCH), tmp_path / "records"
    killed = study.output / "search" / "gn_4img_BASE_LR_0.04"
    killed.mkdir(parents=True)
    (killed / cause).touch()
    kept = Options(records=records, seeds=[1])
    ran = run_study(study, kept, print)
    assert {r.run.variant for r in ran.runs} == {"bn"}
    assert f"search_{killed.name}" not in read_records(records)
    (state,) = [r.record for r in ran.search if r.run.folder == killed]
    assert state and state.state == "failed" and reason in state.reason

    (killed / cause).unlink()
    again = run_study(study, kept, print)
    assert len((killed / "starts.txt").read_text().splitlines()) == 2
    assert [r.status for r in again.search] == ["finished"] * 4
    assert f"search_{killed.name}" in read_records(records)
    assert {r.run.choice["SOLVER.BASE_LR"] for r in again.runs if r.run.variant == "gn"} == {0.04}


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
    """With runs that are finished in both places, in one of them, running, or nowhere."""
    study, records = make_study(search=SEARCH), tmp_path / "records"
    ran = run_study(study, Options(records=records, seeds=[1]), print)
    running = study.output / "runs" / "bn_4img_seed1"
    state = json.loads((running / "run.json").read_text())
    (running / "run.json").write_text(json.dumps({**state, "state": "running"}))
    (running / "model_0000001.pth").write_text("half of a run")
    shutil.rmtree(study.output / "runs" / "gn_1img_seed1")
    kept = read_records(records)
    write_records(records, "t", {k: v for k, v in kept.items() if k != "gn_4img_seed1"})
    (study.output / "study.lock").unlink()
    before = tree(tmp_path)
    found = read_study_results(study, records)
    assert report_of(found) == report_of(ran)
    tool = str(Path(__file__).parents[3] / "tools" / "run_study.py")
    report = ["--report-only", "--records", str(records), "--report", str(tmp_path / "report")]
    monkeypatch.setattr("sys.argv", [tool, str(tmp_path / "study.yaml"), *report])
    with pytest.raises(SystemExit):  # seed 2 is missing
        runpy.run_path(tool, run_name="__main__")
    assert (tmp_path / "report" / "report.md").is_file()
    shutil.rmtree(tmp_path / "report")
    assert tree(tmp_path) == before


def test_runs_that_finished_before_are_recorded(
    make_study, options: Options, tmp_path: Path
) -> None:
    study, records = make_study(seeds=[1], batches=[4]), tmp_path / "records"
    run_study(study, options, print)
    assert not records.exists()
    run_study(study, Options(records=records), print)
    assert read_records(records).keys() == {"bn_4img_seed1", "gn_4img_seed1"}


def test_a_record_takes_the_place_of_what_is_unfinished(recorded: Recorded) -> None:
    study, kept, _ = recorded
    folder = study.output / "runs" / "bn_4img_seed1"
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**state, "state": "running"}))
    (folder / "metrics.json").write_text("")
    results = run_study(study, kept, print)
    assert results.runs[0].status == "finished" and len(results.runs[0].record.rows) == 21
    assert len((folder / "starts.txt").read_text().splitlines()) == 1


def test_a_recorded_run_leaves_a_queued_job_alone(recorded: Recorded) -> None:
    study, kept, _ = recorded
    folder = study.output / "runs" / "bn_4img_seed1"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / JOB).write_text("17")
    assert [r.status for r in run_study(study, kept, print).runs] == ["finished"] * 2
    assert [path.name for path in folder.iterdir()] == [JOB]


def test_a_record_of_other_settings_is_refused(recorded: Recorded) -> None:
    study, kept, records = recorded
    shutil.rmtree(study.output)
    found = read_records(records)
    found["bn_4img_seed1"].settings["SOLVER.BASE_LR"] = 7
    write_records(records, "t", found)
    with pytest.raises(ConfigError, match="record of bn_4img_seed1 holds .* SOLVER.BASE_LR was 7"):
        run_study(study, kept, print)
    assert not (study.output / "runs" / "bn_4img_seed1").exists()


def record(rows: list, **settings: object) -> Record:
    return Record(FINISHED, settings, "", 1 / 3, rows, {"starts": 1})


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Every type and digit; settings that another run lacks, or has as another type."""
    rows = [
        {"iteration": 19, "a": 0.1 + 0.2, "whole": 3, "point": 3.0, "tiny": 5e-324},
        {"iteration": 19, "a": float("nan"), "b/c d": float("-inf")},
        {"iteration": 20, "text": 'x, "y"', "flag": True, "nothing": None},
    ]
    written = {
        "one": record(rows, same=[1, [2.0]], SEED=1, alone=""),
        "two": record([], same=[1, [2.0]], SEED=1.0),
        "three": record(rows[:1], same=[1, [2.0]], SEED=True),
    }
    write_records(tmp_path, "A study", written)
    first, *lines = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert (first["title"], first["settings"]) == ("A study", {"same": [1, [2.0]]})
    assert lines[0]["settings"] == {"SEED": 1, "alone": ""}
    texts = (
        {name: json.dumps(asdict(found), sort_keys=True) for name, found in records.items()}
        for records in (read_records(tmp_path), written)
    )
    assert next(texts) == next(texts)
    header, *table = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == "run,iteration,a,b/c d,flag,nothing,point,text,tiny,whole"
    assert len(table) == 4 and table[1] == "one,19,NaN,-Infinity,,,,,,"


@pytest.mark.parametrize("writes", [0, 1])
def test_a_kill_between_writes_leaves_whole_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Of the two files, none or the first is new."""
    before = {"one": record([{"iteration": 1, "x": 0.5}], SEED=1)}
    write_records(tmp_path, "t", before)
    replace, done = os.replace, iter(range(9))

    def killed(*paths: str) -> None:
        if next(done) == writes:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            add_records(tmp_path, "t", {"two": record([{"iteration": 1, "y": 2.5}], SEED=2)})
    assert {path.name for path in tmp_path.iterdir()} == {"runs.jsonl", "metrics.csv", LOCK}
    assert read_records(tmp_path) == before
    again = {"two": record([{"iteration": 1, "y": 2.5}], SEED=2)}
    add_records(tmp_path, "t", again)
    assert read_records(tmp_path) == {**before, **again}


def test_processes_that_record_at_once_wait_for_each_other(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from ws_detectron.lab.study.records import Record, add_records\n"
        "folder, mine, other = Path(sys.argv[1]), *sys.argv[2:]\n"
        "(folder / mine).touch()\n"
        "while not (folder / other).exists(): time.sleep(0.001)\n"
        "for i in range(20):\n"
        "    record = Record('finished', {'SEED': i}, rows=[{'iteration': i}])\n"
        "    add_records(folder, 't', {f'{mine}{i}': record})\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    writers = [subprocess.Popen([*command, *names]) for names in ("ab", "ba")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert read_records(tmp_path).keys() == {f"{name}{i}" for name in "ab" for i in range(20)}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("runs.jsonl", "{}", "runs.jsonl cannot be read: KeyError: 'format'"),
        ("runs.jsonl", '{"format": 9}', "has format 9; allowed: 1"),
        ("runs.jsonl", "<<<<<<< HEAD", "runs.jsonl cannot be read: JSONDecodeError"),
        ("metrics.csv", "run,x\none,abc\n", "metrics.csv cannot be read: JSONDecodeError"),
        ("metrics.csv", None, "metrics.csv cannot be read: FileNotFoundError"),
        ("metrics.csv", "run,iteration\n", "metrics.csv has 0 of 1 rows of one; restore it"),
    ],
)
def test_damaged_records_are_named(
    tmp_path: Path, name: str, text: Optional[str], message: str
) -> None:
    write_records(tmp_path, "t", {"one": record([{"iteration": 1}], SEED=1)})
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_records(tmp_path)


def test_only_finished_runs_count(make_study) -> None:
    new, failed, running, *_ = study_runs(make_study(), {})
    write_state(failed, FAILED, reason="it broke")
    reach(failed.folder, 50.0)
    write_state(running, RUNNING)
    reach(running.folder, 50.0)
    found = [read_result(run, {}) for run in (new, failed, running)]
    assert [result.scores for result in found] == [{}, {}, {}]
    assert [result.status for result in found] == ["not started", "failed", "running"]
    assert found[1].notes == ("FAILED: it broke",)


NAN = float("nan")


@pytest.mark.parametrize(
    "rows, scores, note",
    [
        # the last evaluation counts, and not the best
        ([{"bbox/AP": 50.0, "segm/AP": 50.0}, {"bbox/AP": 40.0, "segm/AP": 30.0}], (40, 30), ""),
        # a detector that finds nothing has an AP of 0: detectron2 then writes NaN for boxes and
        # leaves masks out, whatever it found earlier
        ([{"bbox/AP": 5.0, "segm/AP": 5.0}, {"bbox/AP": NAN}], (0, 0), "detects nothing"),
        ([{"total_loss": 1.0}], (), "never evaluated"),
    ],
)
def test_final_scores(make_study, rows: list, scores: tuple, note: str) -> None:
    rows = [{"iteration": 10 * i + 9, **row} for i, row in enumerate(rows)]
    found, notes = final_scores(study_runs(make_study(), {})[0], rows)
    assert found == dict(zip(("bbox/AP", "segm/AP"), scores))
    assert len(notes) == bool(note) and note in "".join(notes)


def test_rows_of_a_record_are_merged_and_the_first_of_several_test_sets_counts(make_study) -> None:
    sets = ["scenes_shapes_128_val", "scenes_shapes_128_train"]
    study = make_study(overrides={"DATASETS.TRAIN": sets[1:], "DATASETS.TEST": sets})
    (run, *_) = study_runs(study, {})
    evaluated = {f"{name}/{task}/AP": 5.0 + n for n, name in enumerate(sets) for task in TASKS}
    rows = [{"iteration": 19, "total_loss": 1.0}, {"iteration": 19, **evaluated}]
    result = read_result(run, {run.name: Record(FINISHED, run.settings, rows=rows)})
    assert result.scores == {"bbox/AP": 5.0, "segm/AP": 5.0}
    assert [row["total_loss"] for row in result.record.rows] == [1.0]


def test_resumed_runs_are_as_the_others(make_study) -> None:
    (run, *_) = study_runs(make_study(), {})
    write_state(run, FINISHED)
    reach(run.folder, 5.0)
    (run.folder / "run_record.json").write_text(json.dumps({"starts": 3}))
    result = read_result(run, {})
    assert result.notes == () and result.starts == 3


def test_search_takes_the_best_mean_of_box_and_mask_ap(make_study) -> None:
    grid = {"SOLVER.BASE_LR": [0.04, 0.01, 0.02], "SOLVER.WEIGHT_DECAY": [0.0, 0.1]}
    study = make_study(search={"grid": grid, "images": 40, "batches": [4]})
    runs = search_runs(study)
    assert choose([read_result(run, {}) for run in runs]) == {
        ("bn", 4): None,
        ("gn", 4): None,
    }
    for run in runs:
        if run.variant == "bn":
            write_state(run, FINISHED)
            lr, decay = run.choice.values()
            reach(run.folder, 100 * lr + 10 * decay)
    bad = {"SOLVER.BASE_LR": 0.04, "SOLVER.WEIGHT_DECAY": 0.1}
    (diverged,) = (run for run in runs if run.variant == "bn" and run.choice == bad)
    write_state(diverged, DIVERGED, reason="diverged")
    choices = choose([read_result(run, {}) for run in runs])
    # 0.04 with 0.1 would be best, but failed: 4.0 at (0.04, 0) against 3.0 at (0.02, 0.1)
    expected = {"SOLVER.BASE_LR": 0.04, "SOLVER.WEIGHT_DECAY": 0.0}
    assert choices == {("bn", 4): expected, ("gn", 4): None}
    # of two values, each is at the edge
    assert at_the_edge(study.search, expected) == ["SOLVER.BASE_LR"]
    assert at_the_edge(study.search, {**expected, "SOLVER.BASE_LR": 0.02}) == []
