"""Runs of LazyConfigs: reading, checks, and training, evaluation and resume of a small model."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.evaluation import COCOEvaluator

from ws_detectron import WSConv2d
from ws_detectron.engine import lazy
from ws_detectron.engine.lazy import load_lazy_config, start_lazy_run
from ws_detectron.errors import ConfigError, DivergedError, UserError

NAME = "lazy/mask_rcnn_R_18_FPN_shapes_gn_ws.py"
SMALL = """
model.module.roi_heads.num_classes=1 model.module.roi_heads.batch_size_per_image=8
model.module.proposal_generator.post_nms_topk=[10,10]
model.module.roi_heads.box_predictor.test_score_thresh=0.001
model.module.roi_heads.box_predictor.test_topk_per_image=3
dataloader.train.mapper.instance_mask_format=polygon dataloader.train.total_batch_size=2
dataloader.train.num_workers=0 dataloader.test.num_workers=0
train.max_iter=2 train.eval_period=2 train.log_period=1 optimizer.lr=0.001
""".split()


def arguments(*opts: str, **options: Any) -> argparse.Namespace:
    given = {"resume": False, "eval_only": False, "num_gpus": 1, "num_machines": 1}
    given |= {"machine_rank": 0, "dist_url": "auto", "config_file": NAME, "overwrite": False}
    return argparse.Namespace(**{**given, **options}, opts=list(opts))


@pytest.fixture(autouse=True)
def no_environment_in_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """detectron2 starts compilers for it."""
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", str)


@pytest.fixture
def small(coco_set: str, tmp_path: Path) -> Callable[..., argparse.Namespace]:
    """Arguments of a run of the small model on four images of 64 pixels."""
    data = [f"dataloader.{part}.dataset.names={coco_set}" for part in ("train", "test")]
    output = f"train.output_dir={tmp_path / 'run'}"
    return lambda *opts, **options: arguments(*SMALL, *data, output, *opts, **options)


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_run_is_trained_evaluated_and_resumed(
    small: Callable[..., argparse.Namespace], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    results = run / "inference" / "coco_instances_results.json"
    first = start_lazy_run(small())
    assert first is not None and {"bbox", "segm"} <= set(first)
    for name in ("config.yaml", "log.txt", "model_final.pth", "model_best.pth", "run_record.json"):
        assert (run / name).is_file(), name
    assert "Model: 12.39 M parameters, 32 WS convs" in capsys.readouterr().out
    config, predictions = (run / "config.yaml").read_text(), json.loads(results.read_text())
    assert len(predictions) == 4 * 3
    results.unlink()

    # the same weights, folded when they are loaded
    weights = f"train.init_checkpoint={run / 'model_final.pth'}"
    start_lazy_run(arguments(weights, config_file=str(run / "config.yaml"), eval_only=True))
    assert json.loads(results.read_text()) == predictions
    assert (run / "config.yaml").read_text() == config

    with pytest.raises(UserError, match=r"holds a run \(metrics.json, last_checkpoint"):
        start_lazy_run(small())
    assert start_lazy_run(small(resume=True)) is None
    assert "Starting training" not in capsys.readouterr().out.rpartition("is finished")[2]
    with pytest.raises(ConfigError, match="train.max_iter is 1, but the run .* has done 2"):
        start_lazy_run(small("train.max_iter=1", resume=True))

    options = ["train.max_iter=4", "optimizer.lr=0.5", "dataloader.evaluator=null"]
    start_lazy_run(small(*options, resume=True))
    last = [row for row in metrics(run) if row["iteration"] == 3][-1]
    # warm-up over 50 of 840 steps of the config is 50/840 of 4: done. Cosine at 3/4
    assert last["lr"] == pytest.approx(0.5 * (1 - 2**-0.5) / 2)
    assert [row["iteration"] for row in metrics(run) if "total_loss" in row] == [0, 1, 2, 3]
    record = json.loads((run / "run_record.json").read_text())
    assert (record["starts"], record["iterations"]) == (2, 4)

    start_lazy_run(small("train.max_iter=1", "dataloader.evaluator=null", overwrite=True))
    assert [row["iteration"] for row in metrics(run)] == [0]


OF_MY_OWN = """
from detectron2.config import LazyCall as L, LazyConfig
from detectron2.evaluation import COCOEvaluator
from ws_detectron.model_zoo import get_config_file

