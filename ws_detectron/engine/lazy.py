"""Runs of LazyConfigs, detectron2's configs in Python: `tools/lazyconfig_train_net.py`.

A LazyConfig builds its model, loaders and optimizer itself, so `Trainer` and `prepare`, which read
a `CfgNode`, have no part here; hooks, folders, checkpoints and checks of data are the same.
"""

import argparse
import copy
import difflib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Optional

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    HookBase,
    SimpleTrainer,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from detectron2.utils.registry import locate
from fvcore.nn.precise_bn import get_bn_modules
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ws_detectron.checkpoint import WSCheckpointer
from ws_detectron.data import use_annotations
from ws_detectron.errors import ConfigError
from ws_detectron.modeling import fold_ws, folded_copy
from ws_detectron.modeling.summary import frozen_parts, summary_line
from ws_detectron.utils.compat import has_compiled_ops, strip_colours
from ws_detectron.utils.io import write_json

from .checks import (
    SMALL_BATCH,
    check_annotations,
    check_datasets,
    check_machine,
    check_weights_path,
)
from .hooks import BestCheckpoint, RunRecord, is_finished
from .launch import launch, started_by_torchrun
from .loaders import NamingMapper, check_classes
from .output_dir import (
    EVALUATION,
    METRICS,
    cut_metrics,
    delete_run,
    open_output_dir,
    remove_partial_files,
    reserved,
    warn_of_start,
)
from .prepare import find_config
from .signals import StopOnSignal
from .trainer import explained_end

logger = logging.getLogger(__name__)

_TRAIN_DATA, _TEST_DATA = "dataloader.train.dataset.names", "dataloader.test.dataset.names"
_NEEDED = (
    *("model", "dataloader.train", "optimizer.params", "lr_multiplier", "train.output_dir"),
    *("train.init_checkpoint", "train.max_iter", "train.amp.enabled", "train.ddp"),
    *("train.checkpointer", "train.eval_period", "train.log_period", "train.device"),
)


def load_lazy_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Reads a LazyConfig and applies overrides.

    A LazyConfig is a program, also as YAML, which names the functions to call: use only those that
    you trust.

    Args:
        config_file: a Python file, the `config.yaml` of a run, or the name of a config that comes
            with this package.
        overrides: as `train.max_iter=100`, in the grammar of Hydra; `+key=value` adds a key that
            resembles another one.

    Raises:
        UserError: there is no such file.
        ConfigError: the file is no LazyConfig, or lacks a key that every training needs; an
            override cannot be applied, or its key is probably misspelled.
    """
    path = find_config(config_file)
    if Path(path).suffix not in (".py", ".yaml", ".yml"):
        raise ConfigError(f"config file {config_file} must end in .py, .yaml or .yml")
    cfg = LazyConfig.load(path)
    if not isinstance(cfg, DictConfig) or "train" not in cfg:
        raise ConfigError(
            f"config file {config_file} is no LazyConfig, as it defines no `train`; "
            "tools/train_net.py takes detectron2's YAML configs"
        )
    for override in overrides:
        key = override.partition("=")[0]
        try:
            near = [] if key.startswith("+") else _similar_keys(cfg, key)
            if near:
                raise ConfigError(
                    f"override {override}: {key} is not a key of the config; did you mean "
                    f"{' or '.join(near)}? To add it, write +{override}"
                )
            LazyConfig.apply_overrides(cfg, [override])
        except (ConfigError, ImportError):
            raise
        except Exception as error:  # of Hydra's parser, OmegaConf, or literal_eval
            raise ConfigError(
                f"override {override}: {' '.join(str(error).split())}; allowed: key=value, as in "
                "train.max_iter=100"
            ) from error
    missing = [key for key in _NEEDED if OmegaConf.select(cfg, key) is None]
    if missing:
        raise ConfigError(
            f"config file {config_file} lacks {', '.join(missing)}; see common/train.py in "
            "detectron2's model zoo"
        )
    return cfg


def _similar_keys(cfg: DictConfig, key: str) -> list[str]:
    """The keys beside a missing one that it may be a misspelling of."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig) or name in node:
        return []
    near = difflib.get_close_matches(name, map(str, node), n=2, cutoff=0.8)
    return [f"{parent}.{other}".lstrip(".") for other in near]


def start_lazy_run(args: argparse.Namespace) -> Any:
    """Starts `run_lazy` in the number of processes that `args` or torchrun ask for.

    Args:
        args: of detectron2's argument parser; optionally with `overwrite`.

    Raises:
        UserError: see `run_lazy` and `launch`.
    """
    cfg = load_lazy_config(args.config_file, args.opts or [])
    torchrun = started_by_torchrun()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if torchrun else args.num_gpus
    check_machine(cfg.train.device, processes, key="train.device", remedy="train.device=cpu")
    if not torchrun:
        _check(cfg, args, args.num_gpus * args.num_machines)  # before processes are started
    return launch(
        run_lazy,
        args.num_gpus,
        device=cfg.train.device,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),  # the config may hold functions, which other processes cannot receive
    )


