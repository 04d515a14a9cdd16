"""Time per epoch of the Fashion-MNIST classifier's arms, and of the same network in Keras."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from ws_detectron.errors import UserError
from ws_detectron.lab.fashion_mnist.loop import (
    Progress,
    Schedule,
    build_optimizer,
    compile_model,
    train_epoch,
)
from ws_detectron.lab.fashion_mnist.model import build_classifier
from ws_detectron.lab.fashion_mnist.training_data import Images
from ws_detectron.lab.fashion_mnist.training_settings import TRAIN_IMAGES

from .timing import Action, interleave, ratio, spread

KERAS_ARMS = ("bn", "gn_ws")
KERAS = Path(__file__).resolve().parents[3] / "tools" / "keras_classifier.py"
MOST_STEPS, MOST_IMAGES = 1000, 12800
"""Of a run, whichever comes first: 1000 steps at batch 2, 400 at 32, 100 at 128; about ten seconds.
Not fewer, as Keras does some work at the beginning of each, which in an epoch comes once."""


def measure_classifier(
    arms: Sequence[str],
    batch_size: int,
    device: str,
    rounds: int,
    warmup: int,
    *,
    steps: Optional[int] = None,
    compiled: bool = False,
    keras_python: Optional[str] = None,
) -> dict[str, Any]:
    """Times training steps of every arm, in turns.

    Args:
        arms: of `ARMS`.
        batch_size: images in a step.
        device: `"cpu"` or `"cuda"`.
        rounds: timed runs of each.
        warmup: runs of each before, not timed.
        steps: in a run; None: `MOST_STEPS` or what `MOST_IMAGES` make.
        compiled: also time `torch.compile` of each arm.
        keras_python: an interpreter with Keras, to time its BN and GN+WS as well.

    Returns:
        Seconds for 50,000 images of each candidate, and ratios to BN, of compiled candidates to
        BN compiled, and to Keras' same arm.

    Raises:
        UserError: Keras does not start there, or has another network; or the device is a GPU,
            where the Keras of `tensorflow-cpu` does not run.
    """
    if keras_python and device != "cpu":
        raise UserError(f"--keras-python times Keras on the CPU; the device is {device}")
    steps = steps or max(1, min(MOST_STEPS, MOST_IMAGES // batch_size))
    images = steps * batch_size
    torch.manual_seed(0)
    data = Images(
        torch.randn(images, 28, 28, 1, device=device).permute(0, 3, 1, 2),
        torch.randint(0, 10, (images,), device=device),
    )
    candidates: dict[str, Action] = {}
    about = {}
    with ExitStack() as stack:
        for arm in arms:
            candidates[arm] = _epoch(arm, data, batch_size, device)
            if compiled:
                candidates[f"{arm}, compiled"] = _epoch(arm, data, batch_size, device, True)
        for arm in KERAS_ARMS if keras_python else ():
            assert keras_python
            worker, version = stack.enter_context(_keras(keras_python, arm, batch_size, images))
            candidates[same_in_keras(arm)] = worker
            about["keras"] = version
        seconds = interleave(candidates, rounds, warmup, device)
    epochs = {
        name: [value * TRAIN_IMAGES / images for value in values]
        for name, values in seconds.items()
    }
    return {
        "batch_size": batch_size,
        "steps": steps,
        "rounds": rounds,
        **about,
        "seconds": epochs,
        "epoch_seconds": {name: spread(values) for name, values in epochs.items()},
        "times_bn": {
            name: ratio(epochs, name, bn_beside(name))
            for name in epochs
            if bn_beside(name) in epochs
        },
        "times_keras": {
            name: ratio(epochs, name, same_in_keras(name))
            for name in epochs
            if same_in_keras(name) in epochs
        },
    }


def bn_beside(name: str) -> str:
    """Of a candidate ("gn_ws", "gn_ws, compiled", "gn_ws, Keras") the name of ours with BN."""
    return "bn, compiled" if name.endswith(", compiled") else "bn"


def same_in_keras(name: str) -> str:
    """Of a candidate ("gn_ws", "gn_ws, compiled") the name of Keras' same arm."""
    return f"{name.partition(',')[0]}, Keras"


def _epoch(arm: str, data: Images, batch_size: int, device: str, compiled: bool = False) -> Action:
    model: nn.Module = build_classifier(arm).to(device)
    optimizer = build_optimizer(model, 0.001)
    schedule = Schedule("constant", 0.001, 1)
    function = compile_model(model, device) if compiled else None

    def run() -> None:
        train_epoch(
            model, optimizer, schedule, data, batch_size, 0, progress=Progress(), compiled=function
        )

    return run


@contextmanager
def _keras(python: str, arm: str, batch_size: int, images: int) -> Iterator[tuple[Action, str]]:
    """A process that trains on as many images for every line it gets; its action and version.

    The action gives Keras' own time of the epoch. What follows an epoch within `fit` can wait for a
    thread that TensorFlow's data pipeline sends to sleep for up to half its age.
    """
    job = [python, str(KERAS), "--arm", arm, "--batch-size", str(batch_size)]
    job += ["--threads", str(torch.get_num_threads())]
    parameters = sum(p.numel() for p in build_classifier(arm).parameters())
    try:
        process = subprocess.Popen(
            [*job, "--images", str(images)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        raise UserError(f"cannot run {python}: {error.strerror}") from error
    with process:
        assert process.stdin is not None and process.stdout is not None
        try:
            ready = process.stdout.readline().strip()
            if not ready.startswith("ready: "):
                raise UserError(
                    f"{KERAS.name} does not run with {python}; needed there: "
                    "pip install tensorflow-cpu"
                )
            if not ready.endswith(f", {parameters} parameters"):
                raise UserError(f"{KERAS.name} is {ready!r}; ours has {parameters} parameters")
            stdin, stdout = process.stdin, process.stdout

            def run() -> float:
                try:
                    stdin.write("run\n")
                    stdin.flush()
                    answer = stdout.readline()
                except BrokenPipeError:
                    answer = ""
                if not answer:
                    raise UserError(f"{KERAS.name} ended while it was timed")
                return float(answer)

            yield run, ready.removeprefix("ready: ")
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