globals().update(LazyConfig.load(get_config_file({name!r})))
dataloader.evaluator = [L(COCOEvaluator)(dataset_name={data!r}, tasks=["bbox"]) for _ in range(2)]
"""


def test_training_evaluates_folded_weights_by_every_evaluator(
    small: Callable[..., argparse.Namespace],
    coco_set: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "config.py"
    config.write_text(OF_MY_OWN.format(name=NAME, data=coco_set))
    calls: list[tuple] = []
    monkeypatch.setattr(lazy, "inference_on_dataset", lambda *args: calls.append(args) or {})
    start_lazy_run(small("train.max_iter=1", config_file=str(config)))
    ((model, loader, evaluators),) = calls
    assert not any(isinstance(module, WSConv2d) for module in model.modules())
    assert len(loader) == 4 and len(evaluators) == 2
    assert all(isinstance(evaluator, COCOEvaluator) for evaluator in evaluators)


def test_divergence_is_one_message(small: Callable[..., argparse.Namespace]) -> None:
    options = ["optimizer.lr=1e30", "train.max_iter=5", "dataloader.evaluator=null"]
    options += ["lr_multiplier.warmup_factor=1.0"]
    with pytest.raises(DivergedError, match=r"diverged at iteration \d: .*; lower optimizer.lr"):
        start_lazy_run(small(*options))


def test_what_trains_badly_is_warned_of(
    small: Callable[..., argparse.Namespace],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lazy.SimpleTrainer, "train", lambda *_: None)
    options = ["model.module.backbone.bottom_up.freeze_at=2"]
    options += [f"model.module.backbone.bottom_up.{part}.norm=BN" for part in ("stem", "stages")]
    lazy.logger.addHandler(caplog.handler)
    try:
        start_lazy_run(small(*options))
    finally:
        lazy.logger.removeHandler(caplog.handler)
    assert "would stay random: backbone.bottom_up.stem, backbone.bottom_up.res2;" in caplog.text
    assert "BN computes its statistics over 2 image(s) at a time" in caplog.text


REFUSED = {
    "device": (["train.device=cuda"], "train.device is 'cuda', but no CUDA .*: train.device=cpu"),
    "amp": (["train.amp.enabled=True"], "train.amp.enabled is True, which needs train.device=cuda"),
    "weights": (["train.init_checkpoint=no.pth"], "init_checkpoint is 'no.pth', which is not a"),
    "data set": (["dataloader.test.dataset.names=[mine]"], "test.dataset.names names 'mine'"),
    "batch": (["dataloader.train.total_batch_size=3"], "size is 3, not a multiple of the 2 proc"),
    "classes": (["model.module.roi_heads.num_classes=0"], "num_classes of the model is 0"),
    "misspelled": (["train.max_itr=3"], "did you mean train.max_iter. To add it, write .train.max"),
    "not an override": (["train.max_iter"], "override train.max_iter: .*; allowed: key=value"),
    "not a node": (["train.max_iter.x=3"], "override train.max_iter.x=3: "),
    "needed": (["train.device=null"], f"config file {NAME} lacks train.device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_user_errors_name_the_key(
    case: str, small: Callable[..., argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    opts, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        start_lazy_run(small(*opts, num_gpus=2 if case == "batch" else 1))


def test_evaluation_needs_weights(small: Callable[..., argparse.Namespace]) -> None:
    with pytest.raises(ConfigError, match="train.init_checkpoint is empty; name a checkpoint"):
        start_lazy_run(small(eval_only=True))
    with pytest.raises(UserError, match="--overwrite cannot be combined with --eval-only"):
        start_lazy_run(small(eval_only=True, overwrite=True))


def test_new_keys_are_added() -> None:
    cfg = load_lazy_config(NAME, ["train.note=a", "+train.max_itr=3", "model.module.vis_period=7"])
    assert (cfg.train.note, cfg.train.max_itr, cfg.model.module.vis_period) == ("a", 3, 7)
    assert cfg.dataloader.evaluator._target_ is COCOEvaluator


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("model = dict(a=1)")
    with pytest.raises(ConfigError, match="no LazyConfig, as it defines no `train`; tools/train_n"):
        load_lazy_config(str(path))
    with pytest.raises(ConfigError, match="no LazyConfig"):
        load_lazy_config("quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml")
    with pytest.raises(ConfigError, match="must end in .py, .yaml or .yml"):
        load_lazy_config(str(path.rename(tmp_path / "config.txt")))
    with pytest.raises(UserError, match="did you mean lazy/mask_rcnn_R_18_FPN_shapes_gn_ws.py"):
        load_lazy_config(NAME.replace("_gn_ws", "_gnws"))
