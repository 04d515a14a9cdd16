"""Whole detectors, arm beside arm: training steps and inference on real images, time and memory."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, Optional

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from ws_detectron.engine import Trainer, load_config
from ws_detectron.engine.checks import check_device
from ws_detectron.errors import UserError
from ws_detectron.layers import GroupNorm, use_group_norm
from ws_detectron.modeling import folded_copy

from .timing import Action, gpu_work, interleave, peak_bytes, ratio, spread

ARMS = ("bn", "frozen_bn", "sync_bn", "gn", "gn_ws")
"""Arms of the COCO configs; what differs between them is listed in configs/README.md."""
SPLIT = "_split"
"""Behind the name of an arm: with our GroupNorm, split over the GPU (`layers.split_group_norm`)."""
CONFIG = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_{arm}_1img.yaml"
VARIANTS = ("plain", "channels_last", "autocast", "compile")

Batch = list[dict[str, Any]]


def arm_config(arm: str, device: str, short_side: int, opts: Sequence[str] = ()) -> CfgNode:
    """The COCO config of an arm, from random weights and at one image size."""
    options: list[Any] = [
        *["MODEL.DEVICE", device, "MODEL.WEIGHTS", "", "SEED", 0, "DATALOADER.NUM_WORKERS", 0],
        *["INPUT.MIN_SIZE_TRAIN", (short_side,), "INPUT.MAX_SIZE_TRAIN", short_side * 5 // 3],
        *["INPUT.MIN_SIZE_TEST", short_side, "INPUT.MAX_SIZE_TEST", short_side * 5 // 3],
        # random weights score nothing high, and the mask head should have its usual work
        *["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0],
    ]
    return load_config(CONFIG.format(arm=arm.removesuffix(SPLIT)), [*map(str, options), *opts])


def real_batches(cfg: CfgNode, images: int, number: int) -> list[Batch]:
    """The first batches of the training set, the same ones for every arm.

    Args:
        images: in each batch.
        number: of batches.
    """
    cfg = cfg.clone()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = images, 0
    seed_all_rng(cfg.SEED)  # the order of the images is drawn by numpy
    loader = iter(Trainer.build_train_loader(cfg))
    return [next(loader) for _ in range(number)]


def measure_steps(
    arms: Sequence[str],
    device: str,
    images: int,
    short_side: int,
    rounds: int,
    warmup: int,
    variant: str = "plain",
    opts: Sequence[str] = (),
) -> dict[str, Any]:
    """Times training steps (forward, backward, SGD) of several arms in turns.

    All of them get the same images and the same proposals, and the LR is 0.

    Args:
        arms: of `ARMS`, with `SPLIT` behind them or not, the baseline first.
        images: per step.
        short_side: of the images, pixels.
        rounds, warmup: of `interleave`.
        variant: of `VARIANTS`; "autocast" is bfloat16 on a CPU and float16 with a gradient scaler
            on a GPU, "compile" compiles backbone and FPN, for one size of image: all steps then
            have the same batch, as each further size is compiled anew for minutes, and one
            compilation for all sizes takes longer still.
        opts: KEY VALUE overrides of every arm's config.

    Returns:
        `seconds` and `peak_bytes` by arm, `ratios` to the first arm, and `refused`: arm -> reason,
        for those that do not run.
    """
    actions: dict[str, Action] = {}
    refused: dict[str, str] = {}
    first = arm_config(arms[0], device, short_side, opts)
    batches = real_batches(first, images, rounds + warmup + 3)
    if variant == "compile":
        batches = batches[:1]
    for arm in arms:
        try:
            cfg = arm_config(arm, device, short_side, opts)
            check_device(cfg, num_gpus=1)
            action = _training_step(cfg, batches, variant, split=arm.endswith(SPLIT))
            action()
        except (RuntimeError, UserError, ValueError, NotImplementedError) as error:
            refused[arm] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            actions[arm] = action
    about = {
        "images": images,
        "short_side": short_side,
        "variant": variant,
        "depth": first.MODEL.RESNETS.DEPTH,
    }
    return {**about, **_measure(actions, rounds, warmup, device), "refused": refused}


def measure_inference(
    device: str, short_side: int, rounds: int, warmup: int, opts: Sequence[str] = ()
) -> dict[str, Any]:
    """Times inference of one image at a time: GN, GN+WS folded, and GN+WS as it is trained.

    Returns:
        As `measure_steps`, with GN first.
    """
    cfgs = {arm: arm_config(arm, device, short_side, opts) for arm in ("gn", "gn_ws")}
    batches = real_batches(cfgs["gn"], 1, rounds + warmup + 3)
    torch.manual_seed(0)
    models = {arm: Trainer.build_model(cfg).eval() for arm, cfg in cfgs.items()}
    folded = folded_copy(models["gn_ws"])
    # the same filters everywhere, so that all find the same boxes
    models["gn"].load_state_dict(folded.state_dict())
    candidates = {
        "gn": models["gn"],
        "gn_ws, folded": folded,
        "gn_ws, not folded": models["gn_ws"],
    }
    actions = {name: _inference(model, batches) for name, model in candidates.items()}
    about = {
        "images": 1,
        "short_side": short_side,
        "variant": "plain",
        "depth": cfgs["gn"].MODEL.RESNETS.DEPTH,
    }
    return {**about, **_measure(actions, rounds, warmup, device), "refused": {}}


def _measure(actions: dict[str, Action], rounds: int, warmup: int, device: str) -> dict[str, Any]:
    if not actions:
        return {"seconds": {}, "ratios": {}, "peak_bytes": {}}
    seconds = interleave(actions, rounds, warmup, device)
    first = next(iter(seconds))
    gpu = {name: gpu_work(action) for name, action in actions.items()} if device == "cuda" else {}
    return {
        "gpu": gpu,
        "seconds": seconds,
        "median_seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": {name: ratio(seconds, name, first) for name in seconds},
        "peak_bytes": {name: peak_bytes(action, device) for name, action in actions.items()},
    }


def _training_step(
    cfg: CfgNode, batches: list[Batch], variant: str, *, split: bool = False
) -> Action:
    device = cfg.MODEL.DEVICE
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    if split:
        for norm in use_group_norm(model).modules():
            if isinstance(norm, GroupNorm):
                norm.split_below = sys.maxsize
    propose_alike(model)
    optimizer = Trainer.build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the step costs what it costs, and all steps have the same work
    context, scaler = _apply(variant, model, device)
    turn = _Turns(batches)

    def step() -> None:
        torch.manual_seed(0)  # the same draws of proposals for every arm
        with EventStorage(0), context():
            loss = sum(model(next(turn)).values())
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return step


def propose_alike(model: nn.Module) -> None:
    """Makes all arms propose the same boxes, whatever their features are.

    RoIAlign takes a number of samples that grows with the box, and the mask head as many boxes as
    overlap an object, so that arms with proposals of their own differ by several per cent in work
    that has nothing to do with norm layers. With zeros in the RPN's two predictors, every anchor
    scores the same and stays where it is.

    Args:
        model: a detectron2 model with an RPN.
    """
    head: Any = model.proposal_generator.rpn_head  # type: ignore[union-attr]
    for predictor in (head.objectness_logits, head.anchor_deltas):
        nn.init.zeros_(predictor.weight)
        nn.init.zeros_(predictor.bias)


def _inference(model: nn.Module, batches: list[Batch]) -> Action:
    turn = _Turns(batches)

    def infer() -> None:
        with torch.no_grad():
            model(next(turn))

    return infer


class _Turns:
    """The batches one after the other, from the first again after the last."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches, self._next = batches, 0

    def __next__(self) -> Batch:
        self._next += 1
        return deepcopy(self._batches[(self._next - 1) % len(self._batches)])


def _apply(
    variant: str, model: nn.Module, device: str
) -> tuple[Callable[[], AbstractContextManager], Optional[Any]]:
    """Puts a variant into effect: the context of the forward, and the gradient scaler if any."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}")
    module: Any = model
    if variant == "channels_last":
        module.to(memory_format=torch.channels_last)
    elif variant == "compile":
        module.backbone.forward = torch.compile(module.backbone.forward, dynamic=False)
    elif variant == "autocast":
        if device == "cuda":
            return lambda: torch.autocast("cuda", torch.float16), torch.amp.GradScaler("cuda")
        return lambda: torch.autocast("cpu", torch.bfloat16), None
    return nullcontext, None
