import pytest
from weight_samples import mmdet_keys, torchvision_keys

from ws_detectron.checkpoint.sources import (
    caffe2_key,
    mmdet_key,
    to_mmdet_key,
    torchvision_key,
)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.conv1.weight", "backbone.bottom_up.stem.conv1.weight"),
        ("backbone.gn1.bias", "backbone.bottom_up.stem.conv1.norm.bias"),
        ("backbone.layer3.22.conv2.weight", "backbone.bottom_up.res4.22.conv2.weight"),
        ("backbone.layer4.0.gn3.weight", "backbone.bottom_up.res5.0.conv3.norm.weight"),
        ("backbone.layer1.0.downsample.0.weight", "backbone.bottom_up.res2.0.shortcut.weight"),
        ("backbone.layer1.0.downsample.1.bias", "backbone.bottom_up.res2.0.shortcut.norm.bias"),
        ("neck.lateral_convs.0.conv.weight", "backbone.fpn_lateral2.weight"),
        ("neck.fpn_convs.3.gn.weight", "backbone.fpn_output5.norm.weight"),
        ("rpn_head.rpn_conv.weight", "proposal_generator.rpn_head.conv.weight"),
        ("rpn_head.rpn_cls.bias", "proposal_generator.rpn_head.objectness_logits.bias"),
        ("rpn_head.rpn_reg.weight", "proposal_generator.rpn_head.anchor_deltas.weight"),
        ("roi_head.bbox_head.shared_convs.0.conv.weight", "roi_heads.box_head.conv1.weight"),
        ("roi_head.bbox_head.shared_convs.3.gn.bias", "roi_heads.box_head.conv4.norm.bias"),
        ("roi_head.bbox_head.shared_fcs.0.weight", "roi_heads.box_head.fc1.weight"),
        ("roi_head.bbox_head.fc_cls.weight", "roi_heads.box_predictor.cls_score.weight"),
        ("roi_head.bbox_head.fc_reg.bias", "roi_heads.box_predictor.bbox_pred.bias"),
        ("roi_head.mask_head.convs.3.conv.weight", "roi_heads.mask_head.mask_fcn4.weight"),
        ("roi_head.mask_head.convs.0.gn.weight", "roi_heads.mask_head.mask_fcn1.norm.weight"),
        ("roi_head.mask_head.upsample.weight", "roi_heads.mask_head.deconv.weight"),
        ("roi_head.mask_head.conv_logits.bias", "roi_heads.mask_head.predictor.bias"),
    ],
)
def test_mmdet_keys_both_ways(theirs: str, ours: str) -> None:
    assert mmdet_key(theirs) == ours
    assert to_mmdet_key["gn"](ours) == theirs


def test_every_key_of_a_detector_maps_back_to_itself() -> None:
    keys = mmdet_keys(depth=101)
    ours = {key: mmdet_key(key) for key in keys}
    assert None not in ours.values()
    assert len(set(ours.values())) == len(keys)
    assert {to_mmdet_key["gn"](str(key)) for key in ours.values()} == set(keys)


def test_bn_names_come_back_as_bn() -> None:
    for key in torchvision_keys("resnet50", "bn"):
        ours = mmdet_key(f"backbone.{key}")
        assert ours is not None
        assert to_mmdet_key["bn"](ours) == f"backbone.{key}"


@pytest.mark.parametrize(
    "key",
    [
        "conv2.weight",
        "layer1.0.conv1.bias_of_something",
        "layer1.0.se.fc1.weight",
        "xlayer1.0.conv1.weight",
        "layer1.0.conv1.weight.extra",
        "backbone.neck.conv.weight",
        "",
    ],
)
def test_unknown_keys_have_no_place(key: str) -> None:
    assert torchvision_key(key) is None
    assert mmdet_key(key) is None
    assert to_mmdet_key["gn"](key) is None


@pytest.mark.parametrize(
    ("blob", "key"),
    [
        ("conv1_w", "stem.conv1.weight"),
        ("conv1_gn_s", "stem.conv1.norm.weight"),
        ("conv1_gn_b", "stem.conv1.norm.bias"),
        ("res2_0_branch1_w", "res2.0.shortcut.weight"),
        ("res2_0_branch1_gn_s", "res2.0.shortcut.norm.weight"),
        ("res4_22_branch2a_w", "res4.22.conv1.weight"),
        ("res5_2_branch2c_gn_b", "res5.2.conv3.norm.bias"),
        ("pred_w", None),
        ("fpn_inner_res2_2_sum_lateral_w", None),
        ("lr", None),
    ],
)
def test_caffe2_blobs(blob: str, key: str) -> None:
    assert caffe2_key(blob) == key
