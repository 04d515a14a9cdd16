"""`Trainer`: detectron2's DefaultTrainer with COCO evaluation, on any number of CPUs or GPUs."""

import logging
import pickle
import re
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Optional

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import PeriodicWriter, PreciseBN
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ws_detectron.checkpoint import WSCheckpointer
from ws_detectron.compat import (
    distributed_on_cpu,
    has_compiled_ops,
    state_beside_the_trainer,
)
from ws_detectron.data import register_coco_sets
from ws_detectron.errors import ConfigError, DivergedError, UserError
from ws_detectron.io import refuse_overwrite
from ws_detectron.modeling import folded_copy

from .accumulation import accumulated_step
from .checks import (
    check_annotations,
    check_batch,
    check_datasets,
    check_keypoints,
    make_output_dir,
)
from .guards import find_traps
from .hooks import BestCheckpoint, RunRecord, SharedStatistics
from .loaders import build_test_loader, build_train_loader
from .scaling import scale_config

logger = logging.getLogger(__name__)

EVALUATOR_FILES = ("coco_instances_results.json", "instances_predictions.pth")

# What torch, fvcore and detectron2 raise for a file that is missing, damaged or no checkpoint
_LOADING_ERRORS = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


class Trainer(DefaultTrainer):
    """Trains and evaluates a detectron2 model on COCO-format data.

    Adds to `DefaultTrainer`: COCO evaluation, the best checkpoint, several CPU processes, gradient
    accumulation (SOLVER.ACCUMULATE_STEPS), and errors and warnings that say what a user can do.

    An iteration is one optimizer step, whatever the number of parts.

    Args:
        cfg: a merged config. SOLVER.REFERENCE_IMS_PER_BATCH scales it to the batch,
            SOLVER.REFERENCE_WORLD_SIZE to the number of processes; see `scale_config`.

    Raises:
        ConfigError: the batch cannot be shared out to processes and parts, OUTPUT_DIR cannot be
            made, a data set is not registered, or DATASETS.REGISTER cannot be.
        DataError: an annotation file cannot be used; see `ws_detectron.data.validate`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        ours = logging.getLogger("ws_detectron")
        if ours.level == logging.NOTSET and not ours.hasHandlers():  # nobody set loggers up
            setup_logger(distributed_rank=comm.get_rank(), name="ws_detectron")
        register_coco_sets(cfg.DATASETS.get("REGISTER"))
        check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
        check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
        check_batch(cfg, comm.get_world_size())
        cfg = scale_config(cfg, comm.get_world_size())
        if comm.is_main_process():
            make_output_dir(cfg)
            for trap in find_traps(cfg, comm.get_world_size()):
                logger.warning(trap)
        check_annotations(cfg, train=True)
        on_cpu = cfg.MODEL.DEVICE == "cpu" and comm.get_world_size() > 1
        with distributed_on_cpu() if on_cpu else nullcontext():
            super().__init__(cfg)

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads the last checkpoint of OUTPUT_DIR (`resume`) or MODEL.WEIGHTS.

        Raises:
            ConfigError: MODEL.WEIGHTS cannot be fetched or read, or the optimizer of the checkpoint
                is another one.
            WeightsError: the weights do not fit the model.
        """
        try:
            super().resume_or_load(resume=resume)
        except UserError:
            raise
        except _LOADING_ERRORS as error:
            what = f"MODEL.WEIGHTS {self.cfg.MODEL.WEIGHTS!r}"
            if resume and self.checkpointer.has_checkpoint():
                what = f"the checkpoint {self.checkpointer.get_checkpoint_file()!r}"
            raise ConfigError(f"{what} cannot be loaded: {_first_line(error)}") from error

    def train(self) -> Any:
        """Trains from the current iteration to SOLVER.MAX_ITER; returns the last evaluation."""
        logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)
        super().train()
        # detectron2 returns it only where TEST.EXPECTED_RESULTS are to be checked
        return getattr(self, "_last_eval_results", None) if comm.is_main_process() else None

    def run_step(self) -> None:
        """One optimizer step.

        Raises:
            DivergedError: the loss became infinite or NaN; says at which iteration and which loss.
        """
        with self._explained_divergence():
            if self.cfg.SOLVER.ACCUMULATE_STEPS > 1:
                self._trainer.iter = self.iter
                accumulated_step(self._trainer, self.cfg.SOLVER.ACCUMULATE_STEPS)
            else:
                super().run_step()

    def after_step(self) -> None:
        """The hooks; PreciseBN runs the model in training mode, where it may find the divergence.

        Raises:
            DivergedError: as `run_step`.
        """
        with self._explained_divergence():
            super().after_step()

    @contextmanager
    def _explained_divergence(self) -> Iterator[None]:
        try:
            yield
        except FloatingPointError as error:
            raise DivergedError(explain_divergence(str(error), self.iter)) from error

    def build_hooks(self) -> list[Optional[HookBase]]:
        """detectron2's hooks and ours: statistics of BN shared, the best checkpoint, a record."""
        # Replaced here, as DefaultTrainer's constructor makes its checkpointer just before the
        # hooks, and the hooks keep it.
        self.checkpointer = WSCheckpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            trainer=weakref.proxy(self),
            **state_beside_the_trainer(self),
        )
        hooks = super().build_hooks()
        for place, hook in enumerate(hooks):
            if isinstance(hook, PreciseBN):
                shared = SharedStatistics(self.model, self.cfg.TEST.EVAL_PERIOD)
                hooks.insert(place + 1, shared)
                break
        if comm.is_main_process() and self.cfg.DATASETS.TEST:
            metric = "segm/AP" if self.cfg.MODEL.MASK_ON else "bbox/AP"
            if len(self.cfg.DATASETS.TEST) > 1:
                metric = f"{self.cfg.DATASETS.TEST[0]}/{metric}"
            best = BestCheckpoint(self.model, self.cfg.OUTPUT_DIR, metric)
            # before metrics are written
            writer = next(i for i, hook in enumerate(hooks) if isinstance(hook, PeriodicWriter))
            hooks.insert(writer, best)
        if comm.is_main_process():
            hooks.append(RunRecord(self.cfg.OUTPUT_DIR, self.cfg.MODEL.DEVICE))
        return hooks

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model of `cfg`.

        Raises:
            ConfigError: detectron2 or a WS builder refuses the config.
        """
        try:
            return super().build_model(cfg)
        except UserError:
            raise
        except (AssertionError, KeyError, ValueError) as error:
            raise ConfigError(
                f"no model can be built from this config: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Optional[list[DatasetEvaluator]] = None
    ) -> dict[str, Any]:
        """Evaluates a folded copy of `model` on every set of DATASETS.TEST.

        Args:
            cfg: DATASETS.TEST, TEST and OUTPUT_DIR are read.
            model: in training or evaluation mode; it is left as it was.
            evaluators: one for each set; `build_evaluator` makes them by default.

        Returns:
            Task -> metric -> value, or data set -> task -> metric -> value for several sets; empty
            on all processes but the main one.
        """
        results = super().test(cfg, folded_copy(model), evaluators)
        if comm.is_main_process():
            # Without any prediction, detectron2 reports no masks and then fails to look them up.
            for task, *_ in cfg.TEST.EXPECTED_RESULTS:
                results.setdefault(task, {})
        return results

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Box, mask and keypoint AP by the COCO rules, written to OUTPUT_DIR/inference.

        Raises:
            ConfigError: the data set is not in COCO format, or the numbers of keypoints of data,
                model and TEST.KEYPOINT_OKS_SIGMAS differ.
            UserError: a result would overwrite the annotations or MODEL.WEIGHTS.
        """
        check_keypoints(cfg, train=False)
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
        if kind not in ("coco", "coco_panoptic_seg"):
            raise ConfigError(
                f"DATASETS.TEST names {dataset_name!r}, which wants the evaluator {kind!r}; "
                "allowed: data sets in COCO format"
            )
        folder = f"{cfg.OUTPUT_DIR}/inference"
        if len(cfg.DATASETS.TEST) > 1:
            folder += f"/{dataset_name}"
        inputs = MetadataCatalog.get(dataset_name).get("json_file"), cfg.MODEL.WEIGHTS
        refuse_overwrite([f"{folder}/{name}" for name in EVALUATOR_FILES], inputs)
        return COCOEvaluator(
            dataset_name,
            output_dir=folder,
            use_fast_impl=has_compiled_ops(),
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )


def explain_divergence(message: str, iteration: int) -> str:
    """One sentence from detectron2's FloatingPointError: when, which losses, what to do.

    Args:
        message: detectron2's text, with `loss_dict = {...}` where it knows the losses.
        iteration: the iteration that was running.
    """
    number = r"(?:np\.\w+\()?(nan|-?inf)"
    losses = [f"{name} is {value}" for name, value in re.findall(rf"'(\w+)': {number}", message)]
    what = ", ".join(losses) or message.splitlines()[0]
    return (
        f"training diverged at iteration {iteration}: {what}; lower SOLVER.BASE_LR or lengthen "
        "SOLVER.WARMUP_ITERS (the linear rule: 0.02 for 16 images per batch)"
    )


def _is_no_user_error(record: logging.LogRecord) -> bool:
    """Keeps tracebacks of user errors out of the log: their message is printed at the end.

    A FloatingPointError becomes one in `run_step`; detectron2's main branch logs it before that.
    """
    expected = (UserError, FloatingPointError)
    return not (record.exc_info and isinstance(record.exc_info[1], expected))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