def run_lazy(args: argparse.Namespace) -> Optional[dict[str, Any]]:
    """Trains, or with `args.eval_only` evaluates, what a LazyConfig defines.

    As detectron2's `tools/lazyconfig_train_net.py`, with the checks of this package.

    Args:
        args: with `config_file`, `opts`, `resume`, `eval_only` and optionally `overwrite`.

    Returns:
        The results of the last evaluation, on the main process.

    Raises:
        UserError: config, weights or data cannot work, training diverged, the output folder holds
            a run and neither `resume` nor `overwrite` is set, or another process trains there.
        Stopped: a signal has ended the training.
    """
    cfg = load_lazy_config(args.config_file, args.opts or [])
    _check(cfg, args, comm.get_world_size())
    if args.eval_only:
        return _evaluate(cfg, args)
    output_dir = cfg.train.output_dir
    with reserved(output_dir) if comm.is_main_process() else nullcontext():
        if comm.is_main_process():
            if getattr(args, "overwrite", False):
                delete_run(output_dir, keep=cfg.train.init_checkpoint)
            remove_partial_files(output_dir)
            cut_metrics(Path(output_dir, METRICS))
        return _train(cfg, args)


def _check(cfg: DictConfig, args: argparse.Namespace, world_size: int) -> None:
    """What can be known without building anything; every process must call it."""
    train, weights = cfg.train, cfg.train.init_checkpoint
    if train.amp.enabled and train.device == "cpu" and not args.eval_only:
        raise ConfigError("train.amp.enabled is True, which needs train.device=cuda")
    check_weights_path("train.init_checkpoint", weights)
    for key in (_TEST_DATA,) if args.eval_only else (_TRAIN_DATA, _TEST_DATA):
        check_datasets(key, _names(cfg, key))
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    if not args.eval_only and batch is not None and batch % world_size:
        raise ConfigError(
            f"dataloader.train.total_batch_size is {batch}, not a multiple of the {world_size} "
            "processes"
        )
    open_output_dir(train.output_dir, args)


def _names(cfg: DictConfig, key: str) -> list[str]:
    """Names of the data sets, as in detectron2's common/data; none in loaders of another form."""
    names = OmegaConf.select(cfg, key)
    return [names] if isinstance(names, str) else list(names or ())


def test_sets(cfg: DictConfig) -> list[str]:
    """Names of the data sets that a LazyConfig evaluates on, as one."""
    return _names(cfg, _TEST_DATA)


