"""What differs between detectron2 0.5, 0.6 and its main branch, in one place."""

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch.distributed as dist
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.config.defaults import _C
from detectron2.engine import defaults
from detectron2.engine.hooks import PreciseBN
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter

from ws_detectron.errors import find_user_error


@functools.cache
def has_compiled_ops() -> bool:
    """Whether detectron2's C++ ops are built; the fast COCO evaluator needs them."""
    try:
        from detectron2 import _C

        return hasattr(_C, "COCOevalAccumulate")
    except (ImportError, NotImplementedError):  # NotImplementedError: the pure-Python build
        return False


def with_norms(cfg: CfgNode, norms: Mapping[str, object]) -> CfgNode:
    """A copy of `cfg` with functions in place of norm names, for detectron2's builders.

    In all versions, the builders of ResNet, FPN and RetinaNet read the norm from the config alone
    and pass it to layers that accept a function as well as a name. A config node refuses functions
    as attributes; its items are not checked.

    Args:
        cfg: may be frozen.
        norms: full key -> a name, or a function of the channel count.
    """
    cfg = cfg.clone()
    for key, norm in norms.items():
        node, _, name = key.rpartition(".")
        attrgetter(node)(cfg)[name] = norm
    return cfg


def default_config() -> CfgNode:
    """The config that `get_cfg` copies; keys added to it are in every config.

    In all versions it is a global variable of `detectron2.config.defaults`.
    """
    return _C


def extend_key_errors(addition: Callable[[str], str]) -> None:
    """Extends the error of a key that a config does not have, also in scripts of others.

    In all versions `merge_from_file` ends in `merge_from_other_cfg`, and both this and
    `merge_from_list` are inherited; their messages end with the key.

    Args:
        addition: takes the message; returns what to add to it.
    """

    def extended(merge: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(merge)
        def merged(self: CfgNode, given: Any) -> None:
            try:
                merge(self, given)
            except (KeyError, AssertionError) as error:
                error.args = (f"{error.args[0]}{addition(error.args[0])}",) if error.args else ()
                raise

        return merged

    for name in ("merge_from_other_cfg", "merge_from_list"):
        setattr(CfgNode, name, extended(getattr(CfgNode, name)))


def before_training(check: Callable[[CfgNode], None]) -> None:
    """Has `check` called with the config of each training, also by scripts of others.

    Every training builds an LR scheduler. In all versions, scripts import its builder from
    `detectron2.solver`, and `DefaultTrainer` from its own module.
    """

    @functools.wraps(solver.build_lr_scheduler)
    def checked(cfg: CfgNode, *args: Any) -> Any:
        check(cfg)
        return build(cfg, *args)

    build = solver.build_lr_scheduler
    solver.build_lr_scheduler = defaults.build_lr_scheduler = checked


def create_local_process_group(processes_per_machine: int) -> None:
    """Tells `detectron2.utils.comm` which processes share this machine.

    The main branch has a function for it; in 0.5 and 0.6 `launch` sets a variable.

    Args:
        processes_per_machine: the same number on every machine.
    """
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes_per_machine)
        return
    for first in range(0, dist.get_world_size(), processes_per_machine):
        ranks = list(range(first, first + processes_per_machine))
        group = dist.new_group(ranks)  # every process must take part in making every group
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def loader_of(hook: PreciseBN) -> Any:
    """The data loader of a PreciseBN hook, of which it keeps an iterator; None if it has no BN.

    In all versions it is a private attribute of the hook, which `DefaultTrainer` builds.
    """
    return getattr(hook, "_data_loader", None)


def skip_written(writers: Iterable[EventWriter], iteration: int) -> None:
    """Has writers skip what an earlier start of the run has written, up to an iteration.

    In all versions those for metrics.json and TensorBoard know it by a private attribute.
    """
    for writer in writers:
        if isinstance(writer, (JSONWriter, TensorboardXWriter)):
            writer._last_write = iteration


def is_divergence(error: BaseException) -> bool:
    """Whether an error says that a loss, box or score became infinite or NaN.

    By the texts of 0.5, 0.6 and the main branch; code of others raises FloatingPointError too.
    """
    texts = "Loss became infinite or NaN", "Training has diverged"
    return isinstance(error, FloatingPointError) and any(text in str(error) for text in texts)


@contextmanager
def user_errors_unlogged() -> Iterator[None]:
    """Within it, detectron2's training loop logs no traceback of a user error.

    The loop logs every exception, but the tools print user errors as one message. A
    FloatingPointError is divergence; the main branch logs it as soon as it is raised.
    """

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return True
        return not is_divergence(error) and find_user_error(error) is None

    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(keep)
    try:
        yield
    finally:
        loop.removeFilter(keep)


def strip_colours(record: logging.LogRecord) -> bool:
    """A filter for the logger "detectron2", which highlights configs also in log.txt.

    In all versions `default_setup` adds colour codes where pygments is installed.
    """
    record.msg = re.sub(r"\x1b\[[\d;]*m", "", str(record.msg))
    return True


def destroy_process_groups() -> None:
    """Drops all references to process groups, which ends their gloo threads.

    In all versions `detectron2.utils.comm` keeps two. A thread that frees a tensor while Python
    shuts down aborts the process.
    """
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    dist.destroy_process_group()
