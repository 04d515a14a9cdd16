"""Training hooks that detectron2 does not have in every supported version."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ws_detectron.checkpoint import WSCheckpointer
from ws_detectron.errors import ConfigError
from ws_detectron.utils.environment import package_version, run_environment
from ws_detectron.utils.io import write_json

logger = logging.getLogger(__name__)


class BestCheckpoint(HookBase):
    """Saves the weights with the highest value of a metric so far.

    Writes `model_best.pth` (weights alone) and `model_best.json` (metric, value, iteration) after
    each evaluation that is better than all before it, also those before a `--resume`. It does not
    change `last_checkpoint`, so a run resumes from its last checkpoint, not from its best.

    detectron2 has a `BestCheckpointer` from 0.6 on; it forgets the best value at a resume and
    makes the best checkpoint the one to resume from.

    Args:
        model: the model to save.
        output_dir: folder of the two files.
        metric: name of the metric, such as "segm/AP"; higher is better.
    """

    def __init__(self, model: nn.Module, output_dir: str, metric: str) -> None:
        self._checkpointer = _UntaggedCheckpointer(model, output_dir)
        self._record = Path(output_dir) / "model_best.json"
        self._metric = metric
        self._best: Optional[float] = None
        self._seen_iteration = -1

    def before_train(self) -> None:
        if not self.trainer.start_iter:
            return
        # the evaluation of the checkpoint's iteration may be repeated; those before it are done
        self._seen_iteration = self.trainer.start_iter - 2
        record = read_record(self._record)
        if record.get("metric") == self._metric and isinstance(record.get("value"), float):
            self._best = record["value"]
            return
        weights = self._record.with_name("model_best.pth")
        if not record and weights.is_file():  # their value is unknown
            kept = weights.with_name("model_best_before_resume.pth")
            weights.replace(kept)
            logger.warning("The best weights before this resume are kept as %s", kept)

    def after_step(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._metric, (None, -1))
        if value is None or iteration <= self._seen_iteration or value != value:
            return
        self._seen_iteration = iteration
        if self._best is not None and value <= self._best:
            return
        self._best = value
        self._checkpointer.save("model_best")
        record = {"metric": self._metric, "value": value, "iteration": iteration}
        write_json(self._record, record, indent=2)
        logger.info("Best %s so far: %.3f at iteration %d", self._metric, value, iteration)

    after_train = after_step


class SharedStatistics(HookBase):
    """Averages BN statistics over processes, after detectron2's `PreciseBN`.

    `PreciseBN` computes them in each process from its own images, but all processes take part in an
    evaluation, and a checkpoint holds the statistics of the first. With mean m_r and variance v_r
    of process r of R:

        m = (1/R) sum m_r,    v = (1/R) sum (v_r + m_r^2) - m^2

    Args:
        model: the model, on every process.
        period: the period of `PreciseBN`, in iterations.
    """

    def __init__(self, model: nn.Module, period: int) -> None:
        self._model, self._period = model, period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self._period > 0 and done % self._period == 0):
            share_statistics(self._model)


def share_statistics(model: nn.Module) -> None:
    """Averages the statistics of trainable BN layers; every process must call it."""
    layers = get_bn_modules(model)
    if comm.get_world_size() == 1 or not layers:
        return
    means = torch.cat([layer.running_mean for layer in layers]).double()
    variances = torch.cat([layer.running_var for layer in layers]).double()
    moments = torch.stack([means, variances + means.square()]) / comm.get_world_size()
    dist.all_reduce(moments)
    mean, square = moments
    sizes = [layer.num_features for layer in layers]
    variance = square - mean.square()
    for layer, m, v in zip(layers, mean.split(sizes), variance.split(sizes)):
        layer.running_mean.copy_(m)
        layer.running_var.copy_(v)


RECORD = "run_record.json"


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object that a hook has written; empty, with a warning, if the file is damaged."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        record = None
    numbers = ("starts", "iterations", "wall_seconds", "peak_memory_bytes", "value")
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name, 0), (int, float)) for name in numbers
    ):
        logger.warning("%s is damaged and not used", path)
        return {}
    return record


def is_finished(output_dir: str, done: int, iterations: int, key: str) -> bool:
    """Whether a resumed run has trained to its end and was evaluated, which is logged.

    Every process must call it.

    Args:
        output_dir: folder of the run.
        done: iterations done so far.
        iterations: the value of `key`.
        key: config key of the length of the training, for messages.

    Raises:
        ConfigError: it has trained beyond its end.
    """
    if done > iterations:
        raise ConfigError(
            f"{key} is {iterations}, but the run in {output_dir} has done {done} iterations; raise "
            "it to continue, or choose another output folder"
        )
    if done == 0 or done < iterations:
        return False
    # the main process decides, as it writes the record
    record = read_record(Path(output_dir, RECORD))
    finished = comm.all_gather(record.get("iterations") == iterations)[0]
    if finished:
        message = "The run in %s is finished: %d of %d iterations. To continue, raise %s"
        logger.info(message, output_dir, done, iterations, key)
    return finished


class RunRecord(HookBase):
    """Writes `run_record.json`: machine, versions, time and memory of a run.

    It is written at the start, so that a start that is killed counts, and completed at the end.

    ====================  =====================================================================
    starts                number of starts: 1, and one more for each `--resume`
    iterations            iterations done so far
    wall_seconds          sum over starts, evaluations included, killed starts excluded
    peak_memory_bytes     peak of the main process over all starts: on a GPU the memory that torch
                          allocated, on the CPU the resident memory, libraries included
    processes, threads    processes of the job; torch threads in each
    device, versions      those of the last start
    ws_detectron          version of this package in the last start, in a clone with its commit
    date                  UTC date on which the last start ended
    ====================  =====================================================================

    Args:
        output_dir: folder of the file.
        device: MODEL.DEVICE.
    """

    def __init__(self, output_dir: str, device: str) -> None:
        self._path = Path(output_dir) / RECORD
        self._device = device

    def before_train(self) -> None:
        self._start = time.perf_counter()
        self._earlier = read_record(self._path) if self.trainer.start_iter else {}
        self._earlier["starts"] = self._earlier.get("starts", 0) + 1
        self._package = package_version()  # now, as the files may change during the training
        write_json(self._path, self._earlier, indent=2)

    def after_train(self) -> None:
        earlier = self._earlier
        record = {
            "starts": earlier["starts"],
            "iterations": self.trainer.iter,
            "wall_seconds": earlier.get("wall_seconds", 0.0) + time.perf_counter() - self._start,
            "peak_memory_bytes": max(earlier.get("peak_memory_bytes", 0), self._peak_memory()),
            "processes": comm.get_world_size(),
            **run_environment(self._device),
            "ws_detectron": self._package,
        }
        write_json(self._path, record, indent=2)

    def _peak_memory(self) -> int:
        if self._device.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
        if sys.platform == "win32":
            return 0  # not measured
        import resource  # Windows has none

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


class _UntaggedCheckpointer(WSCheckpointer):
    """Saves checkpoints from which `--resume` does not resume."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass
