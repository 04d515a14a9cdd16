"""One run: how the tools start it, and what each of its processes does."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ws_detectron.errors import find_disk_error, find_user_error, write_error
from ws_detectron.modeling.summary import summary_line
from ws_detectron.utils.compat import strip_colours
from ws_detectron.utils.io import write_json, write_text

from .checks import Purpose
from .inference import load_model_for_inference
from .launch import start, started_by_torchrun
from .output_dir import EVALUATION, delete_run, open_output_dir, reserved
from .prepare import prepare
from .trainer import Trainer

logger = logging.getLogger(__name__)


def start_run(cfg: CfgNode, args: argparse.Namespace) -> Any:
    """Starts `run` in the number of processes that `args` or torchrun ask for."""
    if not started_by_torchrun():
        open_output_dir(cfg.OUTPUT_DIR, args)  # before data is read
        _set_up_log(cfg, args)
    return start(run, cfg, args, _purpose(args), args=(args,))


def run(cfg: CfgNode, args: argparse.Namespace) -> Any:
    """Trains, or with `args.eval_only` evaluates, and checks TEST.EXPECTED_RESULTS.

    OUTPUT_DIR/config.yaml gets the config as it runs, scaled to the batch and to the number of
    processes. An evaluation writes config.yaml and log.txt to OUTPUT_DIR/inference instead, to keep
    those of a training in OUTPUT_DIR, and its results as results.json beside them.

    Args:
        cfg: a merged config.
        args: with `eval_only`, `resume` and `config_file` of detectron2's argument parser, and
            optionally `overwrite`, which deletes a run in OUTPUT_DIR first.

    Returns:
        The results of the last evaluation, on the main process; None if the run was already
        finished.

    Raises:
        UserError: weights, data or config cannot work, training diverged, OUTPUT_DIR holds a run
            and neither `resume` nor `overwrite` is set, or another process trains there.
        SystemExit: status 1, if a result is not the expected one.
    """
    open_output_dir(cfg.OUTPUT_DIR, args)
    try:
        if args.eval_only or not comm.is_main_process():
            return _run(cfg, args)
        with reserved(cfg.OUTPUT_DIR):
            if getattr(args, "overwrite", False):
                delete_run(cfg.OUTPUT_DIR, keep=cfg.MODEL.WEIGHTS)
            return _run(cfg, args)
    except Exception as error:
        full = find_disk_error(error)
        if full is not None:
            raise write_error(full, full.filename or cfg.OUTPUT_DIR) from error
        if find_user_error(error) is None and comm.is_main_process():
            sys.stderr.write(f"the log of this run is {_log_folder(cfg, args)}/log.txt\n")
        raise


def _run(cfg: CfgNode, args: argparse.Namespace) -> Any:
    _set_up_log(cfg, args)
    cfg = prepare(cfg, _purpose(args))
    cfg.freeze()
    set_up = cfg.clone()
    set_up.defrost()
    set_up.OUTPUT_DIR = _log_folder(cfg, args)
    written = Path(set_up.OUTPUT_DIR, "config.yaml")
    earlier = written.read_text("utf-8") if written.is_file() else ""
    # the full config is logged, so its file need not be
    logging.getLogger("detectron2").addFilter(strip_colours)
    default_setup(set_up, argparse.Namespace(**{**vars(args), "config_file": ""}))
    logger.info("Config file: %s", args.config_file or "none")
    if not args.eval_only:
        if args.resume and earlier and comm.is_main_process():
            # restores the config of the last start until this one is known to work
            write_text(written, earlier)
        trainer = Trainer(cfg)
        logger.info("Model: %s", summary_line(trainer.model))
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    results = Trainer.test(cfg, load_model_for_inference(cfg, resume=args.resume))
    if comm.is_main_process():
        write_json(Path(cfg.OUTPUT_DIR, EVALUATION), results)
        verify_results(cfg, results)
    return results


def _purpose(args: argparse.Namespace) -> Purpose:
    return Purpose.EVALUATE if args.eval_only else Purpose.TRAIN


def _log_folder(cfg: CfgNode, args: argparse.Namespace) -> str:
    return os.path.join(cfg.OUTPUT_DIR, "inference") if args.eval_only else cfg.OUTPUT_DIR


def _set_up_log(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Sets up the logger of this package; `default_setup` sets up detectron2's."""
    setup_logger(_log_folder(cfg, args), distributed_rank=comm.get_rank(), name="ws_detectron")
