"""Training runs locally: skipped, resumed, failing, at the same time, stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Optional

import pytest

from ws_detectron.errors import ConfigError, UserError
from ws_detectron.lab.study import (
    Options,
    StudyResults,
    read_study_results,
    run_study,
    search_runs,
    study_runs,
)
from ws_detectron.lab.study.records import (
    FAILED,
    FINISHED,
    RUNNING,
    read_result,
    read_state,
    write_state,
)
from ws_detectron.lab.study.report import problems_of
from ws_detectron.lab.study.runner import commands
from ws_detectron.lab.study.workers import (
    Progress,
    RunJob,
    _ended_by_signals,
    environments,
    failure_reason,
    study_lock,
)

ONE = {"seeds": [1], "batches": [4]}


def starts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "starts.txt").read_text().splitlines()]


def test_all_runs_run_and_finished_ones_are_skipped(make_study, options: Options) -> None:
    study = make_study()
    lines: list[str] = []
    results = run_study(study, options, lines.append)
    assert [result.status for result in results.runs] == ["finished"] * 8
    folder = study.output / "runs" / "bn_4img_seed1"
    assert starts(folder)[0]["resume"] and len(starts(folder)) == 1
    assert any("[8/8]" in line and "finished in" in line for line in lines)

    again: list[str] = []
    run_study(study, options, again.append)
    assert len(starts(folder)) == 1
    assert any("8 of 8 runs are finished already" in line for line in again)


def test_a_failing_run_is_named_and_the_others_run(make_study, options: Options) -> None:
    study = make_study(**ONE)
    folder = study.output / "runs" / "bn_4img_seed1"
    folder.mkdir(parents=True)
    (folder / "fail").touch()
    lines: list[str] = []
    results = run_study(study, options, lines.append)
    assert [result.status for result in results.runs] == ["diverged", "finished"]
    state = results.runs[0].record
    assert state and state.reason == (
        "training diverged at iteration 3: loss_mask is nan (exit status 3)"
    )
    assert any("bn_4img_seed1 DIVERGED: training diverged" in line for line in lines)

    (folder / "fail").unlink()  # it is tried again
    results = run_study(study, options, lines.append)
    assert [result.status for result in results.runs] == ["finished", "finished"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_study_that_was_killed_resumes(make_study, options: Options, number: int) -> None:
    """SIGTERM and SIGHUP end the run too; after SIGKILL it continues and keeps the study locked."""
    study = make_study(**ONE)
    (run, other) = study_runs(study, {})
    run.folder.mkdir(parents=True)
    (run.folder / "hang").touch()
    script = (
        "import sys\nimport ws_detectron.lab.scenes\n"
        "from ws_detectron.lab.study import Options, read_study, run_study\n"
        "run_study(read_study(sys.argv[1]), Options(), print)\n"
    )
    job = [sys.executable, "-c", script, str(study.output.parent / "study.yaml")]
    runner = subprocess.Popen(job, stdout=subprocess.DEVNULL)
    try:
        while not (run.folder / "starts.txt").is_file():
            assert runner.poll() is None
            time.sleep(0.05)
        with pytest.raises(UserError, match="is being worked on"):
            run_study(study, options, print)
        runner.send_signal(number)
        assert runner.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
        state = read_state(run)
        assert state and state.state == "running"
        if number == signal.SIGKILL:
            with pytest.raises(UserError, match="is being worked on"):
                run_study(study, options, print)
        else:  # nobody holds the lock that the run has inherited
            with study_lock(study.output):
                pass
    finally:
        runner.kill()
        (run.folder / "hang").unlink()
    while True:
        try:
            results = run_study(study, options, print)
            break
        except UserError:
            time.sleep(0.05)  # the run is about to end
    assert [result.status for result in results.runs] == ["finished", "finished"]
    assert len(starts(run.folder)) == 2 and len(starts(other.folder)) == 1


def test_nohup_keeps_a_study_from_ending() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_settings_in_the_same_folder_are_refused(make_study, options: Options) -> None:
    run_study(make_study(**ONE), options, print)
    with pytest.raises(ConfigError, match="SOLVER.WEIGHT_DECAY was 0.0001 and is 0.1"):
        run_study(make_study(**ONE, overrides={"SOLVER.WEIGHT_DECAY": 0.1}), options, print)


def test_runs_train_at_the_same_time(make_study, options: Options) -> None:
    """Each waits until the other has begun, so one after another they would never end."""
    study = make_study(**ONE)
    folders = [study.output / "runs" / f"{variant}_4img_seed1" for variant in ("bn", "gn")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "hang").touch()

    def say(line: str) -> None:
        if "gn_4img_seed1 begins" in line:
            for folder in folders:
                (folder / "hang").unlink()

    results = run_study(study, replace(options, jobs=2), say)
    assert [result.status for result in results.runs] == ["finished"] * 2


def test_a_search_goes_first_and_its_choice_is_used(make_study, options: Options) -> None:
    """The stand-in is best at 0.005 per image: 0.04 at the config's 8 images."""
    search = {"grid": {"SOLVER.BASE_LR": [0.02, 0.04, 0.08]}, "images": 40, "batches": [4]}
    study = make_study(**ONE, search=search)
    folder = study.output / "search" / "gn_4img_BASE_LR_0.04"
    folder.mkdir(parents=True)
    (folder / "fail").touch()  # so gn cannot choose 0.04
    results = run_study(study, options, print)
    assert len(results.search) == 6
    expected = {"bn": pytest.approx(0.02), "gn": pytest.approx(0.01)}
    assert lrs(results) == expected

    (folder / "fail").unlink()  # it diverged: runs with another LR are finished
    results = run_study(study, options, print)
    assert lrs(results) == expected and [r.status for r in results.runs] == ["finished"] * 2
    assert len(starts(folder)) == 1


