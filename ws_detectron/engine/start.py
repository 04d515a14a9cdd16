"""From a command line's options to checked, running processes."""

import argparse
import os
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode

from ws_detectron.data import register_coco_sets

from .checks import check_run
from .launch import launch, started_by_torchrun


def start(
    main: Callable[..., Any],
    cfg: CfgNode,
    options: argparse.Namespace,
    *,
    eval_only: bool,
    args: tuple = (),
) -> Any:
    """Checks `cfg` against this machine, then runs `main(cfg, *args)` in every process.

    Args:
        main: a function of a module, so that other processes can import it.
        cfg: a merged config.
        options: with `num_gpus`, `num_machines`, `machine_rank` and `dist_url` of detectron2's
            argument parser; torchrun's environment variables overrule them.
        eval_only: whether no training is asked for.
        args: further arguments for `main`.

    Returns:
        What `main` returned, where it ran in this very process.

    Raises:
        UserError: the config cannot work here; see `check_run` and `launch`.
    """
    num_gpus = options.num_gpus
    world_size = num_gpus * options.num_machines
    if started_by_torchrun():
        world_size = int(os.environ["WORLD_SIZE"])
        num_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check_run(cfg, num_gpus=num_gpus, world_size=world_size, eval_only=eval_only)
    return launch(
        _with_data_sets,
        options.num_gpus,
        device=cfg.MODEL.DEVICE,
        num_machines=options.num_machines,
        machine_rank=options.machine_rank,
        dist_url=options.dist_url,
        args=(main, cfg, *args),
    )


def _with_data_sets(main: Callable[..., Any], cfg: CfgNode, *args: Any) -> Any:
    """A process that `launch` starts knows no data set that this one has registered."""
    register_coco_sets(cfg.DATASETS.REGISTER)
    return main(cfg, *args)
