"""TEST.PRECISE_BN through our Trainer: checkpoints hold true averages, not running ones."""

from pathlib import Path

import torch
from detectron2.config import CfgNode

from ws_detectron.engine import Trainer
from ws_detectron.engine.loaders import build_train_loader


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
    mean = saved["backbone.bottom_up.stem.conv1.norm.running_mean"]
    torch.testing.assert_close(mean, features.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