def lrs(results: StudyResults) -> dict[str, float]:
    return {result.run.variant: result.run.settings["SOLVER.BASE_LR"] for result in results.runs}


def test_a_search_all_of_which_diverged_is_named(make_study, options: Options) -> None:
    """It is tried again once its folders are deleted."""
    search = {"grid": {"SOLVER.BASE_LR": [0.02, 0.04]}, "images": 40, "batches": [4]}
    study = make_study(**ONE, search=search)
    folders = [study.output / "search" / f"gn_4img_BASE_LR_{lr}" for lr in (0.02, 0.04)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "fail").touch()
    for _ in range(2):
        results = run_study(study, options, print)
        assert [*lrs(results)] == ["bn"]
        assert any("for GN at 4 images found nothing: all" in text for text in problems_of(results))
    for folder in folders:
        assert len(starts(folder)) == 1
        shutil.rmtree(folder)
    assert [*lrs(run_study(study, options, print))] == ["bn", "gn"]


def test_nothing_is_chosen_before_a_search_has_ended(make_study, options: Options) -> None:
    search = {"grid": {"SOLVER.BASE_LR": [0.02, 0.04]}, "images": 40, "batches": [4]}
    study = make_study(**ONE, search=search)
    run_study(study, options, print)
    write_state(search_runs(study)[0], RUNNING)  # as if it had been killed
    results = read_study_results(study)
    assert [*lrs(results)] == ["gn"]
    assert any("for BN at 4 images has not ended" in text for text in problems_of(results))
    said = commands(study, options)
    assert (
        said[-1] == "# bn: the search has not found its values yet" and len(said) == 2 + 4 + 1 + 1
    )


def test_only_selected_runs_are_trained(make_study, options: Options) -> None:
    study = make_study()
    results = run_study(study, replace(options, variants=["gn"], batches=[1], seeds=[2]), print)
    assert [r.run.name for r in results.runs if r.record] == ["gn_1img_seed2"]
    with pytest.raises(UserError, match="--variants has ln; the study has bn, gn"):
        run_study(study, replace(options, variants=["ln"]), print)


@pytest.mark.parametrize(
    "keep, kept",
    [
        (None, {"model_final", "model_best"}),
        ("all", {"model_0000004", "model_final", "model_best"}),
        ("none", set()),
    ],
)
def test_checkpoints_of_finished_runs(make_study, options: Options, keep: str, kept: set) -> None:
    study = make_study(**ONE, checkpoints=keep)
    failing = study.output / "runs" / "gn_4img_seed1"
    failing.mkdir(parents=True)
    (failing / "fail").touch()
    (failing / "model_0000001.pth").touch()
    run_study(study, options, print)
    finished = study.output / "runs" / "bn_4img_seed1"
    assert {path.stem for path in finished.glob("*.pth")} == kept
    assert (finished / "last_checkpoint").exists() == bool(kept)
    assert (failing / "model_0000001.pth").exists()


@pytest.mark.parametrize("keep", ["last", "none"])
def test_a_run_is_finished_before_its_checkpoints_go(
    make_study, options: Options, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    """Ctrl-C may come between any two of these steps."""
    (run, _) = study_runs(make_study(**ONE, checkpoints=keep), {})

    def interrupt(path: Path) -> None:
        assert not (path.parent / "last_checkpoint").exists() or keep == "last"
        raise KeyboardInterrupt

    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda p: interrupt(p) if p.suffix == ".pth" else unlink(p))
    with pytest.raises(KeyboardInterrupt):
        RunJob()(run)
    state = read_state(run)
    assert state and state.state == "finished"


