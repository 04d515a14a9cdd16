"""ws_detectron.export on small models with random weights; trained ones are in results/export."""

import importlib.util
import json
import math

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances

from ws_detectron import export
from ws_detectron.engine import Trainer, load_config
from ws_detectron.errors import ConfigError, UserError
from ws_detectron.layers import WSConv2d
from ws_detectron.modeling import fold_ws

MASK_RCNN = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x_gn_ws_towers_1img.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_R_50_FPN_1x_gn_ws_2img.yaml"
SMALL = """
MODEL.DEVICE cpu MODEL.RPN.POST_NMS_TOPK_TEST 10 TEST.DETECTIONS_PER_IMAGE 8
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.RETINANET.SCORE_THRESH_TEST 0.0
""".split()
SMALL_RETINANET = """
MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.RESNETS.STRIDE_IN_1X1 False
MODEL.FPN.OUT_CHANNELS 64 MODEL.RETINANET.NUM_CLASSES 3 MODEL.RETINANET.NUM_CONVS 1
MODEL.RETINANET.TOPK_CANDIDATES_TEST 20
""".split()


def small_config(name: str, *options: str) -> CfgNode:
    return load_config(name, [*SMALL, *options])


def small_model(name: str, *options: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = Trainer.build_model(small_config(name, *options)).eval().requires_grad_(False)
    assert any(isinstance(module, WSConv2d) for module in model.modules())
    return fold_ws(model)


def sample(height: int, width: int) -> dict:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "height": 90, "width": 70}


def exported(model: torch.nn.Module, part: str, format: str, size: tuple[int, int]) -> bytes:
    inputs = export.model_inputs(model, sample(*size), part)
    return export.export(model, inputs, format, {"part": part})


DETECTORS = {
    "faster": (MASK_RCNN, ["MODEL.MASK_ON", "False"], ["torchscript"]),
    "retinanet": (RETINANET, SMALL_RETINANET, ["torchscript", "onnx"]),
}


@pytest.mark.parametrize("detector", DETECTORS)
def test_exports_find_what_detectron2_finds_at_every_size(detector: str) -> None:
    name, options, formats = DETECTORS[detector]
    model = small_model(name, *options)
    for format in formats:
        run = export.FORMATS[format].load(exported(model, "detector", format, (64, 64)))
        for height, width in ((64, 64), (40, 97)):
            found = export.compare("noise", model, sample(height, width), "detector", run)
            assert found.holds, (format, found)
            assert found.found == "8 detections" and found.size == (height, width)


@pytest.mark.parametrize(
    ("name", "options", "formats"),
    [(MASK_RCNN, [], [*export.FORMATS]), (RETINANET, SMALL_RETINANET, ["torch-export"])],
)
def test_backbone_exports_have_the_features_of_eager(name, options, formats) -> None:
    model = small_model(name, *options)
    for format in formats:
        run = export.FORMATS[format].load(exported(model, "backbone", format, (120, 128)))
        # little padding, which ONNX Runtime rounds in
        for height, width in ((250, 256), (250, 380)):
            found = export.compare("noise", model, sample(height, width), "backbone", run)
            assert found.holds, (format, found)
            assert found.found == ", ".join(model.backbone.output_shape())
        assert found.size == (256, 384)
        assert run({"images": torch.rand(3, 3, 256, 256)})["p4"].shape == (3, 64, 16, 16)


def test_padding_is_what_detectron2_pads_with() -> None:
    model = small_model(MASK_RCNN)
    one = sample(60, 33)
    images = export.model_inputs(model, one, "backbone")["images"]
    assert images.shape == (1, 3, 128, 128)
    mean, std = model.pixel_mean, model.pixel_std
    normalized = model.preprocess_image([one]).tensor[0]
    torch.testing.assert_close(((images[0] - mean) / std)[:, :64, :64], normalized)
    assert (images[0, :, 64:] == mean).all() and (images[0, :, :, 64:] == mean).all()


def test_nothing_found_is_no_error() -> None:
    """A mask head without detections normalizes no images, which ONNX Runtime has failed at."""
    model = small_model(MASK_RCNN)
    low, high = sorted((sample(64, 64), sample(64, 64)), key=lambda one: best_score(model, one))
    threshold = (best_score(model, low) + best_score(model, high)) / 2
    model.roi_heads.box_predictor.test_score_thresh = threshold
    inputs = export.model_inputs(model, high, "detector")
    run = export.FORMATS["onnx"].load(export.export(model, inputs, "onnx", {}))
    assert export.compare("", model, high, "detector", run).found != "0 detections"
    nothing = export.compare("", model, low, "detector", run)
    assert nothing.found == "0 detections" and nothing.holds
    assert run(export.model_inputs(model, low, "detector"))["masks"].shape == (0, 90, 70)


def best_score(model: torch.nn.Module, one: dict) -> float:
    return model([one])[0]["instances"].scores.max().item()


def test_graph_has_folded_filters_and_instance_normalization() -> None:
    import onnx

    model = small_model(MASK_RCNN)
    norms = [type(module) for module in model.modules()]
    graph = onnx.load_from_string(exported(model, "detector", "onnx", (64, 64)))
    onnx.checker.check_model(graph)
    constants = {tensor.name for tensor in graph.graph.initializer}
    convs = [node for node in graph.graph.node if node.op_type == "Conv"]
    assert len(convs) > 30 and all(conv.input[1] in constants for conv in convs)
    count = sum(isinstance(module, torch.nn.GroupNorm) for module in model.modules())
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("InstanceNormalization") == count > 20 and "GridSample" not in kinds
    # the model is as it was
    assert [type(module) for module in model.modules()] == norms
    assert not any(module.training for module in model.modules())


