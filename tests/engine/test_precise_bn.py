"""TEST.PRECISE_BN through our Trainer: checkpoints hold true averages, not running ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode

from ws_detectron.engine import Trainer
from ws_detectron.engine.loaders import build_train_loader

STATISTICS = ("running_mean", "running_var")


def test_statistics_in_the_checkpoint_are_those_of_the_training_images(tiny_cfg: CfgNode) -> None:
    """Each batch holds the whole set, so the true statistics do not depend on any drawing."""
    tiny_cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    tiny_cfg.MODEL.RESNETS.NORM = "BN"
    tiny_cfg.INPUT.RANDOM_FLIP = "none"
    tiny_cfg.SOLVER.IMS_PER_BATCH = 4
    tiny_cfg.TEST.PRECISE_BN.ENABLED = True
    tiny_cfg.TEST.PRECISE_BN.NUM_ITER = 3
    tiny_cfg.DATASETS.TEST = ()
    trainer = Trainer(tiny_cfg)
    trainer.train()
    saved = torch.load(Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth", weights_only=False)["model"]

    stem = trainer.model.backbone.bottom_up.stem.conv1
    images = trainer.model.preprocess_image(next(iter(build_train_loader(tiny_cfg)))).tensor
    features = torch.nn.functional.conv2d(images, stem.weight, stride=2, padding=3)
    norm = {key: saved[f"backbone.bottom_up.stem.conv1.norm.{key}"] for key in STATISTICS}
    torch.testing.assert_close(norm["running_mean"], features.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    # the batches' unbiased variances, pooled: n - 1 or n of 4 * 32 * 32 values makes 0.03 %
    torch.testing.assert_close(norm["running_var"], features.var((0, 2, 3)), rtol=1e-3, atol=1e-5)


def test_an_evaluation_uses_the_statistics_of_the_checkpoint(
    tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the mask head, which sees sampled RoIs only, and in evaluation other ones."""
    tiny_cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    tiny_cfg.MODEL.ROI_MASK_HEAD.NORM = "BN"
    tiny_cfg.TEST.PRECISE_BN.ENABLED = True
    tiny_cfg.TEST.PRECISE_BN.NUM_ITER = 2
    seen: list[dict[str, torch.Tensor]] = []
    test = Trainer.test.__func__  # type: ignore[attr-defined]

    def watched(cls: Any, cfg: CfgNode, model: torch.nn.Module, *args: Any) -> Any:
        head = model.state_dict()
        seen.append({k: v.clone() for k, v in head.items() if k.endswith(STATISTICS)})
        return test(cls, cfg, model, *args)

    monkeypatch.setattr(Trainer, "test", classmethod(watched))
    trainer = Trainer(tiny_cfg)
    hooks = [type(hook).__name__ for hook in trainer._hooks]
    assert hooks.index("SharedStatistics") == hooks.index("PreciseBN") + 1
    assert hooks.index("SharedStatistics") < hooks.index("PeriodicCheckpointer")
    trainer.train()
    saved = torch.load(Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth", weights_only=False)["model"]
    assert len(seen) == 1 and any("mask_head" in name for name in seen[0])
    for name, value in seen[0].items():
        torch.testing.assert_close(value, saved[name], rtol=0, atol=0)
        assert value.abs().sum() > 0 and not torch.equal(value, torch.ones_like(value)), name