def test_several_processes_are_asked_for(make_study, options: Options) -> None:
    study = make_study(**ONE, processes=2)
    run_study(study, options, print)
    run = study_runs(study, {})[0]
    assert starts(run.folder)[0]["processes"] == 2
    line = run.command
    assert line[line.index("--dist-url") + 1] == "auto"


def test_cpu_runs_share_the_cores(make_study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    # two runs of 4 cores; train_net.py gives each of a run's processes its share of them
    assert environments(make_study(processes=2), 2, None) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert environments(make_study(), 99, None)[0] == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environments(make_study(), 2, None) == [{}, {}]
    with pytest.raises(UserError, match="--gpus was given, but the study is for the CPU"):
        environments(make_study(), 1, [0])


@pytest.mark.parametrize(
    "visible, jobs, processes, gpus, expected",
    [
        (None, 2, 2, [4, 5, 6, 7], ["4,5", "6,7"]),
        (None, 3, 1, [0, 0, 1], ["0", "0", "1"]),  # small runs may share a GPU
        (None, 2, 2, [0, 1, 0, 1], ["0,1", "0,1"]),
        (None, 2, 1, None, ["0", "1"]),
        ("4,5", 2, 1, None, ["4", "5"]),
        ("GPU-8f,GPU-9c", 2, 1, None, ["GPU-8f", "GPU-9c"]),
        ("4,5", 1, 1, [7], ["7"]),
        (None, 2, 2, [0, 1, 2], "--jobs 2 with 2 .* need 4 GPUs; there are 3 .*0, 1, 2"),
        (None, 1, 1, [], "need 1 GPUs; there are 0 .*none"),
        (None, 2, 2, [0, 1, 0, 0], "--gpus gives a run 0, 0; its 2 processes need a GPU"),
    ],
)
def test_gpu_runs_get_their_own(
    make_study,
    monkeypatch: pytest.MonkeyPatch,
    visible: Optional[str],
    jobs: int,
    processes: int,
    gpus: Optional[list[int]],
    expected,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    study = make_study(device="cuda", processes=processes)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            environments(study, jobs, gpus)
    else:
        found = environments(study, jobs, gpus)
        assert [environ["CUDA_VISIBLE_DEVICES"] for environ in found] == expected


def test_lock_is_for_one_at_a_time(tmp_path: Path) -> None:
    with study_lock(tmp_path / "study"):
        with pytest.raises(UserError, match="is being worked on"), study_lock(tmp_path / "study"):
            pass
    with study_lock(tmp_path / "study"):
        pass


def test_failure_reason(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert failure_reason(path) == "it wrote nothing"
    path.write_text("starting\nerror: no memory\nclean-up\n\n")
    assert failure_reason(path) == "no memory"
    path.write_text("starting\nRuntimeError: x\n\n")
    assert failure_reason(path) == "RuntimeError: x"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def progress(runs: list, workers: Optional[int] = 1) -> Progress:
    results = [read_result(run, {}) for run in runs]
    return Progress(results, workers, lambda line: None)


def test_time_left_is_that_of_the_runs_of_the_same_batch(make_study, clock: list[float]) -> None:
    """Runs of 80 images: at batch 4 40 s, at batch 1 not known yet, then 160 s."""
    runs = study_runs(make_study(), {})
    large = [run for run in runs if run.batch == 4]
    small = [run for run in runs if run.batch == 1]
    watched = progress(runs)
    assert watched.seconds_left() is None
    write_state(large[0], FINISHED, seconds=40.0)
    watched.ended(large[0])
    assert watched.seconds_left() == pytest.approx(7 * 40)
    write_state(small[0], FINISHED, seconds=160.0)
    watched.ended(small[0])
    assert watched.seconds_left() == pytest.approx(3 * 40 + 3 * 160)
    watched.began(small[1])
    clock[0] += 100
    assert watched.seconds_left() == pytest.approx(3 * 40 + 2 * 160 + 60)
    clock[0] += 1000
    assert watched.seconds_left() == pytest.approx(3 * 40 + 2 * 160)
    assert progress(runs, workers=2).seconds_left() == pytest.approx(300)
    assert progress(runs, workers=None).seconds_left() is None


def test_failed_and_resumed_runs_do_not_count_for_the_speed(make_study) -> None:
    """The seconds of resumed ones are those of the last start alone."""
    failed, resumed, finished, *_ = runs = study_runs(make_study(), {})
    watched = progress(runs)
    write_state(failed, FAILED, reason="no", seconds=1.0)
    watched.ended(failed)
    write_state(resumed, FINISHED, seconds=4.0)
    (resumed.folder / "run_record.json").write_text('{"starts": 2}')
    watched.ended(resumed)
    assert watched.seconds_left() is None
    write_state(finished, FINISHED, seconds=40.0)
    watched.ended(finished)
    assert watched.seconds_left() == pytest.approx(5 * 40)