def _set_up(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Sets up logs, and writes config.yaml; an evaluation keeps those of the training."""
    cfg, args = copy.deepcopy(cfg), copy.copy(args)
    if args.eval_only:
        cfg.train.output_dir = os.path.join(cfg.train.output_dir, "inference")
    args.config_file = find_config(args.config_file)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="ws_detectron")
    logging.getLogger("detectron2").addFilter(strip_colours)
    default_setup(cfg, args)


def _build_model(cfg: DictConfig) -> nn.Module:
    model = instantiate(cfg.model).to(cfg.train.device)
    logger.info("Model: %s", summary_line(model))
    return model


def _check_data(cfg: DictConfig, model: nn.Module, train: bool) -> None:
    """Checks annotation files, of which the main process reads all; every process must call it."""
    mapper, copies = _mapper(cfg.dataloader.train), {}
    if comm.is_main_process():
        copies = check_annotations(
            cfg.train.output_dir,
            _names(cfg, _TRAIN_DATA) if train else (),
            _names(cfg, _TEST_DATA),
            classes=_number_of_classes(model) or 0,
            masks=mapper.get("use_instance_mask", False),
            keypoints=mapper.get("use_keypoint", False),
            mask_format=mapper.get("instance_mask_format", "polygon"),
        )
    use_annotations(comm.all_gather(copies)[0])


def _number_of_classes(model: nn.Module) -> Optional[int]:
    return getattr(getattr(model, "roi_heads", model), "num_classes", None)


def _mapper(loader: DictConfig) -> Mapping[str, Any]:
    """The arguments of a loader's mapper; empty if it has none, or a function."""
    mapper = loader.get("mapper")
    return mapper if isinstance(mapper, DictConfig) else {}


def _build_loader(node: DictConfig) -> Any:
    """A data loader whose errors name the image file, if it has a mapper."""
    if node.get("mapper") is None:
        return instantiate(node)
    masks = _mapper(node).get("use_instance_mask", False)
    return instantiate({**node, "mapper": NamingMapper(instantiate(node.mapper), masks)})


def _warn(cfg: DictConfig, model: nn.Module) -> None:
    """Warns of what runs but trains badly, as `checks.find_warnings` does for other configs."""
    frozen = frozen_parts(model)
    if frozen and not cfg.train.init_checkpoint:
        logger.warning(
            "train.init_checkpoint is empty, so what is frozen would stay random: %s; set "
            "freeze_at of the ResNet to 0, or name weights",
            ", ".join(frozen),
        )
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    if get_bn_modules(model) and batch and batch // comm.get_world_size() <= SMALL_BATCH:
        logger.warning(
            "BN computes its statistics over %d image(s) at a time (dataloader.train."
            "total_batch_size %d over %d process(es)), too few to train well; use GN with WS "
            "(configs/lazy/mask_rcnn_R_50_FPN_100ep_LSJ_gn_ws.py)",
            batch // comm.get_world_size(),
            batch,
            comm.get_world_size(),
        )


def _train(cfg: DictConfig, args: argparse.Namespace) -> Optional[dict[str, Any]]:
    output_dir, max_iter = cfg.train.output_dir, cfg.train.max_iter
    _set_up(cfg, args)
    model = _build_model(cfg)
    _check_data(cfg, model, train=True)
    if comm.is_main_process():
        _warn(cfg, model)
    parameters = copy.deepcopy(cfg.optimizer)
    parameters.params.model = model
    optimizer = instantiate(parameters)
    loader = _build_loader(cfg.dataloader.train)
    names = _names(cfg, _TRAIN_DATA)
    check_classes(names, "num_classes of the model", _number_of_classes(model))
    ddp = {"device_ids": None} if cfg.train.device == "cpu" else {}
    model = create_ddp_model(model, **{**ddp, **cfg.train.ddp})
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = WSCheckpointer(model, output_dir, trainer=trainer)
    results: list[dict[str, Any]] = []

    def test() -> dict[str, Any]:
        results[:] = [_test(cfg, folded_copy(model))]
        return results[0]

    stop = StopOnSignal(checkpointer, cfg.train.checkpointer.period, cfg.train.device)
    trainer.register_hooks(_hooks(cfg, model, checkpointer, stop, test))
    configured = [dict(group) for group in optimizer.param_groups]
    resumes = args.resume and checkpointer.has_checkpoint()
    if args.resume and not resumes and comm.is_main_process():
        warn_of_start(output_dir)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    start = trainer.iter + 1 if resumes else 0
    if resumes:  # LR, momentum and weight decay are those of the config; the schedule is anyway
        for group, values in zip(optimizer.param_groups, configured):
            values = {key: value for key, value in values.items() if key != "params"}
            group.update(values, initial_lr=values["lr"])
    if is_finished(output_dir, start, max_iter, "train.max_iter"):
        return None
    remedy = "lower optimizer.lr or lengthen lr_multiplier.warmup_length"
    with explained_end(trainer, stop, remedy):
        trainer.train(start, max_iter)
    return results[0] if results and comm.is_main_process() else None


def _hooks(
    cfg: DictConfig,
    model: nn.Module,
    checkpointer: WSCheckpointer,
    stop: HookBase,
    test: Callable[[], dict[str, Any]],
) -> list[Optional[HookBase]]:
    train = cfg.train
    found: list[Optional[HookBase]] = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
    ]
    if comm.is_main_process():
        found.append(hooks.PeriodicCheckpointer(checkpointer, **train.checkpointer))
    found += [stop, hooks.EvalHook(train.eval_period, test)]
    if comm.is_main_process():
        masks = _mapper(cfg.dataloader.train).get("use_instance_mask")
        metric = "segm/AP" if masks else "bbox/AP"
        writers = default_writers(train.output_dir, train.max_iter)
        found += [
            BestCheckpoint(model, train.output_dir, metric),
            hooks.PeriodicWriter(writers, period=train.log_period),
            RunRecord(train.output_dir, train.device),
        ]
    return found


def _evaluate(cfg: DictConfig, args: argparse.Namespace) -> Optional[dict[str, Any]]:
    _set_up(cfg, args)
    model = _build_model(cfg)
    _check_data(cfg, model, train=False)
    checkpointer = WSCheckpointer(
        model, cfg.train.output_dir, save_to_disk=False, fold=True, whole=True
    )
    if not cfg.train.init_checkpoint and not (args.resume and checkpointer.has_checkpoint()):
        raise ConfigError(
            "train.init_checkpoint is empty; name a checkpoint: "
            f"train.init_checkpoint={cfg.train.output_dir}/model_final.pth"
        )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    results = _test(cfg, fold_ws(model))
    if comm.is_main_process():
        write_json(Path(cfg.train.output_dir, EVALUATION), results)
    return results or None


def _test(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Evaluates a folded model on the test set, if the config has evaluators."""
    nodes = OmegaConf.select(cfg, "dataloader.evaluator")
    if nodes is None:
        return {}
    nodes = nodes if isinstance(nodes, ListConfig) else [nodes]
    evaluators = [_build_evaluator(node, cfg.train.output_dir) for node in nodes]
    with torch.no_grad():
        results = inference_on_dataset(model, _build_loader(cfg.dataloader.test), evaluators)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _build_evaluator(node: DictConfig, output_dir: str) -> Any:
    """An evaluator; COCO's writes predictions, and runs without compiled ops."""
    target = node._target_
    if (locate(target) if isinstance(target, str) else target) is not COCOEvaluator:
        return instantiate(node)
    folder = os.path.join(output_dir, "inference")
    return instantiate({"output_dir": folder, "use_fast_impl": has_compiled_ops(), **node})
