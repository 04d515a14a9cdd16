"""Measures time and memory of training steps and inference of detectors on real images."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Optional

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from ws_detectron.engine import Trainer, load_config
from ws_detectron.engine.checks import check_datasets, check_device
from ws_detectron.errors import UserError
from ws_detectron.export import FORMATS, Run, Tensors, check_export, export, model_inputs
from ws_detectron.layers import GroupNorm, use_group_norm
from ws_detectron.modeling import fold_ws, folded_copy

from .timing import Action, interleave, time_and_memory

SPLIT = "_split"
"""Suffix of a variant with our GroupNorm, split over the GPU (`layers.split_group_norm`)."""
VARIANTS = ("bn", "frozen_bn", "sync_bn", "gn", "gn_ws", f"gn{SPLIT}", f"gn_ws{SPLIT}")
"""Variants of the COCO configs; configs/README.md lists their differences."""
CONFIG = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_{variant}_1img.yaml"
MODES = ("plain", "channels_last", "autocast", "compile")
SHORT_SIDES = {"cuda": 800, "cpu": 320}

Batch = list[dict[str, Any]]


def detector_config(
    variant: str, device: str, short_side: int, opts: Sequence[str] = ()
) -> CfgNode:
    """The COCO config of a variant, with random weights and one image size."""
    options: list[Any] = [
        *["MODEL.DEVICE", device, "MODEL.WEIGHTS", "", "SEED", 0, "DATALOADER.NUM_WORKERS", 0],
        *["INPUT.MIN_SIZE_TRAIN", (short_side,), "INPUT.MAX_SIZE_TRAIN", short_side * 5 // 3],
        *["INPUT.MIN_SIZE_TEST", short_side, "INPUT.MAX_SIZE_TEST", short_side * 5 // 3],
        # random weights give low scores, and the mask head should have its usual work
        *["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0],
    ]
    name = CONFIG.format(variant=variant.removesuffix(SPLIT))
    return load_config(name, [*map(str, options), *opts])


def real_batches(cfg: CfgNode, images: int, number: int) -> list[Batch]:
    """The first batches of the training set, the same for every variant.

    Args:
        cfg: config of the loader.
        images: images per batch.
        number: number of batches.

    Raises:
        UserError: the data set is missing; names the path and the remedy.
    """
    check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
    cfg = cfg.clone()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = images, 0
    seed_all_rng(cfg.SEED)  # the order of the images is drawn by numpy
    loader = iter(Trainer.build_train_loader(cfg))
    return [next(loader) for _ in range(number)]


def measure_steps(
    device: str, rounds: int = 10, warmup: int = 2, variants: Sequence[str] = ("gn", "gn_ws", "bn"),
    batches: Sequence[int] = (1,), modes: Sequence[str] = ("plain",),
    short_side: Optional[int] = None, opts: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Training steps (forward, backward, SGD) of Mask R-CNN with several variants of norm layers.

    All variants get the same images and proposals; the LR is 0.

    Args:
        device, rounds, warmup: as for `interleave`.
        variants: elements of `VARIANTS`, the baseline first.
        batches: numbers of images per step to measure.
        modes: elements of `MODES` to measure. "autocast" is bfloat16 on a CPU and float16 with a
            gradient scaler on a GPU. "compile" compiles backbone and FPN; all steps then have the
            same batch, as compilation takes minutes for each image size, and even longer for
            dynamic sizes.
        short_side: shorter side of the images, pixels; None: 800 on a GPU, 320 on a CPU.
        opts: KEY VALUE overrides of every variant's config.

    Yields:
        For each batch and mode: `facts`, the items of `time_and_memory`, and `refused`, variant ->
        reason, for those that do not run.
    """
    short_side = short_side or SHORT_SIDES[device]
    for images, mode in itertools.product(batches, modes):
        actions: dict[str, Action] = {}
        refused: dict[str, str] = {}
        cfgs = {v: detector_config(v, device, short_side, opts) for v in variants}
        first = cfgs[variants[0]]
        samples = real_batches(first, images, 1 if mode == "compile" else rounds + warmup + 3)
        for variant, cfg in cfgs.items():
            try:
                check_device(cfg, num_gpus=1)
                action = _training_step(cfg, samples, mode, split=variant.endswith(SPLIT))
                action()
            except (RuntimeError, UserError, ValueError, NotImplementedError) as error:
                refused[variant] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            else:
                actions[variant] = action
        measured = time_and_memory(actions, rounds, warmup, device)
        depth = first.MODEL.RESNETS.DEPTH
        facts = {"images": images, "short_side": short_side, "mode": mode, "depth": depth}
        yield {"facts": facts, **measured, "refused": refused}


