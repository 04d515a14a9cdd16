"""The model of each config: which convs are standardized, which norms it has, what is frozen."""

from collections import Counter

import pytest
from detectron2.layers import FrozenBatchNorm2d
from fvcore.nn.precise_bn import get_bn_modules
from leaves import BACKBONES, BIT, LEAVES, VARIANTS, Name, build
from torch import nn

from ws_detectron import WSConv2d
from ws_detectron.layers import GroupNorm

NORM_CLASSES = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "FrozenBN": FrozenBatchNorm2d}
FROZEN_STAGES = {"backbone.bottom_up.stem", "backbone.bottom_up.res2"}
# What no norm follows, and what WS must therefore leave alone.
RPN_CONVS = {
    "proposal_generator.rpn_head.conv",
    "proposal_generator.rpn_head.objectness_logits",
    "proposal_generator.rpn_head.anchor_deltas",
}
PLAIN_CONVS = {
    "faster_rcnn": RPN_CONVS,
    "mask_rcnn": RPN_CONVS | {"roi_heads.mask_head.predictor"},
    "retinanet": {
        "backbone.top_block.p6",
        "backbone.top_block.p7",
        "head.cls_score",
        "head.bbox_pred",
    },
    "panoptic": RPN_CONVS | {"roi_heads.mask_head.predictor", "sem_seg_head.predictor"},
}
TOWER_CONVS_WITHOUT_NORM = {
    f"head.{subnet}_subnet.{i}" for subnet in ("cls", "bbox") for i in (0, 2, 4, 6)
}
CONVS_OF_FPN_AND_HEADS = {
    *(f"backbone.fpn_{kind}{level}" for kind in ("lateral", "output") for level in (2, 3, 4, 5)),
    *(f"roi_heads.box_head.conv{i}" for i in (1, 2, 3, 4)),
    *(f"roi_heads.mask_head.mask_fcn{i}" for i in (1, 2, 3, 4)),
}
HEAD_CONVS = {"mask_rcnn": 4 + 4, "faster_rcnn": 4, "retinanet": 0, "panoptic": 4 + 4}
SEM_SEG_CONVS = {"panoptic": 1 + 1 + 2 + 3}
FPN_CONVS = {"mask_rcnn": 2 * 4, "faster_rcnn": 2 * 4, "retinanet": 2 * 3, "panoptic": 2 * 4}


def convs_of(model: nn.Module, *, standardized: bool) -> set[str]:
    """Names of the `nn.Conv2d`s that are WS convs, or of those that are not."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and isinstance(module, WSConv2d) == standardized
    }


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if Name.parse(leaf).ws])
def test_ws_is_on_every_conv_before_a_norm_and_on_no_other(leaf: str) -> None:
    name, model = Name.parse(leaf), build(leaf)
    elsewhere = bool(VARIANTS[name.variant].elsewhere)
    part = Counter(conv.partition(".")[0] for conv in convs_of(model, standardized=True))
    assert part["backbone"] == BACKBONES[name.backbone][3] + FPN_CONVS[name.detector] * elsewhere
    assert part["roi_heads"] == HEAD_CONVS[name.detector] * elsewhere
    assert part["sem_seg_head"] == SEM_SEG_CONVS.get(name.detector, 0)
    assert part["head"] == (8 if name.towers else 0)
    assert set(part) <= {"backbone", "roi_heads", "sem_seg_head", "head"}
    plain = PLAIN_CONVS[name.detector]
    if name.detector == "retinanet" and not name.towers:
        plain = plain | TOWER_CONVS_WITHOUT_NORM
    if not elsewhere:
        plain = plain | CONVS_OF_FPN_AND_HEADS
    assert convs_of(model, standardized=False) == plain
    affine = {conv.affine() is not None for conv in model.modules() if isinstance(conv, WSConv2d)}
    assert affine == {name.variant == "frozen_bn_aws"}


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if not Name.parse(leaf).ws])
def test_leaves_without_ws_have_no_ws_conv(leaf: str) -> None:
    assert not convs_of(build(leaf), standardized=True)


def test_r_50_gn_ws_has_69_ws_convs() -> None:
    model = build("mask_rcnn_R_50_FPN_1x_gn_ws_2img")
    assert len(convs_of(model, standardized=True)) == 53 + 8 + 4 + 4 == 69


@pytest.mark.parametrize("leaf", LEAVES)
def test_norms_of_the_towers_are_gn_behind_each_conv_or_none(leaf: str) -> None:
    """In RetinaNet's head, norms are layers of the tower and not of the conv."""
    towers = [
        layer
        for path, layer in build(leaf).named_modules()
        if path.startswith(("head.cls_subnet.", "head.bbox_subnet."))
    ]
    norms = [layer for layer in towers if isinstance(layer, nn.GroupNorm)]
    assert {type(norm) for norm in norms} <= {GroupNorm}
    assert {norm.num_groups for norm in norms} <= {32}
    assert len(norms) == (8 if Name.parse(leaf).towers else 0)


@pytest.mark.parametrize("leaf", LEAVES)
def test_norm_layers_are_those_of_the_variant(leaf: str) -> None:
    name = Name.parse(leaf)
    norms = {
        path: module
        for path, module in build(leaf).named_modules()
        if path.rpartition(".")[2] == "norm"
    }
    in_backbone = sum(path.startswith("backbone.bottom_up.") for path in norms)
    # of BiT: one before each conv of a block but for the 4 projections, and the final one
    assert in_backbone == (3 * 16 + 1 if name.backbone == BIT else BACKBONES[name.backbone][3])
    elsewhere = HEAD_CONVS[name.detector] + FPN_CONVS[name.detector]
    elsewhere += SEM_SEG_CONVS.get(name.detector, 0)
    variant = VARIANTS[name.variant]
    assert len(norms) - in_backbone == (elsewhere if variant.elsewhere else 0)
    group_norm = GroupNorm if name.ws else nn.GroupNorm  # the WS builders have their own
    for path, module in norms.items():
        expected = NORM_CLASSES.get(variant.backbone, group_norm)
        frozen = name.weights and path.startswith(tuple(FROZEN_STAGES))
        if frozen and issubclass(expected, nn.modules.batchnorm._BatchNorm):
            expected = FrozenBatchNorm2d  # how detectron2 freezes BN
        assert type(module) is expected, path
        if isinstance(module, nn.GroupNorm):
            assert module.num_groups == variant.keys.get("MODEL.WS.GN_GROUPS", 32), path


@pytest.mark.parametrize("leaf", LEAVES)
def test_frozen_are_stem_and_res2_or_nothing(leaf: str) -> None:
    frozen = {
        ".".join(path.split(".")[:3])
        for path, parameter in build(leaf).named_parameters()
        if not parameter.requires_grad
    }
    assert frozen == (FROZEN_STAGES if Name.parse(leaf).weights else set())


@pytest.mark.parametrize("leaf", LEAVES)
def test_precise_bn_acts_on_trained_bn_only(leaf: str) -> None:
    trains_bn = VARIANTS[Name.parse(leaf).variant].backbone in ("BN", "SyncBN")
    assert bool(get_bn_modules(build(leaf))) == trains_bn


def test_checkpoints_interchange_between_gn_and_gn_ws() -> None:
    gn, gn_ws = (
        {name: tensor.shape for name, tensor in build(leaf).state_dict().items()}
        for leaf in ("mask_rcnn_R_50_FPN_1x_gn_2img", "mask_rcnn_R_50_FPN_1x_gn_ws_2img")
    )
    assert gn == gn_ws