def test_metadata_say_how_to_use_a_file() -> None:
    """That files hold them is in the examples of docs/deploy.md, which read them."""
    cfg, model = small_config(MASK_RCNN), small_model(MASK_RCNN)
    about = json.loads(json.dumps(export.export_metadata(cfg, model, "detector")))
    assert about["classes"][:2] == ["circle", "ring"] and about["input_format"] == "BGR"
    assert (about["min_size"], about["max_size"]) == (128, 128)
    about = export.export_metadata(cfg, model, "backbone")
    assert about["multiple"] == 64 and about["pixel_mean"] == [127.5] * 3


def test_masks_are_pasted_as_detectron2_pastes_them() -> None:
    corners = torch.rand(20, 2) * 40
    boxes = torch.cat([corners, corners + 0.5 + torch.rand(20, 2) * 70], dim=1)
    boxes = torch.minimum(boxes, torch.tensor([70.0, 50, 70, 50]))  # as of any detector
    masks = torch.rand(20, 28, 28)
    pasted = export.paste_masks(masks, boxes, 50, 70)
    expected = paste_masks_in_image(masks, Boxes(boxes), (50, 70))
    assert pasted.dtype == torch.bool and 0.05 < pasted.float().mean() < 0.5
    # the two may round a probability of 0.5 differently
    assert (pasted != expected).sum() <= 2


def test_a_full_mask_fills_its_box() -> None:
    pasted = export.paste_masks(torch.ones(1, 2, 2), torch.tensor([[1.0, 1.0, 3.0, 4.0]]), 5, 4)
    expected = torch.zeros(5, 4, dtype=torch.bool)
    expected[1:4, 1:3] = True
    assert torch.equal(pasted[0], expected)


class Finds(torch.nn.Module):
    """A model that always finds three objects."""

    def forward(self, batch: list[dict]) -> list[dict]:
        masks = torch.zeros(3, 90, 70, dtype=torch.bool)
        masks[:, 10:40, 10:40] = True
        boxes = torch.tensor([[1.0, 2, 30, 40], [5, 6, 70, 80], [1, 2, 30, 40]])
        fields = {"pred_boxes": Boxes(boxes), "scores": torch.tensor([0.9, 0.8, 0.7])}
        fields.update(pred_classes=torch.tensor([0, 1, 2]), pred_masks=masks)
        return [{"instances": Instances((90, 70), **fields)}]


def changed(what: str) -> dict[str, torch.Tensor]:
    found = Finds()([{}])[0]["instances"]
    outputs = {
        "boxes": found.pred_boxes.tensor, "scores": found.scores, "classes": found.pred_classes,
        "masks": found.pred_masks,
    }  # fmt: skip
    if what == "box":
        outputs["boxes"][1, 2] += 0.02
    elif what == "score":
        outputs["scores"][2] += 2e-4
    elif what == "NaN":
        outputs["scores"][0] = math.nan
    elif what == "class":
        outputs["classes"][2] = 1
    elif what == "mask":
        outputs["masks"][0, 10, 10:13] = False  # 3 of 2700 pixels
    elif what == "fewer":
        outputs = {name: value[:2] for name, value in outputs.items()}
    elif what == "order":
        outputs = {name: value[[0, 2, 1]] for name, value in outputs.items()}
    elif what == "twice":
        outputs = {name: value[[0, 1, 1]] for name, value in outputs.items()}
    return outputs


@pytest.mark.parametrize("what", ["box", "score", "NaN", "class", "mask", "fewer", "twice"])
def test_differences_are_found(what: str) -> None:
    found = export.compare("", Finds(), sample(90, 70), "detector", lambda _: changed(what))
    assert not found.holds
    (row,) = export.rows([found])
    assert row[""] == "DIFFERS" and ("eager 3" in row["found"]) is (what == "fewer")


@pytest.mark.parametrize("what", ["nothing", "order"])
def test_equal_detections_are_equal_in_any_order(what: str) -> None:
    found = export.compare("", Finds(), sample(90, 70), "detector", lambda _: changed(what))
    assert found.holds and found.found == "3 detections"
    assert all(value == 0 for value, _ in found.differences.values())


@pytest.mark.parametrize(
    ("name", "format", "options", "message"),
    [
        (MASK_RCNN, "torch-export", [], "use --format torchscript or onnx, or --part backbone"),
        (PANOPTIC, "onnx", [], "MODEL.META_ARCHITECTURE is 'PanopticFPN'"),
        (
            MASK_RCNN,
            "torchscript",
            ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"],
            "use --format onnx",
        ),
        (MASK_RCNN, "onnx", ["MODEL.KEYPOINT_ON", "True"], "MODEL.KEYPOINT_ON False"),
        (MASK_RCNN, "onnx", ["MODEL.LOAD_PROPOSALS", "True"], "the proposals of 'RPN'; export its"),
        (MASK_RCNN, "onnx", ["MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"], "NAME is 'RRPN'"),
    ],
)
def test_what_cannot_be_exported_is_refused(name, format, options, message) -> None:
    cfg = small_config(name, *options)
    with pytest.raises(ConfigError, match=message):
        export.check_export(cfg, format)
    export.check_export(cfg, format, "backbone")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx and onnxruntime; .* -e \"\.\[export\]\""):
        export.check_export(small_config(MASK_RCNN), "onnx")
    export.check_export(small_config(MASK_RCNN), "torchscript")
