"""OUTPUT_DIR belongs to one run: one process at a time, and no second run in its files."""

import argparse
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Optional, Union

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ws_detectron.errors import ConfigError, UserError
from ws_detectron.utils.io import locked

logger = logging.getLogger(__name__)

METRICS = "metrics.json"
EVALUATION = "inference/results.json"  # of --eval-only: what `Trainer.test` returned
LAST_CHECKPOINT = "last_checkpoint"
_CHECKPOINTS = ("model_[0-9]*.pth", "model_final.pth", "model_best.pth")
# Files that belong to one run; every run, evaluations included, rewrites config.yaml and inference/
# and appends to log.txt.
_RUN = (
    METRICS,
    LAST_CHECKPOINT,
    *_CHECKPOINTS,
    "model_best.json",
    "run_record.json",
    "events.out.tfevents.*",
)
_LOCK = ".lock"
_reserved: dict[Path, IO[Any]] = {}


def _drop_locks() -> None:
    """Data workers, which live on for seconds when the training is killed, do not hold the lock."""
    for file in _reserved.values():
        file.close()


os.register_at_fork(after_in_child=_drop_locks)


def make_output_dir(output_dir: str) -> None:
    """Makes the folder and checks that files can be written there.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        PathManager.mkdirs(output_dir)
    except OSError as error:
        raise ConfigError(f"OUTPUT_DIR {output_dir!r} cannot be made: {error}") from error
    try:
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR {output_dir!r} cannot be written to: {error.strerror or error}"
        ) from error


class _RunLog(logging.FileHandler):
    """Writes log.txt like detectron2's `setup_logger`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, delay=True)
        form = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
        self.setFormatter(logging.Formatter(form, "%m/%d %H:%M:%S"))


def log_to(output_dir: str) -> None:
    """Logs to log.txt of the folder, in place of one that an earlier call named.

    detectron2's `default_setup` does this; scripts that make a trainer need not call it. Its log is
    recognized and not written twice.

    Raises:
        ConfigError: see `make_output_dir`.
    """
    make_output_dir(output_dir)
    path = Path(output_dir, "log.txt").absolute()
    for name in ("detectron2", "fvcore", "ws_detectron"):
        log = logging.getLogger(name)
        for handler in [h for h in log.handlers if isinstance(h, _RunLog)]:
            log.removeHandler(handler)
            handler.close()
        names = [getattr(getattr(handler, "stream", None), "name", "") for handler in log.handlers]
        if str(path) in [os.path.abspath(str(name)) for name in names]:
            continue
        log.addHandler(_RunLog(path))
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)


@contextmanager
def reserved(output_dir: Union[str, Path]) -> Iterator[None]:
    """Within it, no other process can train in the folder.

    Entering it again for the same folder is a no-op. The lock ends with the process.

    Raises:
        AlreadyLocked: another process trains there.
    """
    folder = Path(output_dir).resolve()
    if folder in _reserved:
        yield
        return
    busy = (
        f"another process is training in OUTPUT_DIR {output_dir}; wait for it, end it, or choose "
        f"another OUTPUT_DIR (fuser {folder / _LOCK} shows the process)"
    )
    with locked(folder / _LOCK, busy) as file:
        _reserved[folder] = file
        try:
            yield
        finally:
            del _reserved[folder]


def open_output_dir(output_dir: str, args: argparse.Namespace) -> None:
    """Makes the folder, and refuses a run there that is neither resumed nor overwritten.

    Args:
        output_dir: the folder.
        args: with `resume` and `eval_only`; not all callers have `overwrite`.

    Raises:
        UserError: `overwrite` is set together with another of them, or see `check_unused`.
    """
    overwrite = getattr(args, "overwrite", False)
    if overwrite and (args.resume or args.eval_only):
        raise UserError(
            f"--overwrite cannot be combined with {'--resume' if args.resume else '--eval-only'}"
        )
    make_output_dir(output_dir)
    if comm.is_main_process() and not (args.eval_only or args.resume or overwrite):
        check_unused(output_dir)


def check_unused(output_dir: Union[str, Path]) -> None:
    """Checks that the folder holds no run, as a new one would mix with its files.

    Raises:
        UserError: the folder holds metrics or checkpoints; names them.
    """
    names = _names_of_run(output_dir)
    if names:
        raise UserError(
            f"OUTPUT_DIR {output_dir} holds a run ({names}): resume it with --resume (in Python "
            "trainer.resume_or_load(resume=True)), choose another OUTPUT_DIR, or delete it with "
            "--overwrite (in Python ws_detectron.engine.delete_run)"
        )


def warn_of_start(output_dir: Union[str, Path]) -> None:
    """Warns of a run that is to be resumed but has no checkpoint, so that it starts again."""
    names = _names_of_run(output_dir)
    if names:
        logger.warning(
            "OUTPUT_DIR %s holds a run (%s) without %s: it starts at iteration 0",
            output_dir,
            names,
            LAST_CHECKPOINT,
        )


def _names_of_run(output_dir: Union[str, Path]) -> str:
    found = _files(output_dir, (LAST_CHECKPOINT, *_CHECKPOINTS))
    metrics = Path(output_dir, METRICS)
    if metrics.is_file() and metrics.stat().st_size:  # making a `Trainer` writes an empty one
        found.insert(0, metrics)
    return ", ".join(path.name for path in found[:4]) + ", ..." * (len(found) > 4)


def delete_run(output_dir: Union[str, Path], keep: str = "") -> None:
    """Deletes metrics, checkpoints, TensorBoard events and record of the run in a folder.

    Args:
        output_dir: folder of the run; other files in it stay.
        keep: MODEL.WEIGHTS of the next run.

    Raises:
        UserError: `keep` is one of these files.
    """
    paths = _files(output_dir, _RUN)
    for path in paths:
        if keep and os.path.exists(keep) and path.samefile(keep):
            raise UserError(
                f"MODEL.WEIGHTS is {keep}, which --overwrite would delete; move it to another "
                "folder, or choose another OUTPUT_DIR"
            )
    for path in paths:
        path.unlink()
    if paths:
        logger.info("Deleted the earlier run in %s: %d files", output_dir, len(paths))


def cut_metrics(path: Path, size: Optional[int] = None) -> int:
    """Removes what was written to metrics.json after a checkpoint, which a resumed run repeats.

    Args:
        path: of metrics.json; nothing is done if it does not exist.
        size: of the file when the checkpoint was written, bytes; None keeps all that was written.

    Returns:
        The last iteration in the rest; -1 if there is none.
    """
    if not path.is_file():
        return -1
    content = path.read_bytes()
    kept = content[:size]
    removed = content[len(kept) :]
    if removed:
        os.truncate(path, len(kept))
        lines = removed.count(b"\n")
        logger.info("%s: %d lines after the checkpoint are removed", path, lines)
    if kept and not kept.endswith(b"\n"):
        with open(path, "ab") as file:  # so that the next line is not appended to a broken one
            file.write(b"\n")
        logger.warning("%s ends in a broken line, which readers skip", path)
    last = -1
    for line in kept.splitlines():
        try:
            last = max(last, int(json.loads(line)["iteration"]))
        except (LookupError, TypeError, ValueError):  # a line that was cut off in a crash
            continue
    return last


def remove_partial_files(output_dir: Union[str, Path]) -> None:
    """Removes what `atomic_write` left when the process was killed while it wrote a file.

    Call it while the folder is reserved, so that no other process writes.
    """
    partial = re.compile(
        r"\.(model_\d+\.pth|model_final\.pth|model_best\.(pth|json)|last_checkpoint|"
        r"run_record\.json|config\.yaml)\.[a-z0-9_]{8}"
    )
    for path in _files(output_dir, (".*",)):
        if partial.fullmatch(path.name):
            path.unlink()
            logger.info("Removed %s, which was not written completely", path)


def remove_old_checkpoints(output_dir: Union[str, Path], keep: int, iteration: int) -> list[str]:
    """Deletes periodic checkpoints before an iteration but for the newest, which it returns."""
    found = _files(output_dir, ("model_[0-9]*.pth",))
    numbers = {path: int(path.stem[6:]) for path in found if path.stem[6:].isdigit()}
    before = sorted((path for path, n in numbers.items() if n < iteration), key=numbers.__getitem__)
    for path in before[:-keep]:
        path.unlink()
    return [*map(str, before[-keep:])]


def _files(folder: Union[str, Path], patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for name in patterns for path in Path(folder).glob(name) if path.is_file())
