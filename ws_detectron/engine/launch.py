"""Starts the processes of a run: CPU or GPU, one machine or several, with or without torchrun."""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.engine import launch as launch_on_gpus
from detectron2.utils import comm

from ws_detectron.errors import UserError, find_user_error
from ws_detectron.utils.compat import create_local_process_group, destroy_process_groups

from .checks import Purpose, check_device
from .prepare import prepare

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


def started_by_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `torchrun` started this process and gave it a rank."""
    return all(name in environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"))


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
    `num_processes`, `num_machines`, `machine_rank` and `dist_url`. Otherwise detectron2's `launch`
    starts CUDA jobs; CPU jobs, which it refuses in 0.5 and 0.6, are started here with the gloo
    backend.

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
        SystemExit: a process printed its own error message, or was killed, which is printed here.
    """
    if started_by_torchrun():
        return _run_under_torchrun(main, device, args)
    if num_processes * num_machines == 1:
        return main(*args)
    if dist_url == "auto" and num_machines > 1:
        raise UserError("--dist-url auto works on one machine only; give tcp://<machine 0>:<port>")
    processes: list[multiprocessing.Process] = []
    first, world_size = machine_rank * num_processes, num_processes * num_machines
    try:
        if device.startswith("cuda"):
            launch_on_gpus(
                _run_on_gpu,
                num_processes,
                num_machines=num_machines,
                machine_rank=machine_rank,
                dist_url=dist_url,
                args=(main, args),
            )
        else:
            if dist_url == "auto":
                dist_url = f"tcp://127.0.0.1:{_free_port()}"
            context = mp.spawn(
                _run_on_cpu,
                args=(main, num_processes, num_machines, machine_rank, dist_url, args),
                nprocs=num_processes,
                join=False,
            )
            processes = context.processes
            while not context.join():
                pass
    except mp.ProcessExitedException as error:
        if error.signal_name is None:
            sys.exit(error.exit_code)
        _report_killed(first + error.error_index, world_size, error.error_pid, error.exit_code)
        sys.exit(128 - error.exit_code)
    except mp.ProcessRaisedException:
        # It may have failed because another was killed; the rest were ended by SIGTERM.
        for rank, process in enumerate(processes, start=first):
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


def _run_on_cpu(
    local_rank: int,
    main: Callable[..., Any],
    num_processes: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    args: tuple,
) -> None:
    _end_with_parent()
    torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    dist.init_process_group(
        "gloo",
        init_method=dist_url,
        world_size=num_processes * num_machines,
        rank=machine_rank * num_processes + local_rank,
        timeout=TIMEOUT,
    )
    create_local_process_group(num_processes)
    comm.synchronize()
    _run_quietly(main, args)
    destroy_process_groups()


def _run_on_gpu(main: Callable[..., Any], args: tuple) -> None:
    _end_with_parent()
    _run_quietly(main, args)


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


def _run_under_torchrun(main: Callable[..., Any], device: str, args: tuple) -> Any:
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    create_local_process_group(
        int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() if on_gpu else 1))
    )
    comm.synchronize()
    try:
        return main(*args)
    finally:
        destroy_process_groups()


def _run_quietly(main: Callable[..., Any], args: tuple) -> None:
    """Ends a spawned process with the message of a user error; the parent would add a traceback."""
    try:
        main(*args)
    except Exception as error:
        known = find_user_error(error)
        if known is None:
            raise
        sys.stderr.write(f"error: {known}\n")
        sys.stderr.flush()
        os._exit(known.exit_status)  # at once: other processes may wait for this one


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
