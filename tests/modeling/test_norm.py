"""Norms by name: the table, detectron2's names, and layers that cannot be built."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ws_detectron import WSConv2d
from ws_detectron.engine import load_config
from ws_detectron.engine.inference import stock_config
from ws_detectron.errors import ConfigError
from ws_detectron.layers import GroupNorm
from ws_detectron.modeling import NORMS, WSSettings
from ws_detectron.modeling.norm import check_norm, check_norm_layers, get_norm

RETINANET = """
MODEL:
  META_ARCHITECTURE: WSRetinaNet
  DEVICE: cpu
  BACKBONE: {NAME: build_ws_retinanet_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS:
    DEPTH: 18
    RES2_OUT_CHANNELS: 64
    OUT_FEATURES: [res3, res4, res5]
    NORM: MyNorm
  FPN: {IN_FEATURES: [res3, res4, res5], OUT_CHANNELS: 16, NORM: MyNorm}
  RETINANET: {NORM: MyNorm, NUM_CONVS: 1, IOU_THRESHOLDS: [0.4, 0.5], IOU_LABELS: [0, -1, 1]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
VERSION: 2
"""


class MyNorm(nn.ModuleList):
    """Not a norm class of torch, like the lists of norms in newer detectron2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[0](x)


def my_norm(channels: int, ws: WSSettings) -> nn.Module:
    return MyNorm([nn.BatchNorm2d(channels, eps=ws.eps)])


def test_gn_is_ours_with_the_groups_of_the_settings() -> None:
    norm = get_norm("GN", WSSettings(gn_groups=4))(12)
    assert type(norm) is GroupNorm and (norm.num_groups, norm.num_channels) == (4, 12)


@pytest.mark.parametrize("norm", ["", "BN", "SyncBN", "FrozenBN", nn.BatchNorm2d])
def test_norms_of_detectron2_are_returned_unchanged(norm: object) -> None:
    assert get_norm(norm, WSSettings()) is norm


def test_check_norm_accepts_the_table_and_names_of_detectron2() -> None:
    for norm in ("", "GN", "BN", "SyncBN", "FrozenBN", "naiveSyncBN"):
        check_norm("MODEL.FPN.NORM", norm)
    with pytest.raises(ConfigError, match="MODEL.FPN.NORM is 'gn'; allowed: .*\"GN\""):
        check_norm("MODEL.FPN.NORM", "gn")


def test_layers_that_cannot_be_built_are_named() -> None:
    build = get_norm("GN", WSSettings(gn_groups=8))
    build(1)  # 0.6's RetinaNet head does, to look at the type
    block = nn.ModuleDict({"a": build(16), "b": nn.Sequential(build(12))})
    with pytest.raises(ConfigError) as caught:
        check_norm_layers(block, "backbone")
    for part in ("MODEL.WS.GN_GROUPS is 8", "divisor of 12", "12 channels of backbone.b.0"):
        assert part in str(caught.value)
    check_norm_layers(block["a"], "backbone")


def test_a_new_norm_is_one_function_and_one_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From a YAML file to one training step; convs before `MyNorm` are standardized."""
    path = tmp_path / "mine.yaml"
    path.write_text(RETINANET)
    with pytest.raises(ConfigError, match="MODEL.RETINANET.NORM is 'MyNorm'"):
        build_model(load_config(str(path)))
    monkeypatch.setitem(NORMS, "MyNorm", my_norm)
    cfg = load_config(str(path), ["MODEL.WS.EPS", "1e-3"])
    model = build_model(cfg)
    norms = [m for m in model.modules() if isinstance(m, MyNorm)]
    # R-18 has 20 convs, the FPN two for each of three levels, the towers one each
    assert len(norms) == sum(isinstance(m, WSConv2d) for m in model.modules()) == 20 + 6 + 2
    assert {norm[0].eps for norm in norms} == {1e-3}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    target = Instances((64, 64))
    target.gt_boxes, target.gt_classes = Boxes(torch.tensor([[8.0, 8, 48, 48]])), torch.tensor([0])
    images = [{"image": torch.rand(3, 64, 64) * 255, "instances": target} for _ in range(2)]
    with EventStorage():
        sum(model(images).values()).backward()
    optimizer.step()
    assert all(norm[0].weight.grad.any() for norm in norms)
    assert (norms[0][0].weight != 1).any()
    assert all(torch.isfinite(value).all() for value in model.parameters())

    with pytest.raises(ConfigError, match="MODEL.RESNETS.NORM is 'MyNorm'.*needs ws_detectron"):
        stock_config(cfg, "")
