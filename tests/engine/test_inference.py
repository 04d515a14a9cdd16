from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d

from ws_detectron.checkpoint import WeightsError, WSCheckpointer
from ws_detectron.engine import Trainer
from ws_detectron.engine.inference import load_model_for_inference
from ws_detectron.errors import ConfigError
from ws_detectron.layers import WSConv2d


def test_weights_are_loaded_folded_and_give_the_same_features(
    tiny_cfg: CfgNode, tmp_path: Path
) -> None:
    trained = Trainer.build_model(tiny_cfg).eval()
    WSCheckpointer(trained, str(tmp_path)).save("trained")
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "trained.pth")
    model = load_model_for_inference(tiny_cfg)
    assert not model.training
    assert not any(isinstance(module, WSConv2d) for module in model.modules())
    assert any(isinstance(module, WSConv2d) for module in trained.modules())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = trained.backbone(image), model.backbone(image)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_ws_weights_are_folded_into_a_config_of_plain_convs(
    tiny_cfg: CfgNode, tmp_path: Path
) -> None:
    trained = Trainer.build_model(tiny_cfg).eval()
    WSCheckpointer(trained, str(tmp_path)).save("trained")
    plain = tiny_cfg.clone()
    plain.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    plain.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    plain.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    plain.MODEL.WEIGHTS = str(tmp_path / "trained.pth")
    model = load_model_for_inference(plain)
    assert type(model.backbone.bottom_up.stem.conv1) is Conv2d
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = trained.backbone(image)["p2"], model.backbone(image)["p2"]
    torch.testing.assert_close(found, expected)


def test_resume_takes_the_last_checkpoint(tiny_cfg: CfgNode) -> None:
    trained = Trainer.build_model(tiny_cfg)
    WSCheckpointer(trained, tiny_cfg.OUTPUT_DIR).save("model_0000001")
    model = load_model_for_inference(tiny_cfg, resume=True)
    name = "roi_heads.box_predictor.cls_score.weight"
    torch.testing.assert_close(model.state_dict()[name], trained.state_dict()[name])


@pytest.mark.parametrize("resume", [False, True])
def test_random_weights_are_refused(tiny_cfg: CfgNode, resume: bool) -> None:
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS is empty"):
        load_model_for_inference(tiny_cfg, resume=resume)


def test_missing_weights_are_named(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.WEIGHTS = "no.pth"
    with pytest.raises(WeightsError, match="no.pth"):
        load_model_for_inference(tiny_cfg)


def test_weights_of_a_part_are_refused(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    state = Trainer.build_model(tiny_cfg).state_dict()
    body = {key: value for key, value in state.items() if key.startswith("backbone.bottom_up.")}
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "x.pth")
    torch.save({"model": body}, tiny_cfg.MODEL.WEIGHTS)
    with pytest.raises(WeightsError, match=r"x.pth does not .* roi_heads.mask_head \(1"):
        load_model_for_inference(tiny_cfg)
    torch.save({"model": state}, tiny_cfg.MODEL.WEIGHTS)
    tiny_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    with pytest.raises(WeightsError, match="cls_score.weight is .*MODEL.ROI_HEADS.NUM_CLASSES"):
        load_model_for_inference(tiny_cfg)
