"""The table of registrations: complete, correct, and open to other projects."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from torch import nn

from ws_detectron import WSConv2d, convert_to_ws
from ws_detectron.checkpoint import WSCheckpointer
from ws_detectron.engine import load_config
from ws_detectron.engine.checks import norm_keys
from ws_detectron.engine.inference import stock_config, write_folded
from ws_detectron.errors import ConfigError
from ws_detectron.modeling import (
    REGISTRATIONS,
    Registration,
    WSSettings,
    registrations_in,
    stock_name,
)

SMALL = [
    *["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"],
    *["MODEL.FPN.OUT_CHANNELS", "64"],
]


def switches() -> set[str]:
    booleans = {k for k, value in WSSettings().as_config().items() if isinstance(value, bool)}
    return booleans - {"AFFINE"}


def test_table_holds_every_registered_name_and_switch() -> None:
    registries = {id(row.registry): row.registry for row in REGISTRATIONS}.values()
    registered = {
        name
        for registry in registries
        for name, part in registry
        if part.__module__.startswith("ws_detectron.")
    }
    assert registered == {row.name for row in REGISTRATIONS}
    assert len({(row.key, row.name) for row in REGISTRATIONS}) == len(REGISTRATIONS)
    assert {switch for row in REGISTRATIONS for switch in row.norms} == switches()


@pytest.mark.parametrize("row", REGISTRATIONS, ids=lambda row: row.name)
def test_rows_name_keys_and_stock_parts_of_detectron2(row: Registration) -> None:
    if row.stock:
        assert row.registry.get(row.stock).__module__.startswith("detectron2.")
    opts = [row.key, row.name]
    for key in row.norms.values():
        opts += [key, "GN"]
    cfg = get_cfg()
    cfg.merge_from_list(opts)  # refuses an unknown key
    assert registrations_in(cfg) == [row]
    if row.stock:
        assert stock_name(row.key, row.name) == stock_name(row.key, row.stock) == row.stock
    else:
        assert stock_name(row.key, row.name) == row.name


def test_norms_of_ws_retinanet_are_checked_as_those_of_retinanet() -> None:
    cfg = get_cfg()
    keys = []
    for name in ("RetinaNet", "WSRetinaNet"):
        cfg.MODEL.META_ARCHITECTURE = name
        keys.append(norm_keys(cfg))
    assert keys[0] == keys[1] and "MODEL.RETINANET.NORM" in keys[1]


@pytest.mark.parametrize(
    "leaf",
    [
        "COCO-Detection/retinanet_R_50_FPN_1x_gn_ws_towers_1img.yaml",
        "COCO-PanopticSegmentation/panoptic_R_50_FPN_1x_gn_ws_2img.yaml",
    ],
)
def test_folded_model_is_stock_with_equal_outputs(leaf: str, tmp_path: Path) -> None:
    cfg = load_config(leaf, SMALL)
    torch.manual_seed(0)
    model, stock = fold_through_files(cfg, tmp_path / "weights.pth", tmp_path / "folded.pth")
    assert type(stock).__module__.startswith("detectron2.")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        features, stock_features = model.backbone(images), stock.backbone(images)
        # rounding of the filters, through up to 28 norms
        torch.testing.assert_close(features, stock_features, rtol=1e-4, atol=1e-4)
        if hasattr(model, "sem_seg_head"):
            outputs = [m.sem_seg_head.layers(features) for m in (model, stock)]
        else:
            inputs = [features[name] for name in model.head_in_features]
            outputs = [m.head(inputs) for m in (model, stock)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_a_part_without_a_stock_one_is_refused_for_stock_detectron2() -> None:
    opts = ["MODEL.BACKBONE.NAME", "build_bit_resnet_fpn_backbone"]
    cfg = load_config("COCO-Detection/faster_rcnn_R_50_FPN_1x_gn_ws_1img.yaml", opts)
    with pytest.raises(ConfigError, match="build_bit_resnet_fpn_backbone.*needs ws_detectron"):
        stock_config(cfg, "")


def fold_through_files(cfg: CfgNode, weights: Path, output: Path) -> tuple[nn.Module, nn.Module]:
    """A random model of `cfg`, and the model that detectron2 builds from its folded files."""
    model = build_model(cfg).eval()
    WSCheckpointer(model, str(weights.parent)).save(weights.stem)
    cfg.MODEL.WEIGHTS = str(weights)
    _, config = write_folded(cfg, output)
    folded_cfg = get_cfg()  # without add_ws_config
    folded_cfg.merge_from_file(str(config))
    try:
        stock = build_model(folded_cfg).eval()
    except ValueError as error:
        if "num_channels (1)" in str(error):
            pytest.skip("0.6 tries GN of one channel in RetinaNet's head, which torch refuses")
        raise
    assert not any(isinstance(m, WSConv2d) for m in stock.modules())
    stock.load_state_dict(torch.load(output, weights_only=True)["model"])
    return model, stock


def build_external_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """A WS backbone of another project: detectron2's FPN and `convert_to_ws`."""
    backbone = build_resnet_fpn_backbone(cfg, input_shape)
    convert_to_ws(backbone)
    return backbone


@pytest.fixture
def external_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What the module of another project does when it is imported."""
    monkeypatch.setattr(BACKBONE_REGISTRY, "_obj_map", dict(BACKBONE_REGISTRY._obj_map))
    BACKBONE_REGISTRY.register(build_external_backbone)
    row = Registration(
        BACKBONE_REGISTRY,
        "MODEL.BACKBONE.NAME",
        "build_external_backbone",
        "build_resnet_fpn_backbone",
        {"BACKBONE": "MODEL.RESNETS.NORM", "FPN": "MODEL.FPN.NORM"},
    )
    REGISTRATIONS.append(row)
    yield row.name
    REGISTRATIONS.remove(row)


def test_an_external_backbone_is_one_row_and_then_folds(external_name: str, tmp_path: Path) -> None:
    opts = [*SMALL, "MODEL.BACKBONE.NAME", external_name]
    cfg = load_config("COCO-Detection/faster_rcnn_R_50_FPN_1x_gn_ws_1img.yaml", opts)
    assert stock_config(cfg, "").MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"
    torch.manual_seed(0)
    model, stock = fold_through_files(cfg, tmp_path / "weights.pth", tmp_path / "folded.pth")
    assert isinstance(model.backbone.fpn_output2, WSConv2d)
    assert type(stock.backbone.fpn_output2) is Conv2d
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = model.backbone(images), stock.backbone(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