def measure_inference(
    device: str, rounds: int = 10, warmup: int = 2, short_side: Optional[int] = None,
    opts: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Inference of Mask R-CNN, one image at a time: GN, GN+WS folded, and GN+WS not folded.

    Args:
        device, rounds, warmup, short_side, opts: as for `measure_steps`.

    Yields:
        One part as from `measure_steps`, with GN first.
    """
    short_side = short_side or SHORT_SIDES[device]
    cfgs = [detector_config(v, device, short_side, opts) for v in ("gn", "gn_ws")]
    batches = real_batches(cfgs[0], 1, rounds + warmup + 3)
    torch.manual_seed(0)
    gn, gn_ws = (Trainer.build_model(cfg).eval() for cfg in cfgs)
    folded = folded_copy(gn_ws)
    gn.load_state_dict(folded.state_dict())  # the same filters, so that all predict the same boxes
    models = {"gn": gn, "gn_ws, folded": folded, "gn_ws, not folded": gn_ws}
    actions = {n: partial(_infer, model, itertools.cycle(batches)) for n, model in models.items()}
    measured = time_and_memory(actions, rounds, warmup, device)
    depth = cfgs[0].MODEL.RESNETS.DEPTH
    facts = {"images": 1, "short_side": short_side, "mode": "plain", "depth": depth}
    yield {"facts": facts, **measured}


def measure_exports(
    device: str, rounds: int = 10, warmup: int = 2, short_side: Optional[int] = None,
    opts: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Inference of GN+WS Mask R-CNN, folded, one image at a time: eager and exports, on the CPU.

    All have as many threads as torch, and return masks of the size of the image.

    Args:
        device, rounds, warmup, short_side, opts: as for `measure_steps`; "cpu".

    Yields:
        `facts` and `seconds`, name -> seconds of each round.

    Raises:
        UserError: `device` is another, or ONNX Runtime is not installed.
    """
    if device != "cpu":
        raise UserError(f"--device is {device}; exports are measured on the CPU: --device cpu")
    short_side = short_side or SHORT_SIDES[device]
    cfg = detector_config("gn_ws", device, short_side, opts)
    check_export(cfg, "onnx")
    samples = [batch[0] for batch in real_batches(cfg, 1, rounds + warmup)]
    torch.manual_seed(0)
    model = fold_ws(Trainer.build_model(cfg).eval().requires_grad_(False))
    inputs = [model_inputs(model, sample, "detector") for sample in samples]
    actions: dict[str, Action] = {
        "detectron2": partial(_infer, model, itertools.cycle([[sample] for sample in samples]))
    }
    for name, format in (("TorchScript", "torchscript"), ("ONNX Runtime", "onnx")):
        run = FORMATS[format].load(export(model, inputs[0], format, {}))
        actions[name] = partial(_run, run, itertools.cycle(inputs))
    depth = cfg.MODEL.RESNETS.DEPTH
    facts = {"short_side": short_side, "depth": depth, "threads": torch.get_num_threads()}
    yield {"facts": facts, "seconds": interleave(actions, rounds, warmup, device)}


def _training_step(cfg: CfgNode, batches: list[Batch], mode: str, *, split: bool = False) -> Action:
    torch.manual_seed(0)
    model: Any = Trainer.build_model(cfg).train()
    if split:
        for norm in use_group_norm(model).modules():
            if isinstance(norm, GroupNorm):
                norm.split_below = sys.maxsize
    propose_alike(model)
    optimizer = Trainer.build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the weights stay, so all steps do the same work
    if mode == "channels_last":
        model.to(memory_format=torch.channels_last)
    elif mode == "compile":
        model.backbone.forward = torch.compile(model.backbone.forward, dynamic=False)
    device, autocast = cfg.MODEL.DEVICE, mode == "autocast"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    context = torch.autocast(device, dtype, enabled=autocast)
    scaler = torch.amp.GradScaler("cuda") if autocast and device == "cuda" else None
    batch = itertools.cycle(batches)

    def step() -> None:
        torch.manual_seed(0)  # every variant samples the same proposals
        with EventStorage(0), context:
            loss = sum(model(deepcopy(next(batch))).values())
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
    """Makes all variants propose the same boxes, whatever their features are.

    The cost of RoIAlign grows with the boxes, and that of the mask head with the number of boxes on
    objects, so different proposals change the time by several %, which has nothing to do with norm
    layers. With zeros in the RPN's two predictors, the proposals are anchors with equal scores.

    Args:
        model: a detectron2 model with an RPN.
    """
    head: Any = model.proposal_generator.rpn_head  # type: ignore[union-attr]
    for predictor in (head.objectness_logits, head.anchor_deltas):
        nn.init.zeros_(predictor.weight)
        nn.init.zeros_(predictor.bias)


@torch.no_grad()
def _infer(model: nn.Module, batches: Iterator[Batch]) -> None:
    model(deepcopy(next(batches)))


@torch.no_grad()
def _run(run: Run, inputs: Iterator[Tensors]) -> None:
    run(next(inputs))
