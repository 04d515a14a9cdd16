"""One run in one folder: a second process, a second run, and what a killed run left."""

import argparse
import errno
import json
import logging
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from small_trainer import SmallTrainer, small_cfg

from ws_detectron.engine import run
from ws_detectron.engine.output_dir import (
    cut_metrics,
    log_to,
    remove_old_checkpoints,
    remove_partial_files,
    reserved,
)
from ws_detectron.errors import ConfigError, UserError, WriteError
from ws_detectron.utils.io import AlreadyLocked, locked

RUN = sys.modules["ws_detectron.engine.run"]  # the function `run` hides it in its package
WAITING = """
import sys
from detectron2.engine.hooks import CallbackHook
from pathlib import Path
from small_trainer import SmallTrainer, small_cfg

trainer = SmallTrainer(small_cfg(Path(sys.argv[1])))
trainer.register_hooks([CallbackHook(before_step=lambda _: print("TRAINS", flush=True) or input())])
trainer.train()
"""


@pytest.fixture
def small_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` trains a `SmallTrainer`."""
    monkeypatch.setattr(RUN, "Trainer", SmallTrainer)


def arguments(**kwargs: bool) -> argparse.Namespace:
    return argparse.Namespace(**{"eval_only": False, "resume": False, "config_file": "", **kwargs})


def train(cfg: CfgNode, resume: bool = False) -> int:
    """Trains from Python, without the tools; returns the first iteration."""
    trainer = SmallTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer.start_iter


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def iterations(folder: Path) -> list[int]:
    return [json.loads(x)["iteration"] for x in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize(
    "name", ["metrics.json", "last_checkpoint", "model_0000019.pth", "model_final.pth"]
)
def test_a_new_run_in_a_used_folder_is_refused(tmp_path: Path, small_run: None, name: str) -> None:
    (tmp_path / name).write_text("of an earlier run")
    before = files(tmp_path)
    with pytest.raises(UserError, match=rf"OUTPUT_DIR .* holds a run \({name}\): .* --overwrite"):
        run(small_cfg(tmp_path), arguments())
    assert files(tmp_path) == before
    with pytest.raises(UserError, match="holds a run"):
        train(small_cfg(tmp_path))
    assert {path: files(tmp_path)[path] for path in before} == before


def test_a_trainer_of_a_script_leaves_the_config_and_its_log(tmp_path: Path) -> None:
    for log in map(logging.getLogger, ("detectron2", "fvcore", "ws_detectron")):
        log.setLevel(logging.NOTSET)
    for name in ("first", "second"):
        cfg = small_cfg(tmp_path / name)
        cfg.SEED = 1  # without one, the trainer draws it
        train(cfg)
        assert (tmp_path / name / "config.yaml").read_text() == cfg.dump()
        log = (tmp_path / name / "log.txt").read_text()
        assert log.count("train_loop INFO: Starting training from iteration 0") == 1
        assert "fvcore.common.checkpoint INFO" in log


def test_a_log_that_detectron2_writes_is_not_written_twice(tmp_path: Path) -> None:
    log = setup_logger(str(tmp_path), name="ws_detectron")
    log_to(str(tmp_path))
    log.info("a message")
    assert (tmp_path / "log.txt").read_text().count("a message") == 1


def test_what_is_no_run_is_not_in_the_way(tmp_path: Path, small_run: None) -> None:
    """A folder in which a `Trainer` was made and an evaluation has run, with files of the user."""
    SmallTrainer(small_cfg(tmp_path))
    assert (tmp_path / "metrics.json").is_file()
    (tmp_path / "inference").mkdir()
    for name in ("config.yaml", "log.txt", "inference/metrics.json", "model_zoo.pth"):
        (tmp_path / name).touch()
    run(small_cfg(tmp_path), arguments())
    assert iterations(tmp_path) == [1]


def test_resume_goes_on_also_before_the_first_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"iteration": 0, "total_loss": 1.0}
    (tmp_path / "metrics.json").write_text(json.dumps(row) + "\n")
    assert train(small_cfg(tmp_path), resume=True) == 0
    assert "holds a run (metrics.json) without last_checkpoint: it starts at it" in caplog.text
    assert iterations(tmp_path) == [1]
    assert train(small_cfg(tmp_path, iterations=3), resume=True) == 2
    assert iterations(tmp_path) == [2]  # as a run of 3 iterations


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path: Path, small_run: None) -> None:
    old = ["metrics.json", "last_checkpoint", "model_0000019.pth", "model_final.pth"]
    old += ["model_best.pth", "model_best.json", "run_record.json", "events.out.tfevents.1.old.0"]
    mine = ["notes.txt", "model_zoo.pth", "coco.json", "inference/metrics.json", "sub/metrics.json"]
    for name in (*old, *mine):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    run(small_cfg(tmp_path), arguments(overwrite=True))
    assert iterations(tmp_path) == [1]
    assert [name for name in mine if (tmp_path / name).read_text() != "old"] == []
    left = [name for name in old if (tmp_path / name).exists()]
    assert sorted(left) == ["last_checkpoint", "metrics.json", "model_final.pth", "run_record.json"]
    assert json.loads((tmp_path / "run_record.json").read_text())["starts"] == 1


def test_overwrite_does_not_delete_the_weights_to_start_from(
    tmp_path: Path, small_run: None
) -> None:
    train(small_cfg(tmp_path / "run"))
    (tmp_path / "link").symlink_to(tmp_path / "run")
    cfg = small_cfg(tmp_path / "run")
    cfg.MODEL.WEIGHTS = str(tmp_path / "link" / "model_final.pth")
    before = files(tmp_path / "run")
    with pytest.raises(UserError, match="MODEL.WEIGHTS is .*, which --overwrite would delete"):
        run(cfg, arguments(overwrite=True))
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("other", ["resume", "eval_only"])
def test_overwrite_has_no_sense_with(tmp_path: Path, other: str) -> None:
    (tmp_path / "metrics.json").write_text("old")
    with pytest.raises(UserError, match=f"--overwrite .*--{other.replace('_', '-')}"):
        run(small_cfg(tmp_path), arguments(overwrite=True, **{other: True}))
    assert (tmp_path / "metrics.json").read_text() == "old"


def test_one_process_at_a_time_and_a_killed_one_is_none(
    tmp_path: Path, small_run: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(tmp_path)],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    with first:
        try:
            assert any("TRAINS" in line for line in first.stdout)
            before = files(tmp_path)
            for options in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(AlreadyLocked, match="another process is training in OUTPUT_DI"):
                    run(small_cfg(tmp_path), arguments(**options))
            assert files(tmp_path) == before
            for resume in (False, True):
                with pytest.raises(AlreadyLocked):
                    train(small_cfg(tmp_path), resume)
            # an evaluation is allowed meanwhile
            with monkeypatch.context() as patch:
                patch.setattr(RUN, "load_model_for_inference", lambda *_, **__: None)
                patch.setattr(SmallTrainer, "test", lambda *_: {"bbox": {"AP": 1.0}})
                assert run(small_cfg(tmp_path), arguments(eval_only=True)) == {"bbox": {"AP": 1.0}}
        finally:
            first.send_signal(signal.SIGKILL)
    train(small_cfg(tmp_path))
    assert iterations(tmp_path) == [1]


def test_a_run_that_has_ended_reserves_nothing(tmp_path: Path, small_run: None) -> None:
    run(small_cfg(tmp_path), arguments())
    with locked(tmp_path / ".lock", "busy"):
        pass
    with reserved(tmp_path), reserved(f"{tmp_path}/../{tmp_path.name}"):
        pass
    with reserved(tmp_path), pytest.raises(AlreadyLocked), locked(tmp_path / ".lock", "busy"):
        pass


def test_metrics_are_cut_back_to_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.json"
    assert cut_metrics(path, 0) == -1 and not path.exists()
    rows = [{"iteration": 19}, {"iteration": 15, "bbox/AP": 1.0}, {"iteration": 39}]
    lines = [json.dumps(row) + "\n" for row in rows]
    for content in ("", lines[0]):
        path.write_text(content)
        assert cut_metrics(path, len(content)) == (19 if content else -1)
        assert path.read_text() == content
    path.write_text("".join(lines) + '{"iteration": 59, "total_l')
    size = len(lines[0] + lines[1])
    with path.open("a") as writer:  # opened before, as writers are
        assert cut_metrics(path, size) == 19
        writer.write(lines[2])
    assert path.read_text() == "".join(lines)
    assert "broken" not in caplog.text


def test_a_broken_line_of_metrics_stays_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a crash of the machine the file may be shorter than it was at the checkpoint."""
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 1}\n{"iteration": 2, "total_l')
    assert cut_metrics(path, 1000) == 1
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2, "total_l\n'
    assert f"{path} ends in a broken line" in caplog.text


def test_files_that_were_not_written_completely_are_removed_at_resume(tmp_path: Path) -> None:
    train(small_cfg(tmp_path))
    partial = [".model_0000004.pth.kfw9y7uu", ".last_checkpoint.abcdefgh", ".config.yaml._0000000"]
    mine = [".model.pth.kfw9y7uu", ".model_0000004.pth.backup.1", "model_x.pth", ".vimrc.abcdefgh"]
    for name in (*partial, *mine):
        (tmp_path / name).touch()
    train(small_cfg(tmp_path, iterations=3), resume=True)
    assert [name for name in partial if (tmp_path / name).exists()] == []
    assert [name for name in mine if not (tmp_path / name).exists()] == []
    assert {path.name for path in tmp_path.glob(".*")} >= {".lock"}
    remove_partial_files(tmp_path / "not_there")


def test_as_many_checkpoints_are_kept_as_asked(tmp_path: Path) -> None:
    def checkpoints() -> list[str]:
        return sorted(path.name[6:-4] for path in tmp_path.glob("model_*.pth"))

    cfg = small_cfg(tmp_path, iterations=5)
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    train(cfg)
    assert checkpoints() == [*(f"000000{n}" for n in range(5)), "final"]
    cfg.SOLVER.CHECKPOINT_KEEP = 2
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    cfg.SOLVER.MAX_ITER = 4  # model_0000004 is not of this run, and no older one
    train(cfg, resume=True)
    assert checkpoints() == ["0000002", "0000003", "0000004", "final"]
    cfg.SOLVER.CHECKPOINT_KEEP = -1
    with pytest.raises(ConfigError, match="SOLVER.CHECKPOINT_KEEP is -1; allowed: "):
        SmallTrainer(cfg)
    newest = str(tmp_path / "model_0000004.pth")
    assert remove_old_checkpoints(tmp_path, keep=1, iteration=10) == [newest]
    assert checkpoints() == ["0000004", "final"]


def test_a_child_of_a_killed_training_does_not_hold_its_lock(tmp_path: Path) -> None:
    """As data workers, which live on for seconds."""
    context = multiprocessing.get_context("fork")
    started = context.Event()
    with reserved(tmp_path):
        child = context.Process(target=lambda: started.set() or time.sleep(60))
        child.start()
        started.wait()
    try:
        with locked(tmp_path / ".lock", "busy"):
            pass
        assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_the_config_as_it_runs_is_written(tmp_path: Path, small_run: None) -> None:
    """For 4 GPUs x 1 image, run by one process: a quarter of batch and LR, 4x as long."""
    cfg = small_cfg(tmp_path, iterations=1)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.BASE_LR = 0.004
    name = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"  # one of the package
    run(cfg, argparse.Namespace(eval_only=False, resume=False, config_file=name))
    ran = CfgNode.load_cfg((tmp_path / "config.yaml").read_text()).SOLVER
    assert (ran.IMS_PER_BATCH, ran.BASE_LR, ran.MAX_ITER) == (1, pytest.approx(0.001), 4)
    assert (tmp_path / "log.txt").read_text().count("MAX_ITER:") == 1  # logged once, as well


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder in which root cannot write")
def test_a_folder_that_cannot_be_written_to(small_run: None) -> None:
    with pytest.raises(ConfigError, match="OUTPUT_DIR '/sys/kernel' cannot be written to: "):
        run(small_cfg(Path("/sys/kernel")), arguments())
    with pytest.raises(ConfigError, match="OUTPUT_DIR '/sys/kernel' cannot be written to: "):
        SmallTrainer(small_cfg(Path("/sys/kernel")))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the size of files")
def test_a_disk_that_becomes_full_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """Simulated by a limit on file sizes between those of config.yaml and a checkpoint."""
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from small_trainer import SmallTrainer, small_cfg\n"
        "from ws_detectron.errors import exit_on_user_error\n"
        "SmallTrainer(small_cfg(Path(sys.argv[1]))).train()\n"
        "trainer = SmallTrainer(small_cfg(Path(sys.argv[1]), iterations=4))\n"
        "trainer.resume_or_load(resume=True)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "with exit_on_user_error():\n"
        "    trainer.train()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    final = tmp_path / "model_final.pth"
    assert done.stderr.splitlines()[-1] == f"error: file too large while writing {final}"
    assert "Traceback" not in done.stdout + done.stderr
    assert torch.load(final)["iteration"] == 1
    assert not list(tmp_path.glob(".model*"))


def test_a_full_disk_without_a_name_is_that_of_the_output(
    tmp_path: Path, small_run: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RUN, "default_setup", full)
    with pytest.raises(WriteError, match=f"^no space left on device while writing {tmp_path}$"):
        run(small_cfg(tmp_path), arguments())


def test_a_bug_keeps_its_traceback_and_the_log_is_named(
    tmp_path: Path,
    small_run: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("res3")

    monkeypatch.setattr(SmallTrainer, "build_model", broken)
    for eval_only, folder in ((False, tmp_path), (True, tmp_path / "inference")):
        monkeypatch.setattr(RUN, "load_model_for_inference", broken)
        with pytest.raises(KeyError, match="res3") as caught:
            run(small_cfg(tmp_path), arguments(eval_only=eval_only))
        assert caught.traceback[-1].name == "broken"
        line = f"the log of this run is {folder}/log.txt"
        assert capsys.readouterr().err.splitlines()[-1] == line
        assert (folder / "log.txt").is_file()
