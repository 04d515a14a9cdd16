"""The registered WS box and mask heads."""

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_box_head, build_mask_head
from detectron2.structures import Instances
from torch import nn

from ws_detectron import WSConv2d, add_ws_config
from ws_detectron.errors import ConfigError

BOX_INPUT = ShapeSpec(channels=64, height=7, width=7)
MASK_INPUT = ShapeSpec(channels=64, height=14, width=14)


def head_config(**ws: object) -> CfgNode:
    cfg = get_cfg()
    add_ws_config(cfg)
    box, mask = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
    box.NAME, box.NORM, box.NUM_CONV, box.NUM_FC, box.CONV_DIM = (
        "WSFastRCNNConvFCHead",
        "GN",
        4,
        1,
        64,
    )
    mask.NAME, mask.NORM, mask.NUM_CONV, mask.CONV_DIM = "WSMaskRCNNConvUpsampleHead", "GN", 4, 64
    for key, value in ws.items():
        cfg.MODEL.WS[key] = value
    return cfg


def ws_names(module: nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if isinstance(m, WSConv2d)]


def test_box_head_standardizes_its_four_convs_and_not_its_fc() -> None:
    cfg = head_config()
    torch.manual_seed(0)
    head = build_box_head(cfg, BOX_INPUT)
    assert ws_names(head) == ["conv1", "conv2", "conv3", "conv4"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    torch.manual_seed(0)
    stock = build_box_head(cfg, BOX_INPUT)
    torch.testing.assert_close(head.state_dict(), stock.state_dict())
    assert head.output_shape == stock.output_shape


def test_mask_head_standardizes_its_four_convs_and_not_deconv_and_logits() -> None:
    cfg = head_config()
    torch.manual_seed(0)
    head = build_mask_head(cfg, MASK_INPUT)
    assert ws_names(head) == ["mask_fcn1", "mask_fcn2", "mask_fcn3", "mask_fcn4"]
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    torch.manual_seed(0)
    stock = build_mask_head(cfg, MASK_INPUT)
    torch.testing.assert_close(head.state_dict(), stock.state_dict())


def test_each_head_can_be_switched_off() -> None:
    cfg = head_config(BOX_HEAD=False, MASK_HEAD=False)
    assert ws_names(build_box_head(cfg, BOX_INPUT)) == []
    assert ws_names(build_mask_head(cfg, MASK_INPUT)) == []


def test_mode_eps_and_groups_reach_the_convs() -> None:
    cfg = head_config(MODE="paper", EPS=1e-3, GN_GROUPS=4)
    for head in (build_box_head(cfg, BOX_INPUT), build_mask_head(cfg, MASK_INPUT)):
        convs = [m for m in head.modules() if isinstance(m, WSConv2d)]
        assert {(c.ws_mode, c.ws_eps, c.norm.num_groups) for c in convs} == {("paper", 1e-3, 4)}


@pytest.mark.parametrize("rois", [0, 3])
def test_box_head_takes_any_number_of_rois(rois: int) -> None:
    head = build_box_head(head_config(), BOX_INPUT)
    y = head(torch.randn(rois, 64, 7, 7))
    assert y.shape == (rois, 1024)
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_mask_head_takes_no_rois() -> None:
    head = build_mask_head(head_config(), MASK_INPUT).eval()
    empty = Instances((32, 32))
    empty.pred_classes = torch.zeros(0, dtype=torch.int64)
    (result,) = head(torch.zeros(0, 64, 14, 14), [empty])
    assert result.pred_masks.shape == (0, 1, 28, 28)


@pytest.mark.parametrize("part", ["BOX", "MASK"])
def test_refuses_by_key(part: str) -> None:
    build = build_box_head if part == "BOX" else build_mask_head
    shape = BOX_INPUT if part == "BOX" else MASK_INPUT
    key = f"MODEL.ROI_{part}_HEAD.NORM"
    for norm in ("", "GroupNorm"):
        cfg = head_config()
        cfg.MODEL[f"ROI_{part}_HEAD"].NORM = norm
        with pytest.raises(ConfigError, match=key):
            build(cfg, shape)
    cfg = head_config(GN_GROUPS=48)
    with pytest.raises(ConfigError) as caught:
        build(cfg, shape)
    assert all(text in str(caught.value) for text in ("64 channels", "48", f"{part.lower()}_head"))


def test_refuses_a_head_without_convs() -> None:
    cfg = head_config()
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 0
    with pytest.raises(ConfigError, match="NUM_CONV"):
        build_box_head(cfg, BOX_INPUT)
