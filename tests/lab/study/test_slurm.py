"""submitit's local executor in place of Slurm: the same jobs, without a queue."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ws_detectron.errors import UserError
from ws_detectron.lab.study import Options, study_runs
from ws_detectron.lab.study.records import FINISHED, RUNNING, read_result, read_state, write_state
from ws_detectron.lab.study.workers import JOB, Progress, RunJob, _note_failure, run_on_slurm

submitit = pytest.importorskip("submitit", reason="--launcher slurm needs the package submitit")
ONE = {"seeds": [1], "batches": [4]}


def submit(study, options: Options, cluster: str = "local") -> list[str]:
    results, lines = [read_result(run, {}) for run in study_runs(study, {})], []
    run_on_slurm(
        [result.run for result in results if result.status != FINISHED],
        study.slurm,
        study.output / "submitit",
        Progress(results, 1, lines.append),
        cluster=cluster,
        poll_seconds=0.1,
    )
    return lines


def test_runs_are_jobs_and_a_failing_one_is_named(make_study, options: Options) -> None:
    study = make_study(**ONE, slurm={"timeout_min": 5})
    bn, gn = study_runs(study, {})
    bn.folder.mkdir(parents=True)
    (bn.folder / "fail").touch()
    lines = submit(study, options)
    failed, finished = (read_result(run, {}) for run in (bn, gn))
    assert finished.scores["bbox/AP"] == pytest.approx(101)
    assert failed.record and "diverged" in failed.record.reason
    assert any("bn_4img_seed1 DIVERGED" in line for line in lines)
    assert not (gn.folder / JOB).exists()

    (bn.folder / "fail").unlink()
    submit(study, options)
    assert [read_result(run, {}).status for run in (bn, gn)] == ["finished", "finished"]
    assert len((gn.folder / "starts.txt").read_text().splitlines()) == 1


def test_a_job_that_is_cut_short_is_submitted_again_as_it_is(make_study, options: Options) -> None:
    (run, _) = study_runs(make_study(**ONE), {})
    again = RunJob().checkpoint(run)
    assert isinstance(again.function, RunJob) and again.args == (run,)


def test_a_job_in_the_queue_is_not_submitted_twice(
    make_study, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(**ONE)
    bn, gn = study_runs(study, {})
    write_state(gn, FINISHED, seconds=1.0)
    bn.folder.mkdir(parents=True)
    (bn.folder / JOB).write_text("12345")

    class Queued:
        """A job that an earlier call has submitted; it ends at the third query."""

        looks = 0

        def __init__(self, folder: Path, job_id: str) -> None:
            assert job_id == "12345"

        def done(self) -> bool:
            Queued.looks += 1
            return Queued.looks >= 3

        def exception(self) -> None:
            write_state(bn, FINISHED, seconds=2.0)

    monkeypatch.setattr(submitit, "LocalJob", Queued)
    submit(study, options)
    assert Queued.looks == 3 and not (bn.folder / "starts.txt").exists()
    assert not (gn.folder / "starts.txt").exists()


def test_a_finished_run_stays_so_when_its_job_fails_afterwards(
    make_study, options: Options
) -> None:
    """A node may fail between the end of the training and the end of the job."""

    (bn, gn) = study_runs(make_study(**ONE), {})
    write_state(bn, FINISHED, seconds=1.0)
    write_state(gn, RUNNING)
    for run in (bn, gn):
        _note_failure(run, RuntimeError("job 12345 has no result"))
    finished, failed = read_state(bn), read_state(gn)
    assert finished and finished.state == FINISHED
    assert failed and (failed.state, failed.reason) == ("failed", "job 12345 has no result")


@pytest.mark.skipif(shutil.which("srun") is not None, reason="needs a machine without Slurm")
def test_without_slurm_it_says_so(make_study, options: Options) -> None:
    with pytest.raises(UserError, match="--launcher slurm cannot submit jobs here"):
        submit(make_study(**ONE), options, cluster="slurm")


def test_a_refused_job_is_named(
    make_study, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, *args: object) -> None:
        raise submitit.core.utils.FailedJobError("sbatch: error: invalid partition specified: gpus")

    monkeypatch.setattr(submitit.AutoExecutor, "submit", refuse)
    with pytest.raises(UserError, match="bn_4img_seed1 could not be .* partition specified: gpus"):
        submit(make_study(**ONE), options)


def test_unknown_parameters_are_named(make_study, options: Options) -> None:
    with pytest.raises(UserError, match="slurm.*timeout_minutes"):
        submit(make_study(**ONE, slurm={"timeout_minutes": 5}), options)


def test_optional_packages_are_needed_for_nothing_else() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); import ws_detectron.lab.study"
    )
    names = ["submitit", "pandas", "scipy", "markdown"]
    subprocess.run([sys.executable, "-c", code, *names], check=True, timeout=600)
