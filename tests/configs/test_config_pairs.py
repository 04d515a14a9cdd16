"""In which keys the variants differ, and our configs from detectron2's.

That any two leaves differ in nothing but what their names say is tested in test_config_leaves.py.
"""

import pytest
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import get_cfg
from leaves import IMAGES_PER_GPU, differing_keys, load

from ws_detectron import add_ws_config

Keys = frozenset[str]

NORM = Keys(f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"))
WS = Keys(f"MODEL.{part}.NAME" for part in ("BACKBONE", "ROI_BOX_HEAD", "ROI_MASK_HEAD"))
WEIGHTS = Keys({"MODEL.WEIGHTS"})
FREEZE = Keys({"MODEL.BACKBONE.FREEZE_AT"})
INPUT = Keys({"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"})
COMPARED = {
    ("bn", "frozen_bn"): NORM,
    ("bn", "sync_bn"): NORM,
    ("bn", "gn"): NORM | WEIGHTS | INPUT,
    ("bn", "bn_ws"): WS | WEIGHTS | FREEZE,
    ("bn", "gn_ws"): NORM | WS | WEIGHTS,
    ("gn", "gn_ws"): WS | WEIGHTS | INPUT,
    ("bn_ws", "gn_ws"): NORM | WEIGHTS | FREEZE,
    ("frozen_bn", "frozen_bn_aws"): (
        {"MODEL.BACKBONE.NAME", "MODEL.WS.AFFINE", "MODEL.WS.MODE", "MODEL.WS.FPN"}
    ),
}

OUR_SOLVER = Keys(
    {
        "SOLVER.CHECKPOINT_PERIOD",
        "SOLVER.REFERENCE_WORLD_SIZE",
        "TEST.EVAL_PERIOD",
        "TEST.PRECISE_BN.ENABLED",
    }
)
OUR_START = WEIGHTS | INPUT | {"MODEL.RESNETS.STRIDE_IN_1X1"}
OUR_HEAD = Keys({"MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC"})
DETECTRON2_PAIRS = {
    ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", "mask_rcnn_R_50_FPN_1x_frozen_bn_2img"): (
        OUR_SOLVER | OUR_START | OUR_HEAD
    ),
    ("Misc/mask_rcnn_R_50_FPN_3x_gn", "mask_rcnn_R_50_FPN_3x_gn_2img"): OUR_SOLVER,
    ("Misc/scratch_mask_rcnn_R_50_FPN_3x_gn", "scratch_mask_rcnn_R_50_FPN_3x_gn_2img"): (
        OUR_SOLVER | INPUT
    ),
    ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x", "panoptic_R_50_FPN_1x_gn_ws_2img"): (
        OUR_SOLVER | OUR_START | OUR_HEAD | NORM | WS | {"MODEL.SEM_SEG_HEAD.NAME"}
    ),
    ("COCO-Detection/retinanet_R_50_FPN_1x", "retinanet_R_50_FPN_1x_bn_2img"): (
        OUR_SOLVER | OUR_START | {"MODEL.RESNETS.NORM", "MODEL.FPN.NORM"}
    ),
}


@pytest.mark.parametrize("images", IMAGES_PER_GPU)
@pytest.mark.parametrize("pair", COMPARED, ids=" ".join)
def test_variants_differ_in_exactly_the_declared_keys(pair: tuple[str, str], images: int) -> None:
    leaf = "{}mask_rcnn_R_50_FPN_{}_{}_{}img".format
    first, second = (load(leaf("", "1x", variant, images)) for variant in pair)
    assert differing_keys(first, second) == COMPARED[pair]
    if "frozen_bn" not in pair:  # which needs weights
        first, second = (load(leaf("scratch_", "3x", variant, images)) for variant in pair)
        assert differing_keys(first, second) == COMPARED[pair] - WEIGHTS - FREEZE - INPUT


@pytest.mark.parametrize("pair", DETECTRON2_PAIRS, ids=" ".join)
def test_detectron2s_own_config_differs_in_exactly_the_declared_keys(pair: tuple[str, str]) -> None:
    theirs = get_cfg()
    add_ws_config(theirs)
    theirs.merge_from_file(detectron2_zoo.get_config_file(f"{pair[0]}.yaml"))
    assert differing_keys(theirs, load(pair[1])) == DETECTRON2_PAIRS[pair]
