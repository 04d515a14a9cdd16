"""The registered WS heads: box, mask, RetinaNet's towers, semantic."""

import logging

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import build_model, build_sem_seg_head
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads import build_box_head, build_mask_head
from detectron2.structures import Instances
from torch import nn

from ws_detectron import WSConv2d, add_ws_config
from ws_detectron.errors import ConfigError

BOX_INPUT = ShapeSpec(channels=64, height=7, width=7)
MASK_INPUT = ShapeSpec(channels=64, height=14, width=14)
FPN_SHAPES = {f"p{i}": ShapeSpec(channels=64, stride=2**i) for i in (2, 3, 4, 5)}
TOWER_CONVS = [f"{tower}_subnet.{i}" for tower in ("cls", "bbox") for i in (0, 3)]


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


def sem_seg_config(**ws: object) -> CfgNode:
    cfg = head_config(**ws)
    cfg.MODEL.SEM_SEG_HEAD.NAME, cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = "WSSemSegFPNHead", 64
    return cfg


def retinanet_config(norm: str = "GN", **ws: object) -> CfgNode:
    """Two convs in each tower, 64 channels, and a stock backbone without norm."""
    cfg = head_config(**ws)
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "WSRetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.RETINANET.NORM, cfg.MODEL.RETINANET.NUM_CONVS = norm, 2
    return cfg


def stock_retinanet(cfg: CfgNode) -> nn.Module:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    torch.manual_seed(0)
    try:
        return build_model(cfg)
    except ValueError as error:
        if "num_channels (1)" in str(error):
            pytest.skip("0.6 tries GN of one channel, which torch refuses")
        raise


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


def test_sem_seg_head_standardizes_its_convs_and_not_its_predictor() -> None:
    """p2 and p3 have one conv, p4 and p5 one for each doubling of their size."""
    cfg = sem_seg_config()
    torch.manual_seed(0)
    head = build_sem_seg_head(cfg, FPN_SHAPES)
    assert ws_names(head) == ["p2.0", "p3.0", "p4.0", "p4.2", "p5.0", "p5.2", "p5.4"]
    assert all(conv is scale[0] for conv, scale in zip((head.p2[0], head.p3[0]), head.scale_heads))
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SemSegFPNHead"
    torch.manual_seed(0)
    stock = build_sem_seg_head(cfg, FPN_SHAPES)
    torch.testing.assert_close(head.state_dict(), stock.state_dict())


def test_sem_seg_head_can_be_switched_off_and_takes_mode_eps_and_groups() -> None:
    head = build_sem_seg_head(sem_seg_config(SEM_SEG_HEAD=False), FPN_SHAPES)
    assert ws_names(head) == [] and type(head.p2[0]) is Conv2d
    head = build_sem_seg_head(sem_seg_config(MODE="paper", EPS=1e-3, GN_GROUPS=4), FPN_SHAPES)
    convs = [m for m in head.modules() if isinstance(m, WSConv2d)]
    assert {(c.ws_mode, c.ws_eps, c.norm.num_groups) for c in convs} == {("paper", 1e-3, 4)}


def test_sem_seg_head_refuses_by_key() -> None:
    for norm in ("", "GroupNorm"):
        cfg = sem_seg_config()
        cfg.MODEL.SEM_SEG_HEAD.NORM = norm
        with pytest.raises(ConfigError, match="MODEL.SEM_SEG_HEAD.NORM"):
            build_sem_seg_head(cfg, FPN_SHAPES)
    with pytest.raises(ConfigError, match="48; .* 64 channels of sem_seg_head.p2.0.norm"):
        build_sem_seg_head(sem_seg_config(GN_GROUPS=48), FPN_SHAPES)


def test_retinanet_standardizes_its_towers_and_not_its_predictors() -> None:
    cfg = retinanet_config()
    cfg.freeze()  # as a trainer's is
    torch.manual_seed(0)
    model = build_model(cfg)
    assert ws_names(model) == [f"head.{name}" for name in TOWER_CONVS]
    stock = stock_retinanet(cfg)
    torch.testing.assert_close(model.state_dict(), stock.state_dict())
    assert list(model.state_dict()) == list(stock.state_dict())


def test_retinanet_head_computes_the_stock_head_with_standardized_filters() -> None:
    """Compared conv by conv with the formula of mode "paper" in float64."""
    model = build_model(retinanet_config(MODE="paper", EPS=1e-5)).double()
    stock = stock_retinanet(retinanet_config()).double()
    stock.load_state_dict(model.state_dict())
    for tower in (stock.head.cls_subnet, stock.head.bbox_subnet):
        for i in (0, 3):
            weight = tower[i].weight.data
            std, mean = torch.std_mean(weight, (1, 2, 3), unbiased=False, keepdim=True)
            weight.copy_((weight - mean) / (std + 1e-5))
    features = [torch.randn(2, 64, size, size, dtype=torch.float64) for size in (16, 8, 4, 2, 1)]
    torch.testing.assert_close(model.head(features), stock.head(features))


def test_retinanet_towers_can_be_switched_off_and_take_mode_eps_and_groups() -> None:
    head = build_model(retinanet_config(RETINANET_HEAD=False)).head
    assert type(head) is RetinaNetHead and ws_names(head) == []
    assert {type(head.cls_subnet[i]) for i in (0, 3)} == {nn.Conv2d}
    head = build_model(retinanet_config(MODE="paper", EPS=1e-3, GN_GROUPS=4)).head
    convs = [m for m in head.modules() if isinstance(m, WSConv2d)]
    assert {(c.ws_mode, c.ws_eps) for c in convs} == {("paper", 1e-3)}
    assert {m.num_groups for m in head.modules() if isinstance(m, nn.GroupNorm)} == {4}


def test_retinanet_refuses_by_key() -> None:
    for norm in ("", "GroupNorm"):
        with pytest.raises(ConfigError, match="MODEL.RETINANET.NORM"):
            build_model(retinanet_config(norm))
    with pytest.raises(ConfigError, match="48; .* 64 channels of head.cls_subnet.1"):
        build_model(retinanet_config(GN_GROUPS=48))
    build_model(retinanet_config("", RETINANET_HEAD=False))


def test_retinanet_with_bn_is_as_in_stock_and_standardized(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """0.5 shares BN over the levels and warns; 0.6 has one for each level and says so."""
    cfg = retinanet_config("BN")
    messages = []
    for build in (build_model, stock_retinanet):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="detectron2"):
            model = build(cfg)
        logged = [r for r in caplog.records if r.name.endswith("meta_arch.retinanet")]
        messages.append([record.getMessage() for record in logged])
        assert len(ws_names(model)) == (4 if build is build_model else 0)
    assert messages[0] and messages[0] == messages[1]
