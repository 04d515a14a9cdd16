"""Trainer: a real training, evaluation and resume of a tiny Mask R-CNN."""

import argparse
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.structures import Boxes, Instances
from small_trainer import SmallTrainer, small_cfg
from torch import nn

from ws_detectron import WSConv2d
from ws_detectron.engine import Trainer, run
from ws_detectron.engine.checks import Purpose
from ws_detectron.engine.hooks import RunRecord
from ws_detectron.engine.prepare import prepare
from ws_detectron.engine.signals import StopOnSignal
from ws_detectron.errors import ConfigError, DataError, DivergedError, UserError


def arguments(**kwargs: bool) -> argparse.Namespace:
    return argparse.Namespace(**{"eval_only": False, "resume": False, "config_file": "", **kwargs})


def test_trains_evaluates_saves_resumes(tiny_cfg: CfgNode) -> None:
    output = Path(tiny_cfg.OUTPUT_DIR)
    tiny_cfg.SOLVER.MAX_ITER = 4
    tiny_cfg.SOLVER.STEPS = (3,)
    tiny_cfg.SOLVER.WARMUP_ITERS = 0
    tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 2
    tiny_cfg.TEST.EVAL_PERIOD = 2
    results = run(tiny_cfg.clone(), arguments())
    assert set(results) == {"bbox", "segm"} and "AP" in results["segm"]
    for name in ("config.yaml", "log.txt", "metrics.json", "model_0000001.pth", "model_final.pth"):
        assert (output / name).is_file(), name
    assert list(output.glob("events.out.tfevents.*"))
    assert (output / "inference" / "coco_instances_results.json").is_file()

    # A run that was killed after iteration 2 resumes at iteration 2, with the LR of iteration 2.
    straight = torch.load(output / "model_final.pth")
    (output / "last_checkpoint").write_text("model_0000001.pth")
    trainer = Trainer(tiny_cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    momenta = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    assert len(momenta) > 50 and any(momentum.abs().max() > 0 for momentum in momenta)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0001)
    resumed = torch.load(output / "model_final.pth")
    assert resumed["iteration"] == straight["iteration"] == 3
    schedules = [state["trainer"]["hooks"]["LRScheduler"] for state in (resumed, straight)]
    assert schedules[0]["last_epoch"] == schedules[1]["last_epoch"] == 4


def test_has_all_that_detectron2s_own_trainer_has(tmp_path: Path) -> None:
    """Its constructor is not called."""

    class Stock(DefaultTrainer):
        build_model, build_train_loader = SmallTrainer.build_model, SmallTrainer.build_train_loader

    stock, own = Stock(small_cfg(tmp_path)), SmallTrainer(small_cfg(tmp_path))
    assert vars(stock).keys() <= vars(own).keys()
    for name in ("_trainer", "scheduler"):
        assert type(vars(own)[name]) is type(vars(stock)[name])
    mine = [type(hook) for hook in own._hooks]
    ours = (RunRecord, StopOnSignal)
    assert [hook for hook in mine if hook not in ours] == [type(h) for h in stock._hooks]
    first = mine.index(PeriodicCheckpointer)
    assert mine[first : first + 3] == [PeriodicCheckpointer, StopOnSignal, EvalHook]
    savers = [hook for hook in own._hooks if isinstance(hook, PeriodicCheckpointer)]
    assert [saver.checkpointer for saver in savers] == [own.checkpointer]


def test_eval_only_loads_the_weights(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    model = Trainer.build_model(tiny_cfg)
    weights = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, weights)
    expected = Trainer.test(tiny_cfg, model)
    tiny_cfg.MODEL.WEIGHTS = str(weights)
    torch.manual_seed(5)
    output = Path(tiny_cfg.OUTPUT_DIR)
    output.mkdir(exist_ok=True)
    for name in ("config.yaml", "log.txt"):
        (output / name).write_text("of a training")
    results = run(tiny_cfg, arguments(eval_only=True))
    assert json.dumps(results) == json.dumps(expected)
    for name in ("config.yaml", "log.txt"):
        assert (output / name).read_text() == "of a training"
        assert str(weights) in (output / "inference" / name).read_text()


