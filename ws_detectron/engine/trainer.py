"""`Trainer`: detectron2's DefaultTrainer with COCO evaluation, on any number of CPUs or GPUs."""

import logging
import math
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Optional

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PeriodicWriter, PreciseBN
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter, JSONWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from ws_detectron.checkpoint import WSCheckpointer
from ws_detectron.errors import ConfigError, DivergedError, UserError
from ws_detectron.modeling import folded_copy
from ws_detectron.utils.compat import (
    has_compiled_ops,
    is_divergence,
    loader_of,
    skip_written,
    user_errors_unlogged,
)
from ws_detectron.utils.io import refuse_overwrite, write_text

from .accumulation import accumulated_step
from .checks import check_backbone, find_warnings
from .hooks import (
    BestCheckpoint,
    RunRecord,
    SharedStatistics,
    is_finished,
)
from .loaders import TrainLoader, build_test_loader, build_train_loader
from .output_dir import (
    METRICS,
    check_unused,
    cut_metrics,
    log_to,
    remove_old_checkpoints,
    remove_partial_files,
    reserved,
    warn_of_start,
)
from .prepare import as_flat_dict, prepare
from .scaling import describe_schedule, list_changes
from .signals import StopOnSignal, Stopped, on_signals

logger = logging.getLogger(__name__)

# For files that cannot be fetched, and for states that an optimizer, scheduler or hook cannot load.
# RuntimeError is not among them: torch and CUDA raise it, for example when memory runs out.
_FETCHING_ERRORS: tuple[type[Exception], ...] = (AssertionError, OSError)
_STATE_ERRORS = (*_FETCHING_ERRORS, AttributeError, LookupError, TypeError, ValueError)
# The keys of SOLVER by which detectron2 makes parameter groups.
_GROUPING = (
    *("BASE_LR", "BIAS_LR_FACTOR", "WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS"),
)

_WINDOW = 20
"""Values of a metric over which detectron2's writers take the median."""
_TIMES = ("time", "eta_seconds")
"""Metrics that are no values of the training; a resumed run measures its own."""
_AFTER_CHECKPOINT = (EvalHook, BestCheckpoint, PeriodicWriter)
"""Hooks of an iteration that run after its checkpoint is written."""


