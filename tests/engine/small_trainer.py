"""`Trainer` of a model with three weights: a whole run, in no time."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from torch import nn

from ws_detectron import add_ws_config
from ws_detectron.engine import Trainer


class Model(nn.Module):
    """Its loss is the square of the distance of its weight to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.norm = nn.GroupNorm(1, 2)

    def forward(self, batch: object) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight - self.norm.weight.sum() / 2).square().sum()}


class SmallTrainer(Trainer):
    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return Model()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterator[object]:
        return itertools.repeat(None)


def small_cfg(output_dir: Path, iterations: int = 2) -> CfgNode:
    """A config for `SmallTrainer`, without evaluation."""
    cfg = get_cfg()
    add_ws_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 1, 0.001
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = iterations, (), 0
    cfg.OUTPUT_DIR = str(output_dir)
    return cfg