def test_expected_results_decide_the_status(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save({"model": Trainer.build_model(tiny_cfg).state_dict()}, weights)
    tiny_cfg.MODEL.WEIGHTS = str(weights)
    tiny_cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 99.0, 0.5]]
    with pytest.raises(SystemExit) as caught:
        run(tiny_cfg, arguments(eval_only=True))
    assert caught.value.code == 1
    tiny_cfg.defrost()
    tiny_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 1.0  # no predictions, so no mask metrics at all
    tiny_cfg.TEST.EXPECTED_RESULTS = [["segm", "AP", 99.0, 0.5]]
    with pytest.raises(SystemExit):
        run(tiny_cfg, arguments(eval_only=True))
    log = Path(tiny_cfg.OUTPUT_DIR, "inference", "log.txt").read_text()
    assert "bbox/AP: unknown, as the model has predicted nothing" in log


def test_frozen_stages_do_not_move_and_the_others_do(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.BACKBONE.FREEZE_AT = 2
    tiny_cfg.SOLVER.WARMUP_ITERS = 0
    trainer = Trainer(tiny_cfg)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        if name.startswith(("backbone.bottom_up.stem", "backbone.bottom_up.res2")):
            assert not moved, name
        elif name.startswith("backbone.bottom_up"):
            assert moved, name


@pytest.mark.parametrize(
    "key, value, part",
    [
        ("MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "RES2_OUT_CHANNELS"),
        ("MODEL.BACKBONE.NAME", "build_ws_backbone", "build_ws_backbone"),
        ("MODEL.WS.MODE", "mode", "MODEL.WS.MODE"),
    ],
)
def test_config_that_builds_no_model(tiny_cfg: CfgNode, key: str, value: object, part: str) -> None:
    tiny_cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=part):
        Trainer.build_model(tiny_cfg)


@pytest.mark.parametrize("error", [KeyError("res3"), AssertionError("4 inputs"), ValueError("x")])
def test_a_builder_that_fails_keeps_its_error(tiny_cfg: CfgNode, error: Exception) -> None:
    def build_broken_backbone(cfg: CfgNode, input_shape: object) -> nn.Module:
        raise error

    BACKBONE_REGISTRY.register(build_broken_backbone)
    tiny_cfg.MODEL.BACKBONE.NAME = "build_broken_backbone"
    try:
        with pytest.raises(type(error)) as caught:
            Trainer.build_model(tiny_cfg)
    finally:
        del BACKBONE_REGISTRY._obj_map["build_broken_backbone"]
    assert caught.value is error and caught.traceback[-1].name == "build_broken_backbone"


@pytest.mark.parametrize("resume", [False, True])
def test_memory_that_runs_out_is_not_about_the_weights(tmp_path: Path, resume: bool) -> None:
    cfg = small_cfg(tmp_path)
    if resume:
        SmallTrainer(cfg).train()
    trainer = SmallTrainer(cfg)
    error = torch.cuda.OutOfMemoryError("CUDA out of memory.")
    with mock.patch.object(trainer.checkpointer, "load", side_effect=error):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            trainer.resume_or_load(resume=resume)


def test_resume_names_what_cannot_be_resumed(tiny_cfg: CfgNode) -> None:
    output = Path(tiny_cfg.OUTPUT_DIR)
    first = Trainer(tiny_cfg)
    first.checkpointer.save("model_0000000", iteration=0)
    (output / "last_checkpoint").write_text("")
    with pytest.raises(UserError, match="last_checkpoint is empty; .*model_0000000.pth"):
        Trainer(tiny_cfg).resume_or_load(resume=True)
    (output / "last_checkpoint").write_text("model_0000000.pth")
    other = tiny_cfg.clone()
    other.MODEL.ROI_HEADS.NUM_CLASSES, other.DATASETS.TEST = 2, ()
    with pytest.raises(UserError, match="cls_score.weight is .*MODEL.ROI_HEADS.NUM_CLASSES"):
        Trainer(other).resume_or_load(resume=True)
    state = torch.load(output / "model_0000000.pth", weights_only=True)
    state["trainer"] = {"_trainer": 5}
    torch.save(state, output / "model_0000000.pth")
    with pytest.raises(UserError, match="the checkpoint '.*model_0000000.pth' cannot be loaded"):
        Trainer(tiny_cfg).resume_or_load(resume=True)


def test_output_dir_is_made(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.OUTPUT_DIR = str(tmp_path / "new" / "run")
    Trainer(tiny_cfg)
    assert (tmp_path / "new" / "run").is_dir()
    (tmp_path / "file").touch()
    tiny_cfg.OUTPUT_DIR = str(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="OUTPUT_DIR .*file/run' cannot be made"):
        Trainer(tiny_cfg)


def test_divergence_names_iteration_and_loss(
    tiny_cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_cfg.SOLVER.MAX_ITER = 3
    trainer = Trainer(tiny_cfg)
    forward = trainer.model.forward

    def diverging(batch: list) -> dict:
        losses = forward(batch)
        if trainer.iter == 1:
            losses["loss_mask"] = losses["loss_mask"] * float("nan")
        return losses

    trainer.model.forward = diverging
    filters = logging.getLogger("detectron2.engine.train_loop").filters
    before = filters[:]
    with pytest.raises(DivergedError) as caught:
        trainer.train()
    assert filters == before
    assert "iteration 1: loss_mask is nan; lower SOLVER.BASE_LR" in str(caught.value)
    assert "Traceback" not in caplog.text


def test_divergence_that_a_hook_meets(tmp_path: Path) -> None:
    """PreciseBN runs the model in training mode."""
    trainer, hook = SmallTrainer(small_cfg(tmp_path)), mock.Mock()
    message = "Predicted boxes or scores contain Inf/NaN. Training has diverged."
    hook.after_step.side_effect = [None, FloatingPointError(message)]
    trainer._hooks = [hook]
    with pytest.raises(DivergedError, match="iteration 1: Pre"):
        trainer.train()
    hook.after_step.side_effect = FloatingPointError("underflow encountered in true_divide")
    with pytest.raises(FloatingPointError, match="underflow"):  # a bug, whose traceback helps
        trainer.train()


def test_scaling_is_said_where_nobody_set_loggers_up(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    """In a process of its own, as loggers stay set up."""
    tiny_cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 2 * tiny_cfg.SOLVER.IMS_PER_BATCH
    tiny_cfg.DATASETS.TRAIN = tiny_cfg.DATASETS.TEST = ()
    (tmp_path / "scaled.yaml").write_text(tiny_cfg.dump())
    script = (
        "from ws_detectron.engine import Trainer, load_config; import ws_detectron.engine.scaling\n"
        "Trainer.build_model = lambda *_: exit()\n"
        "Trainer(load_config('scaled.yaml'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "scaled: SOLVER.BASE_LR" in done.stdout


def change_annotations(tmp_path: Path, change: Callable[[dict], None]) -> None:
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


BROKEN_BOX = r"annotations.json: bbox must .*annotations\[1\] \(id 2\)"
NO_IMAGE = "1 of 4 images that are not in .*images: '3.png'"


@pytest.mark.parametrize(
    "key, fault, message",
    [
        ("TRAIN", "box", BROKEN_BOX),
        ("TEST", "box", BROKEN_BOX),
        ("TRAIN", "image", NO_IMAGE),
        ("TEST", "image", NO_IMAGE),
        # a prediction of another class makes detectron2's evaluation fail, after the training
        ("TEST", "classes", "annotations.json have 1 categories, .* predicts 80"),
    ],
)
def test_data_that_cannot_be_used_are_found_before_the_first_iteration(
    tiny_cfg: CfgNode, tmp_path: Path, key: str, fault: str, message: str
) -> None:
    if fault == "box":
        change_annotations(tmp_path, lambda c: c["annotations"][1].update(bbox=[1, 2]))
    elif fault == "image":
        (tmp_path / "images" / "3.png").unlink()
    else:
        tiny_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    tiny_cfg.DATASETS["TEST" if key == "TRAIN" else "TRAIN"] = ()
    with pytest.raises(DataError, match=message):
        Trainer(tiny_cfg)


def test_what_can_be_fixed_is_trained_and_evaluated_on(
    tiny_cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Text ids, no iscrowd, no area: detectron2 or pycocotools fail on each."""

    def change(content: dict) -> None:
        for image in content["images"]:
            image.update(id=f"frame_{image['id']}", width=float(image["width"]))
        for annotation in content["annotations"]:
            annotation["image_id"] = f"frame_{annotation['image_id']}"
            del annotation["iscrowd"], annotation["area"]

    original = tmp_path / "annotations.json"
    change_annotations(tmp_path, change)
    before = original.read_bytes()
    tiny_cfg.SOLVER.MAX_ITER = 1
    with caplog.at_level(logging.WARNING, logger="ws_detectron"):
        trainer = Trainer(tiny_cfg)
    assert "iscrowd is missing; read as 0" in caplog.text
    results = trainer.train()
    assert results is not None and set(results) == {"bbox", "segm"}
    assert original.read_bytes() == before
    name = tiny_cfg.DATASETS.TRAIN[0]
    copy = tmp_path / "run" / "annotations" / f"{name}.json"
    assert MetadataCatalog.get(name).json_file == str(copy)
    assert json.loads(copy.read_text())["annotations"][0]["area"] == 24 * 32
    Trainer(tiny_cfg)  # a second one in the same process finds the set as the first left it


def test_a_set_of_somebodys_own_function_keeps_it(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    """Its file is fixed for the evaluation alone."""
    change_annotations(tmp_path, lambda c: [a.pop("iscrowd") for a in c["annotations"]])
    name = tiny_cfg.DATASETS.TEST[0]
    stock = DatasetCatalog.pop(name)
    mine = lambda: [{**record, "mine": True} for record in stock()]  # noqa: E731
    DatasetCatalog.register(name, mine)
    prepare(tiny_cfg)
    assert DatasetCatalog[name] is mine
    prepare(tiny_cfg, Purpose.EVALUATE)
    assert DatasetCatalog[name] is mine
    assert MetadataCatalog.get(name).json_file.startswith(tiny_cfg.OUTPUT_DIR)
    assert MetadataCatalog.get(name).image_root == str(tmp_path / "images")


@pytest.mark.parametrize(
    ("names", "words"),
    [("coco_2017_val", r"allowed: a list of names, \('coco_2017_val',\)"),
     (("coco_2017_vall",), "not a registered data set; did you mean coco_2017_val")],
)  # fmt: skip
@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_names_of_data_sets_are_checked_in_anybodys_script(
    tiny_cfg: CfgNode, key: str, names: Any, words: str
) -> None:
    tiny_cfg.DATASETS.defrost()
    dict.__setitem__(tiny_cfg.DATASETS, key, names)
    with pytest.raises(ConfigError, match=f"DATASETS.{key} .*{words}"):
        Trainer(tiny_cfg)


def test_evaluator_for_coco_data_only(tiny_cfg: CfgNode) -> None:
    with pytest.raises(ConfigError, match="voc_2007_test"):
        Trainer.build_evaluator(tiny_cfg, "voc_2007_test")


def test_keypoints_train_and_are_evaluated(keypoint_cfg: CfgNode) -> None:
    results = run(keypoint_cfg.clone(), arguments())
    assert set(results) == {"bbox", "keypoints"} and "AP" in results["keypoints"]
    rows = (Path(keypoint_cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    losses = [json.loads(row).get("loss_keypoint") for row in rows]
    assert any(loss and loss > 0 for loss in losses)
    assert MetadataCatalog.get(keypoint_cfg.DATASETS.TRAIN[0]).keypoint_names == [
        "left end",
        "right end",
    ]
    # an evaluation by itself needs nothing of the training data
    keypoint_cfg.MODEL.WEIGHTS = str(Path(keypoint_cfg.OUTPUT_DIR) / "model_final.pth")
    keypoint_cfg.DATASETS.TRAIN = ("not_there",)
    again = run(keypoint_cfg, arguments(eval_only=True))
    assert again["keypoints"]["AP"] == pytest.approx(results["keypoints"]["AP"], nan_ok=True)


@pytest.mark.parametrize(("sigma", "thresholds"), [(0.1, 6), (0.2, 9)])
def test_sigmas_are_those_of_the_config(
    keypoint_cfg: CfgNode, sigma: float, thresholds: int
) -> None:
    """All keypoints are 4 pixels off, so OKS is exp(-4² / (2 area (2 sigma)²)) everywhere.

    With an area of 768 it is 0.771 and 0.937: 6 and 9 of the thresholds 0.50, 0.55, ..., 0.95.
    """
    keypoint_cfg.TEST.KEYPOINT_OKS_SIGMAS = [sigma, sigma]
    (name,) = keypoint_cfg.DATASETS.TEST
    records = DatasetCatalog.get(name)  # with keypoints moved to the centres of their pixels
    evaluator = Trainer.build_evaluator(keypoint_cfg, name)
    evaluator.reset()
    for record in records:
        (truth,) = record["annotations"]
        x, y, width, height = truth["bbox"]
        found = Instances((64, 64))
        found.pred_boxes = Boxes(torch.tensor([[x, y, x + width, y + height]]).float())
        found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
        found.pred_keypoints = torch.tensor([truth["keypoints"]]).float().reshape(1, 2, 3)
        found.pred_keypoints[..., 1] += 4
        evaluator.process([record], [{"instances": found}])
    assert evaluator.evaluate()["keypoints"]["AP"] == pytest.approx(10 * thresholds)


def test_results_do_not_overwrite_inputs(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "inference"
    folder.mkdir()
    (name,) = tiny_cfg.DATASETS.TEST
    for file, target in (
        ("instances_predictions.pth", tmp_path / "weights.pth"),
        ("coco_instances_results.json", MetadataCatalog.get(name).json_file),
    ):
        tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
        (tmp_path / "weights.pth").touch()
        (folder / file).symlink_to(target)
        with pytest.raises(UserError, match=f"{file} is an input"):
            Trainer.build_evaluator(tiny_cfg, name)
        (folder / file).unlink()


def test_evaluation_runs_folded_and_leaves_the_training_model_alone(tiny_cfg: CfgNode) -> None:
    model = Trainer.build_model(tiny_cfg)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    seen: list[nn.Module] = []

    class Evaluator(DatasetEvaluator):
        def process(self, inputs: list, outputs: list) -> None:
            pass

        def evaluate(self) -> dict:
            return {}

    with mock.patch(
        "detectron2.engine.defaults.inference_on_dataset",
        lambda evaluated, *_: seen.append(evaluated) or {},
    ):
        Trainer.test(tiny_cfg, model, [Evaluator()])
    assert not any(isinstance(m, WSConv2d) for m in seen[0].modules())
    assert sum(isinstance(m, WSConv2d) for m in model.modules()) == 32 and model.training
    torch.testing.assert_close(dict(model.state_dict()), before)


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def lr_of_each_iteration(cfg: CfgNode, resume: bool) -> list[tuple[int, float]]:
    """(iteration, LR) of a run, as its optimizer has them in the step and as metrics.json says."""
    trainer = SmallTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    seen: list[tuple[int, float]] = []

    class Watch(HookBase):
        def before_step(self) -> None:
            lrs = {group["lr"] for group in trainer.optimizer.param_groups}
            assert len(lrs) == 1
            seen.append((trainer.iter, lrs.pop()))

    trainer.register_hooks([Watch()])
    trainer.train()
    last = [row for row in rows(Path(cfg.OUTPUT_DIR)) if "lr" in row][-1]
    assert (last["iteration"], last["lr"]) == seen[-1]
    return seen


def step_lr(base: float, iteration: int) -> float:
    """Linear warm-up from a tenth over two iterations, a tenth of the LR from iteration 5 on."""
    return base * (0.1 + 0.9 * iteration / 2 if iteration < 2 else 1 if iteration < 5 else 0.1)


def cosine_lr(base: float, iteration: int) -> float:
    """Half a cosine over six iterations; the warm-up of two ends where it meets the cosine."""
    cosine = [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(7)]
    warm_up = 0.1 + (cosine[2] - 0.1) * iteration / 2
    return base * (warm_up if iteration < 2 else cosine[iteration])


@pytest.mark.parametrize(
    "scheduler, expected", [("WarmupMultiStepLR", step_lr), ("WarmupCosineLR", cosine_lr)]
)
def test_a_resumed_run_follows_the_config(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scheduler: str, expected: Callable
) -> None:
    cfg = small_cfg(tmp_path, iterations=1)
    assert lr_of_each_iteration(cfg, resume=False) == [(0, pytest.approx(0.001))]
    cfg.SOLVER.LR_SCHEDULER_NAME = scheduler
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_FACTOR, cfg.SOLVER.WARMUP_ITERS = 0.002, 0.1, 2
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 6, (5,)
    cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM = 0.5, 0.01, 0.02
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.03
    resumed = lr_of_each_iteration(cfg, resume=True)
    assert resumed == [(i, pytest.approx(expected(0.002, i))) for i in range(1, 6)]
    (message,) = [r.getMessage() for r in caplog.records if "has changed" in r.getMessage()]
    assert "SOLVER.BASE_LR 0.001 -> 0.002" in message and "SOLVER.STEPS () -> (5,)" in message
    assert "SOLVER.MOMENTUM 0.9 -> 0.5" in message and "WEIGHT_DECAY 0.0001 -> 0.01" in message
    assert message.count(" -> ") == 9 + (scheduler != "WarmupMultiStepLR")
    saved = torch.load(tmp_path / "model_final.pth")["trainer"]["_trainer"]["optimizer"]
    saved = saved["param_groups"]
    assert {group["momentum"] for group in saved} == {0.5}
    assert {group["weight_decay"] for group in saved} == {0.01, 0.02, 0.03}


@pytest.mark.parametrize("by_parameter", [False, True])
def test_momentum_stays_with_its_parameter_when_groups_change(
    tmp_path: Path, by_parameter: bool
) -> None:
    """By the config, or because detectron2 0.5 wrote the checkpoint, with a group of each."""
    cfg = small_cfg(tmp_path)
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.5
    cfg.SOLVER.WEIGHT_DECAY_BIAS = cfg.SOLVER.WEIGHT_DECAY  # that of `weight`, not of its norm
    first = SmallTrainer(cfg)
    first.train()
    for number, parameter in enumerate(first.model.parameters()):
        momentum = torch.full_like(parameter, number)
        first.optimizer.state[parameter] = {"momentum_buffer": momentum}
    first.checkpointer.save("model_final")
    if by_parameter:
        path = tmp_path / "model_final.pth"
        content = torch.load(path)
        states = [first.optimizer.state[parameter] for parameter in first.model.parameters()]
        content["trainer"]["_trainer"]["optimizer"] = {
            "state": dict(enumerate(states)),
            "param_groups": [{**first.optimizer.defaults, "params": [i]} for i in range(3)],
        }
        torch.save(content, path)
    cfg.SOLVER.WEIGHT_DECAY_BIAS, cfg.SOLVER.MAX_ITER = 0.25, 4
    trainer = SmallTrainer(cfg)
    trainer.resume_or_load(resume=True)
    for number, parameter in enumerate(trainer.model.parameters()):
        assert (trainer.optimizer.state[parameter]["momentum_buffer"] == number).all()
        (group,) = (g for g in trainer.optimizer.param_groups if parameter in set(g["params"]))
        assert group["weight_decay"] == (cfg.SOLVER.WEIGHT_DECAY, 0.5, 0.25)[number]


def test_a_resumed_run_without_changes_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a folder that was moved."""
    cfg = small_cfg(tmp_path / "run")
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    SmallTrainer(cfg).train()
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000000.pth")
    cfg.OUTPUT_DIR = str((tmp_path / "run").rename(tmp_path / "moved"))
    trainer = SmallTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 1 and "has changed" not in caplog.text


def test_a_checkpoint_without_its_config_follows_the_present_one(tmp_path: Path) -> None:
    """As detectron2's own trainer writes it."""
    cfg = small_cfg(tmp_path)
    SmallTrainer(cfg).train()
    path = tmp_path / "model_final.pth"
    content = torch.load(path)
    del content["trainer"]["config"]
    torch.save(content, path)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER = 0.002, 3
    assert lr_of_each_iteration(cfg, resume=True) == [(2, pytest.approx(0.002))]


def test_a_checkpoint_without_the_loop_resumes_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As DefaultTrainer of detectron2 0.5 and 0.6 writes it."""
    cfg = small_cfg(tmp_path)
    SmallTrainer(cfg).train()
    path = tmp_path / "model_final.pth"
    checkpoint = torch.load(path)
    iteration = checkpoint["trainer"]["iteration"]
    checkpoint["trainer"] = {"iteration": iteration, "hooks": checkpoint["trainer"]["hooks"]}
    torch.save(checkpoint, path)
    cfg.SOLVER.MAX_ITER += 1
    trainer = SmallTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == iteration + 1 and not trainer.optimizer.state
    assert "momentum starts at zero" in caplog.text


def test_a_scheduler_of_somebody_keeps_its_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(SmallTrainer):
        @classmethod
        def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> object:
            return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    cfg = small_cfg(tmp_path)
    Own(cfg).train()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM = 3, 1.0, 0.5
    trainer = Own(cfg)
    trainer.resume_or_load(resume=True)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.00025}
    assert {group["momentum"] for group in trainer.optimizer.param_groups} == {0.5}
    assert "LR and schedule are those of the checkpoint" in caplog.text


def test_resuming_a_finished_run_changes_nothing(tiny_cfg: CfgNode) -> None:
    output = Path(tiny_cfg.OUTPUT_DIR)
    run(tiny_cfg.clone(), arguments())

    def state() -> tuple[dict[str, int], str]:
        """Contents of all files but the log and TensorBoard's empty ones."""
        kept = [path for path in output.rglob("*") if path.is_file() and path.name != "log.txt"]
        return {
            str(path): (0 if path.name == "config.yaml" else path.stat().st_mtime_ns)
            for path in kept
            if not path.name.startswith("events")
        }, (output / "config.yaml").read_text()

    before = state()
    assert json.loads((output / "run_record.json").read_text())["iterations"] == 2
    tiny_cfg.SOLVER.BASE_LR = 0.5
    assert run(tiny_cfg.clone(), arguments(resume=True)) is None
    log = (output / "log.txt").read_text()
    assert f"The run in {output} is finished: 2 of 2 iterations" in log
    tiny_cfg.SOLVER.MAX_ITER = 1
    with pytest.raises(ConfigError, match="SOLVER.MAX_ITER is 1, but .* has done 2 iterations"):
        run(tiny_cfg.clone(), arguments(resume=True))
    assert state() == before

    tiny_cfg.SOLVER.MAX_ITER = 3
    run(tiny_cfg.clone(), arguments(resume=True))
    ran = CfgNode.load_cfg((output / "config.yaml").read_text()).SOLVER
    assert (ran.BASE_LR, ran.MAX_ITER) == (0.5, 3)
    record = json.loads((output / "run_record.json").read_text())
    assert (record["iterations"], record["starts"]) == (3, 2)


def test_a_run_killed_in_its_last_evaluation_is_evaluated(tmp_path: Path) -> None:
    class Killed(SmallTrainer):
        @classmethod
        def test(cls, *args: object) -> dict:
            raise KeyboardInterrupt

    class Evaluated(SmallTrainer):
        @classmethod
        def test(cls, *args: object) -> dict:
            return {"bbox": {"AP": 7.0}}

    cfg = small_cfg(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Killed(cfg).train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    for _ in range(2):  # the second time it is finished
        trainer = Evaluated(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()
        assert json.loads((tmp_path / "run_record.json").read_text())["iterations"] == 2
        assert [row["iteration"] for row in rows(tmp_path) if "bbox/AP" in row] == [2]


@pytest.mark.parametrize("module", [None, "broken"])
def test_tensorboard_is_not_needed(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    module: Optional[str],
) -> None:
    """It is not installed, or needs another protobuf."""
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    if module:
        package = tmp_path / "path" / "tensorboard"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise TypeError('Descriptors cannot be created')")
        monkeypatch.syspath_prepend(package.parent)
        monkeypatch.delitem(sys.modules, "tensorboard")
    cfg = small_cfg(tmp_path / "run")
    SmallTrainer(cfg).train()
    assert "No TensorBoard events are written: " in caplog.text
    assert "pip install tensorboard" in caplog.text
    assert not module or "Descriptors cannot" in caplog.text
    assert rows(tmp_path / "run")[-1]["iteration"] == 1
    assert not list((tmp_path / "run").glob("events*"))