class Trainer(DefaultTrainer):
    """Trains and evaluates a detectron2 model on COCO-format data.

    Adds to `DefaultTrainer`: COCO evaluation, the best checkpoint, several CPU processes, gradient
    accumulation (SOLVER.ACCUMULATE_STEPS), and errors and warnings that say what a user can do.

    An iteration is one optimizer step, whatever the number of parts. What is random in it is a
    function of SEED, the iteration and the process; -1 draws a seed, which checkpoints keep. So a
    resumed run is the run without interruption (docs/training.md).

    Args:
        cfg: a merged config; `prepare` checks it and scales it to the batch and to the number of
            processes, unless this is done already.

    Raises:
        UserError: see `prepare`.
    """

    iter: int
    _hooks: list[HookBase]

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        ours = logging.getLogger("ws_detectron")
        if ours.level == logging.NOTSET and not ours.hasHandlers():  # nobody set loggers up
            setup_logger(distributed_rank=comm.get_rank(), name="ws_detectron")
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):  # as DefaultTrainer
            setup_logger()
        if comm.is_main_process():
            log_to(cfg.OUTPUT_DIR)
        cfg = prepare(cfg)
        self._resumes = False
        self._draws_seed = cfg.SEED < 0
        if self._draws_seed:
            cfg = _with_seed(cfg, comm.shared_random_seed())
        seed_all_rng(cfg.SEED + comm.get_rank())  # as detectron2's default_setup, for the weights

        # As in DefaultTrainer's constructor, which allows no other checkpointer, and sets
        # `device_ids`, which must be None for several CPU processes.
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        ddp_options = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **ddp_options)
        loop = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = loop(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = WSCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self._checkpoint: dict[str, Any] = {}  # what before_train needs of the one resumed from
        self._precise_bn_loader: Any = None
        self._writers: list[EventWriter] = []
        self._stop = StopOnSignal(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.MODEL.DEVICE)
        self.register_hooks(self.build_hooks())
        self._images = data_loader.images if isinstance(data_loader, TrainLoader) else 0
        if comm.is_main_process():
            for warning in find_warnings(cfg, comm.get_world_size(), self._images):
                logger.warning(warning)

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads the last checkpoint of OUTPUT_DIR (`resume`) or MODEL.WEIGHTS.

        A resumed run follows the config: LR, schedule, momentum and weight decay are those of
        `cfg`, not those of the checkpoint, and changes are logged. A scheduler that is not
        detectron2's keeps its state, including the LR.

        Raises:
            ConfigError: MODEL.WEIGHTS cannot be fetched or read, or the checkpoint has another
                optimizer.
            WeightsError: the weights do not fit the model.
        """
        self._resumes = resume
        configured = [dict(group) for group in self.optimizer.param_groups]
        what, errors = f"MODEL.WEIGHTS {self.cfg.MODEL.WEIGHTS!r}", _FETCHING_ERRORS
        if resume and self.checkpointer.has_checkpoint():
            what = f"the checkpoint {self.checkpointer.get_checkpoint_file()!r}"
            errors = _STATE_ERRORS
        try:
            super().resume_or_load(resume=resume)
        except UserError:
            raise
        except errors as error:
            raise ConfigError(f"{what} cannot be loaded: {_first_line(error)}") from error
        if self.start_iter > 0:
            self._follow_config(configured)

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks, the loop's state (momentum, AMP scale), the config, and recent metrics.

        The keys are those of detectron2's main branch, whose `DefaultTrainer` saves the loop; 0.5
        and 0.6 do not. `metrics` and `metrics_size` are ours: the last values of each metric, over
        which writers smooth, and the bytes of metrics.json.
        """
        state = TrainerBase.state_dict(self)
        state.update(_trainer=self._trainer.state_dict(), config=as_flat_dict(self.cfg))
        storage: Optional[EventStorage] = getattr(self, "storage", None)
        if storage is not None:
            hints = storage.smoothing_hints()
            state["metrics"] = {
                name: {"smoothing_hint": hints[name], "values": history.values()[-_WINDOW:]}
                for name, history in storage.histories().items()
                if name not in _TIMES
            }
            path = Path(self.cfg.OUTPUT_DIR, METRICS)
            state["metrics_size"] = path.stat().st_size if path.is_file() else 0
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, and logs how the config of its run differs; the current config stays.

        Keys that one of the configs lacks are skipped, as they come with another version of
        detectron2.
        """
        earlier = {**state_dict.get("config", {}), "OUTPUT_DIR": self.cfg.OUTPUT_DIR}
        if self._draws_seed and earlier.get("SEED", -1) >= 0:
            self.cfg = _with_seed(self.cfg, earlier["SEED"])
        changes = list_changes(earlier, as_flat_dict(self.cfg))
        if changes:  # logged first, as they may be why the rest fails
            logger.warning(
                "The config has changed since the checkpoint that this run resumes from; the new "
                "values are used: %s",
                ", ".join(changes),
            )
        TrainerBase.load_state_dict(self, state_dict)
        self._checkpoint = {key: state_dict[key] for key in state_dict if key[:7] == "metrics"}
        if "_trainer" in state_dict:
            self._group_parameters(state_dict["_trainer"]["optimizer"]["param_groups"], earlier)
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:  # as in checkpoints of DefaultTrainer in 0.5 and 0.6
            logger.warning(
                "The checkpoint does not have the state of the training loop: momentum starts at "
                "zero, and the loss scale of AMP at its initial value"
            )

    def _group_parameters(self, saved: list[Any], config: Mapping[str, Any]) -> None:
        """Gives the optimizer the parameter groups of a checkpoint, so that it can load its state.

        detectron2 0.5 makes a group of each parameter; later versions one of all parameters with
        the same LR and weight decay, which depend on the config.

        Args:
            saved: the groups in the checkpoint.
            config: the flat config of the run that wrote it.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if len(saved) == len(parameters) != len(self.optimizer.param_groups):
            self.optimizer.param_groups = [
                {**self.optimizer.defaults, "params": [parameter]} for parameter in parameters
            ]
            return
        cfg = self.cfg.clone()
        for key in _GROUPING:
            cfg.SOLVER[key] = config.get(f"SOLVER.{key}", cfg.SOLVER[key])
        self.optimizer.param_groups = self.build_optimizer(cfg, self.model).param_groups

    def _follow_config(self, configured: list[dict[str, Any]]) -> None:
        """Resets optimizer and scheduler of a resumed run to the values of its config.

        Args:
            configured: the parameter groups of the optimizer before the checkpoint was loaded.
        """
        scheduler, loaded = self.scheduler, self.optimizer.param_groups
        self.optimizer.param_groups = groups = [dict(group) for group in configured]
        if not isinstance(scheduler, LRMultiplier):
            logger.warning(
                "LR and schedule are those of the checkpoint, not of the config: %s keeps them",
                type(scheduler).__name__,
            )
            before = {parameter: group for group in loaded for parameter in group["params"]}
            for group in groups:
                kept = before[group["params"][0]]
                group.update({key: kept[key] for key in ("lr", "initial_lr") if key in kept})
            return
        scheduler.base_lrs = [values["initial_lr"] for values in configured]
        if self.start_iter < self.max_iter:  # the schedule has no LR after its end
            for group, lr in zip(groups, scheduler.get_lr()):
                group["lr"] = lr

    def train(self) -> Any:
        """Trains from the current iteration to SOLVER.MAX_ITER; returns the last evaluation.

        A finished run is not changed, and None is returned.

        Raises:
            UserError: another process trains in OUTPUT_DIR, or it holds a run that
                `resume_or_load` was not asked to resume.
            ConfigError: it has trained beyond SOLVER.MAX_ITER.
            DivergedError: a loss became infinite or NaN; names iteration and loss.
        """
        folder = self.cfg.OUTPUT_DIR
        if is_finished(folder, self.start_iter, self.max_iter, "SOLVER.MAX_ITER"):
            return None
        remedy = (
            "lower SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS (the linear rule: 0.02 for 16 "
            "images per batch)"
        )
        with explained_end(self, self._stop, remedy):
            if not comm.is_main_process():
                super().train()
                return None
            with reserved(folder):
                if self.start_iter == 0:
                    (warn_of_start if self._resumes else check_unused)(folder)
                self._tidy_output_dir()
                write_text(Path(folder, "config.yaml"), self.cfg.dump())
                if self._images:
                    logger.info(describe_schedule(self.cfg, self._images))
                super().train()
        # detectron2 returns it only with TEST.EXPECTED_RESULTS
        return getattr(self, "_last_eval_results", None)

    def _tidy_output_dir(self) -> None:
        """Removes what an earlier start has left that this one writes again."""
        remove_partial_files(self.cfg.OUTPUT_DIR)
        metrics = Path(self.cfg.OUTPUT_DIR, METRICS)
        size = self._checkpoint.get("metrics_size") if self.start_iter else 0
        written = cut_metrics(metrics, size)
        if "metrics" in self._checkpoint:  # these have metrics of iterations that were written
            skip_written(self._writers, written)

    def before_train(self) -> None:
        """Sets the loaders to the first iteration, and completes the checkpoint's iteration.

        An iteration is evaluated and its metrics are written after its checkpoint. The process may
        have ended in between, so a resumed run does this again.
        """
        period, passes = self.cfg.TEST.EVAL_PERIOD, self.cfg.TEST.PRECISE_BN.NUM_ITER
        for loader, start in (
            (self.data_loader, self.start_iter * self.cfg.SOLVER.ACCUMULATE_STEPS),
            (self._precise_bn_loader, self.start_iter // period * passes if period else 0),
        ):
            if isinstance(loader, TrainLoader):
                loader.seed, loader.start = self.cfg.SEED, start
        if not isinstance(self.data_loader, TrainLoader):
            logger.warning(
                "The training loader is a %s: its images, and what the model draws, do not follow "
                "SEED, and a resumed run gets other ones; to follow it, build the loader with "
                "ws_detectron.engine.build_train_loader(cfg, mapper)",
                type(self.data_loader).__name__,
            )
        keep = self.cfg.SOLVER.CHECKPOINT_KEEP
        for hook in self._hooks:
            if keep and isinstance(hook, PeriodicCheckpointer):  # knows only those that it saves
                folder = self.cfg.OUTPUT_DIR
                hook.recent_checkpoints = remove_old_checkpoints(folder, keep, self.start_iter)
        super().before_train()
        metrics = self._checkpoint.get("metrics")
        if metrics is None:
            return
        for name, metric in metrics.items():
            for value, self.storage.iter in metric["values"]:
                self.storage.put_scalar(name, value, smoothing_hint=metric["smoothing_hint"])
        self.iter = self.storage.iter = self.start_iter - 1
        for hook in self._hooks:
            if isinstance(hook, _AFTER_CHECKPOINT):
                hook.after_step()
        self.iter = self.storage.iter = self.start_iter

    def run_step(self) -> None:
        """One optimizer step."""
        steps = self.cfg.SOLVER.ACCUMULATE_STEPS
        if steps == 1:
            super().run_step()
            return
        self._trainer.iter = self.iter
        images = self.cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size() // steps
        accumulated_step(self._trainer, steps, images)

    def after_train(self) -> None:
        """Runs the hooks; detectron2 counts one iteration even if there was none to do."""
        self.iter = min(self.iter, self.max_iter)
        if self._stop.stops:  # whoever sent the signal does not wait for an evaluation
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, EvalHook)]
        super().after_train()

    def build_hooks(self) -> list[Optional[HookBase]]:
        """detectron2's hooks; `SharedStatistics`, `StopOnSignal`, `BestCheckpoint`, `RunRecord`.

        Raises:
            ConfigError: SOLVER.CHECKPOINT_KEEP is negative.
        """
        cfg, hooks = self.cfg, list[Optional[HookBase]]()
        keep = cfg.SOLVER.CHECKPOINT_KEEP
        if keep < 0:
            raise ConfigError(
                f"SOLVER.CHECKPOINT_KEEP is {keep}; allowed: the number of periodic checkpoints to "
                "keep, or 0 for all"
            )
        for hook in super().build_hooks():
            if isinstance(hook, PeriodicCheckpointer):
                hook.max_to_keep = keep or None
            if isinstance(hook, EvalHook):  # after the checkpoint and before the evaluation
                hooks.append(self._stop)
            if isinstance(hook, PeriodicWriter) and cfg.DATASETS.TEST:  # on the main process
                metric = "segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP"
                if len(cfg.DATASETS.TEST) > 1:
                    metric = f"{cfg.DATASETS.TEST[0]}/{metric}"
                hooks.append(BestCheckpoint(self.model, cfg.OUTPUT_DIR, metric))
            hooks.append(hook)
            if isinstance(hook, PreciseBN):
                self._precise_bn_loader = loader_of(hook)
                hooks.append(SharedStatistics(self.model, cfg.TEST.EVAL_PERIOD))
        if comm.is_main_process():
            hooks.append(RunRecord(cfg.OUTPUT_DIR, cfg.MODEL.DEVICE))
        return hooks

    def build_writers(self) -> list[EventWriter]:
        """detectron2's writers, without TensorBoard's if it cannot be imported."""
        try:
            import torch.utils.tensorboard  # noqa: F401
        except Exception as error:  # with the wrong NumPy or protobuf, any error is possible
            logger.warning(
                "No TensorBoard events are written: %s (pip install tensorboard)",
                _first_line(error),
            )
            metrics = str(Path(self.cfg.OUTPUT_DIR, METRICS))
            self._writers = [CommonMetricPrinter(self.max_iter), JSONWriter(metrics)]
        else:
            self._writers = super().build_writers()
        return self._writers

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model of `cfg`.

        Raises:
            ConfigError: a name is not registered, or a builder refuses a key of the config; its
                other errors are raised unchanged.
        """
        check_backbone(cfg)
        try:
            return super().build_model(cfg)
        except UserError:
            raise
        except (AssertionError, KeyError, ValueError) as error:
            if isinstance(error, KeyError):  # of a registry
                about_config = "No object named" in str(error)
            else:
                about_config = any("." in key and key in str(error) for key in as_flat_dict(cfg))
            if not about_config:
                raise
            raise ConfigError(
                f"no model can be built from this config: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Optional[list[DatasetEvaluator]] = None
    ) -> dict[str, Any]:
        """Evaluates a folded copy of `model` on every set of DATASETS.TEST.

        Args:
            cfg: DATASETS.TEST, TEST and OUTPUT_DIR are used.
            model: in training or evaluation mode; not modified.
            evaluators: one for each set; by default those of `build_evaluator`.

        Returns:
            Task -> metric -> value, or data set -> task -> metric -> value for several sets; empty
            on all processes but the main one.
        """
        results = super().test(cfg, folded_copy(model), evaluators)
        if comm.is_main_process():
            # without any prediction, detectron2 has no mask metrics and then fails to look them up
            for task, *_ in cfg.TEST.EXPECTED_RESULTS:
                results.setdefault(task, {})
            found = flatten_results_dict(results)
            unknown = [key for key, ap in found.items() if key.endswith("AP") and math.isnan(ap)]
            if unknown:
                logger.warning(
                    "%s: unknown, as the model has predicted nothing, which is usual after few "
                    "iterations, or the data have no object; the lowest score of a prediction is "
                    "MODEL.ROI_HEADS.SCORE_THRESH_TEST, %g",
                    ", ".join(unknown),
                    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
                )
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
            ConfigError: the data set is not in COCO format.
            UserError: a result would overwrite the annotations or MODEL.WEIGHTS.
        """
        evaluator = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
        if evaluator not in ("coco", "coco_panoptic_seg"):
            raise ConfigError(
                f"DATASETS.TEST names {dataset_name!r}, which needs the evaluator {evaluator!r}; "
                "allowed: data sets in COCO format"
            )
        folder = f"{cfg.OUTPUT_DIR}/inference"
        if len(cfg.DATASETS.TEST) > 1:
            folder += f"/{dataset_name}"
        inputs = MetadataCatalog.get(dataset_name).get("json_file"), cfg.MODEL.WEIGHTS
        outputs = "coco_instances_results.json", "instances_predictions.pth"
        refuse_overwrite([f"{folder}/{name}" for name in outputs], inputs)
        return COCOEvaluator(
            dataset_name,
            output_dir=folder,
            use_fast_impl=has_compiled_ops(),
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )


@contextmanager
def explained_end(loop: TrainerBase, stop: StopOnSignal, remedy: str) -> Iterator[None]:
    """Within it, `loop` trains; signals end it by its hook `stop`, and divergence is a user error.

    Args:
        loop: as in `TrainerBase.train`.
        stop: without effect if it is none of the hooks of `loop`.
        remedy: against divergence, by config keys.

    Raises:
        DivergedError: a loss, box or score became infinite or NaN; names the iteration.
        Stopped: a signal has ended the training.
    """
    stoppable = on_signals(stop.request) if stop in loop._hooks else nullcontext()
    with user_errors_unlogged(), stoppable:
        try:
            yield
        except Stopped:
            comm.synchronize()  # the end of one process ends the others
            raise
        except FloatingPointError as error:
            if not is_divergence(error):
                raise
            message = str(error)  # has `loss_dict = {...}` if detectron2 knows the losses
            number = r"(?:np\.\w+\()?(nan|-?inf)"
            losses = [f"{k} is {value}" for k, value in re.findall(rf"'(\w+)': {number}", message)]
            found = ", ".join(losses) or _first_line(error)
            raise DivergedError(
                f"training diverged at iteration {loop.iter}: {found}; {remedy}"
            ) from error


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    """A copy, frozen if `cfg` is; logs the seed."""
    logger.info("SEED is -1: the run has the seed %d", seed)
    seeded = cfg.clone()
    seeded.defrost()
    seeded.SEED = seed
    if cfg.is_frozen():
        seeded.freeze()
    return seeded


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
