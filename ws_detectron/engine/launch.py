"""Starts the processes of a run: CPU or GPU, one machine or several, with or without torchrun."""

import argparse
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.utils import comm

from ws_detectron.errors import UserError, find_user_error
from ws_detectron.utils.compat import create_local_process_group, destroy_process_groups

from .checks import Purpose, check_device
from .prepare import prepare
from .signals import Stopped, on_signals

TIMEOUT = timedelta(minutes=30)


def start(
    main: Callable[..., Any],
    cfg: CfgNode,
    options: argparse.Namespace,
    purpose: Purpose,
    *,
    args: tuple = (),
) -> Any:
    """Prepares a config, then runs `main(cfg, *args)` in every process.

    Args:
        main: a function of a module, so that other processes can import it. It must call
            `prepare`, which registers the data sets in each process; under torchrun, where the
            processes exist already, that call also does the checks.
        cfg: a merged config.
        options: with `num_gpus`, `num_machines`, `machine_rank` and `dist_url` of detectron2's
            argument parser; torchrun's environment variables override them.
        purpose: see `prepare`.
        args: further arguments for `main`.

    Returns:
        What `main` returned, if it ran in this process.

    Raises:
        UserError: the config cannot work here; see `prepare` and `launch`.
    """
    if started_by_torchrun():
        check_device(cfg, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    else:
        check_device(cfg, options.num_gpus)
        cfg = prepare(cfg, purpose, options.num_gpus * options.num_machines)
    return launch(
        main,
        options.num_gpus,
        device=cfg.MODEL.DEVICE,
        num_machines=options.num_machines,
        machine_rank=options.machine_rank,
        dist_url=options.dist_url,
        args=(cfg, *args),
    )


def started_by_torchrun() -> bool:
    """Whether `torchrun` started this process and gave it a rank."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"))


def launch(
    main: Callable[..., Any],
    num_processes: int,
    *,
    device: str,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
) -> Any:
    """Runs `main(*args)` in every process of a distributed job.

    Under torchrun the processes exist already, and its environment variables replace
    `num_processes`, `num_machines`, `machine_rank` and `dist_url`. detectron2's own `launch`
    refuses CPU jobs in 0.5 and 0.6, and does not say which process was killed.

    Args:
        main: a function of a module, so that other processes can import it.
        num_processes: processes on each machine; one per GPU, or on the CPU sharing its cores.
        device: `MODEL.DEVICE`, "cpu" or "cuda".
        num_machines: machines in the job.
        machine_rank: number of this machine, from 0.
        dist_url: address of the process group; "auto" picks a free port on a single machine.
        args: arguments for `main`.

    Returns:
        What `main` returned, if it ran in this process.

    Raises:
        UserError: `dist_url` is "auto" on several machines.
        SystemExit: a process printed its own error message, or was killed, which is printed here;
            or a signal ended the training (`signals`), which is passed on to all processes.
    """
    if started_by_torchrun():
        default = torch.cuda.device_count() if device.startswith("cuda") else 1
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", default))
        _join_job(device, int(os.environ["LOCAL_RANK"]), processes)
        try:
            return main(*args)
        finally:
            destroy_process_groups()
    if num_processes * num_machines == 1:
        return main(*args)
    if dist_url == "auto":
        if num_machines > 1:
            raise UserError(
                "--dist-url auto works on one machine only; give tcp://<machine 0>:<port>"
            )
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    first, world_size = machine_rank * num_processes, num_processes * num_machines
    job = {"init_method": dist_url, "world_size": world_size}
    context = mp.spawn(
        _run_process, (main, args, device, num_processes, first, job), num_processes, join=False
    )
    received: list[int] = []

    def pass_on(number: int) -> None:
        received.append(number)
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    try:
        with on_signals(pass_on):
            while not context.join():
                pass
        if received:  # before the training, which handles it
            sys.exit(128 + received[0])
    except mp.ProcessExitedException as error:
        if error.signal_name is None:
            sys.exit(error.exit_code)
        _report_killed(first + error.error_index, world_size, error.error_pid, error.exit_code)
        sys.exit(128 - error.exit_code)
    except mp.ProcessRaisedException:
        # It may have failed because another was killed; the rest were ended by SIGTERM.
        for rank, process in enumerate(context.processes, start=first):
            code = process.exitcode
            if code is not None and code < 0 and code != -signal.SIGTERM:
                _report_killed(rank, world_size, process.pid, code)
        raise


def _report_killed(rank: int, world_size: int, pid: Optional[int], exit_code: int) -> None:
    why = ", as the system does when memory runs out" if exit_code == -signal.SIGKILL else ""
    sys.stderr.write(
        f"error: rank {rank} of {world_size} (process {pid}) was killed by "
        f"{signal.Signals(-exit_code).name}{why}\n"
    )


def _run_process(
    local_rank: int,
    main: Callable[..., Any],
    args: tuple,
    device: str,
    processes: int,
    first: int,
    job: dict[str, Any],
) -> None:
    """What a started process does; `first` is the rank of the first one on this machine."""
    _end_with_parent()
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    _join_job(device, local_rank, processes, rank=first + local_rank, **job)
    try:
        main(*args)
    except Exception as error:
        known = find_user_error(error)
        if known is None:
            raise
        sys.stderr.write(f"error: {known}\n")  # the parent would add a traceback
        sys.stderr.flush()
        os._exit(known.exit_status)  # at once: other processes may wait for this one
    except Stopped:  # on every process
        destroy_process_groups()
        raise
    destroy_process_groups()


def _join_job(device: str, local_rank: int, processes: int, **job: Any) -> None:
    """Makes this process part of the job; without `job`, as torchrun's variables say."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, **job)
    create_local_process_group(processes)
    comm.synchronize()


def _end_with_parent() -> None:
    """Ends this process when its parent has ended, even if that was killed.

    torch has Linux send a SIGINT then, which jobs that a shell starts with `&` ignore.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
