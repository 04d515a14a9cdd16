"""Configs that are compared with each other differ in exactly the declared keys.

An ablation is only as good as its configs are matched. `declared_pairs` says which keys may
differ between two configs; a test demands that these, all of them and no other, do.
"""

import pytest
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import get_cfg
from leaves import BACKBONES, IMAGES_PER_GPU, LEAVES, NORMS, differing_keys, load

from ws_detectron import add_ws_config

Keys = frozenset[str]

NORM = Keys(f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"))
WS = Keys(f"MODEL.{part}.NAME" for part in ("BACKBONE", "ROI_BOX_HEAD", "ROI_MASK_HEAD"))
RETINANET_NORM = Keys({"MODEL.RESNETS.NORM", "MODEL.FPN.NORM"})
RETINANET_WS = Keys({"MODEL.BACKBONE.NAME"})
TOWERS = Keys({"MODEL.META_ARCHITECTURE", "MODEL.RETINANET.NORM"})
PANOPTIC_DATA = Keys({"DATASETS.TRAIN", "DATASETS.TEST", "DATALOADER.FILTER_EMPTY_ANNOTATIONS"})
PANOPTIC_WS = Keys({"MODEL.SEM_SEG_HEAD.NAME"})
PANOPTIC = PANOPTIC_DATA | {"MODEL.META_ARCHITECTURE", "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT"}
WEIGHTS = Keys({"MODEL.WEIGHTS"})
FREEZE = Keys({"MODEL.BACKBONE.FREEZE_AT"})
INPUT = Keys({"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"})
MASK = Keys({"MODEL.MASK_ON"})
DEPTH = Keys({"MODEL.RESNETS.DEPTH"})
GROUPS = Keys({"MODEL.RESNETS.NUM_GROUPS", "MODEL.RESNETS.WIDTH_PER_GROUP"})
LENGTH = Keys({"SOLVER.STEPS", "SOLVER.MAX_ITER"})
PERIOD = Keys({"SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD"})
BATCH = (
    Keys({"SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SOLVER.WARMUP_ITERS"})
    | LENGTH
    | PERIOD
    | {"TEST.PRECISE_BN.NUM_ITER"}
)

ARMS = {
    ("bn", "frozen_bn"): NORM,
    ("bn", "sync_bn"): NORM,
    ("bn", "gn"): NORM | WEIGHTS | INPUT,
    ("bn", "bn_ws"): WS | WEIGHTS | FREEZE,
    ("bn", "gn_ws"): NORM | WS | WEIGHTS,
    ("gn", "gn_ws"): WS | WEIGHTS | INPUT,
    ("bn_ws", "gn_ws"): NORM | WEIGHTS | FREEZE,
}
ARMS_FROM_SCRATCH = {
    ("bn", "sync_bn"): NORM,
    ("bn", "gn"): NORM,
    ("bn", "bn_ws"): WS,
    ("bn", "gn_ws"): NORM | WS,
    ("gn", "gn_ws"): WS,
    ("bn_ws", "gn_ws"): NORM,
}
FROM_SCRATCH = {
    "bn": WEIGHTS | FREEZE,
    "gn": WEIGHTS | FREEZE | INPUT,
    "gn_ws": WEIGHTS | FREEZE,
}
LARGER_BACKBONES = {
    "R_101": WEIGHTS | DEPTH,
    "X_50_32x4d": WEIGHTS | GROUPS,
    "X_101_32x4d": WEIGHTS | DEPTH | GROUPS,
}


def declared_pairs() -> dict[tuple[str, str], Keys]:
    """Pairs of leaves, and the keys in which they are declared to differ."""
    pairs: dict[tuple[str, str], Keys] = {}

    def declare(template: str, a: object, b: object, keys: Keys) -> None:
        pairs[template.format(a), template.format(b)] = keys

    for n in IMAGES_PER_GPU:
        for (a, b), keys in ARMS.items():
            declare(f"mask_rcnn_R_50_FPN_1x_{{}}_{n}img", a, b, keys)
        for (a, b), keys in ARMS_FROM_SCRATCH.items():
            declare(f"scratch_mask_rcnn_R_50_FPN_3x_{{}}_{n}img", a, b, keys)

    for small, large in ((1, 2), (1, 8), (2, 8)):
        for arm in NORMS:
            declare(f"mask_rcnn_R_50_FPN_1x_{arm}_{{}}img", small, large, BATCH)
            if arm != "frozen_bn":
                declare(f"scratch_mask_rcnn_R_50_FPN_3x_{arm}_{{}}img", small, large, BATCH)
    for backbone in BACKBONES:
        declare(f"mask_rcnn_{backbone}_FPN_1x_gn_ws_{{}}img", 1, 2, BATCH)

    for schedule in ("3x", "20-23-24e"):
        for a, b in (("bn", "gn"), ("bn", "gn_ws"), ("gn", "gn_ws")):
            declare(f"mask_rcnn_R_50_FPN_{schedule}_{{}}_2img", a, b, ARMS[a, b])
    for backbone in BACKBONES:
        template = f"mask_rcnn_{backbone}_FPN_{{}}_gn_ws_2img"
        declare(template, "1x", "3x", LENGTH)
        declare(template, "3x", "20-23-24e", LENGTH | PERIOD)
    for backbone, keys in LARGER_BACKBONES.items():
        for end in ("1x_gn_ws_1img", "1x_gn_ws_2img", "3x_gn_ws_2img", "20-23-24e_gn_ws_2img"):
            declare(f"mask_rcnn_{{}}_FPN_{end}", "R_50", backbone, keys)
    for arm, keys in FROM_SCRATCH.items():
        declare(f"{{}}mask_rcnn_R_50_FPN_3x_{arm}_2img", "", "scratch_", keys)

    for n in (1, 2):
        declare(f"faster_rcnn_R_50_FPN_1x_{{}}_{n}img", "bn", "gn_ws", NORM | WS | WEIGHTS)
        keys = RETINANET_NORM | RETINANET_WS | WEIGHTS
        declare(f"retinanet_R_50_FPN_1x_{{}}_{n}img", "bn", "gn_ws", keys)
        declare(f"retinanet_R_50_FPN_1x_{{}}_{n}img", "gn_ws", "gn_ws_towers", TOWERS)
    declare("retinanet_R_50_FPN_1x_gn_ws_towers_{}img", 1, 2, BATCH)
    declare("{}_R_50_FPN_1x_gn_ws_2img", "mask_rcnn", "panoptic", PANOPTIC | PANOPTIC_WS)
    for arm in ("bn", "gn_ws"):
        declare(f"{{}}_rcnn_R_50_FPN_1x_{arm}_1img", "mask", "faster", MASK)
        for detector in ("faster_rcnn", "retinanet"):
            declare(f"{detector}_R_50_FPN_1x_{arm}_{{}}img", 1, 2, BATCH)
    return pairs


PAIRS = declared_pairs()

OUR_SOLVER = PERIOD | {"SOLVER.REFERENCE_WORLD_SIZE", "TEST.PRECISE_BN.ENABLED"}
OUR_START = WEIGHTS | INPUT | {"MODEL.RESNETS.STRIDE_IN_1X1"}
DETECTRON2_PAIRS = {
    ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", "mask_rcnn_R_50_FPN_1x_frozen_bn_2img"): (
        OUR_SOLVER | OUR_START | {"MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC"}
    ),
    ("Misc/mask_rcnn_R_50_FPN_3x_gn", "mask_rcnn_R_50_FPN_3x_gn_2img"): OUR_SOLVER,
    ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x", "panoptic_R_50_FPN_1x_gn_ws_2img"): (
        OUR_SOLVER
        | OUR_START
        | NORM
        | WS
        | PANOPTIC_WS
        | {"MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC"}
    ),
    ("COCO-Detection/retinanet_R_50_FPN_1x", "retinanet_R_50_FPN_1x_bn_2img"): (
        OUR_SOLVER | OUR_START | RETINANET_NORM
    ),
}


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_pair_differs_in_exactly_the_declared_keys(pair: tuple[str, str]) -> None:
    first, second = pair
    assert differing_keys(load(first), load(second)) == PAIRS[pair]


def test_every_leaf_has_a_partner() -> None:
    assert set(LEAVES) - {leaf for pair in PAIRS for leaf in pair} == set()


@pytest.mark.parametrize("pair", DETECTRON2_PAIRS, ids=" ".join)
def test_detectron2s_own_config_differs_in_exactly_the_declared_keys(pair: tuple[str, str]) -> None:
    theirs = get_cfg()
    add_ws_config(theirs)
    theirs.merge_from_file(detectron2_zoo.get_config_file(f"{pair[0]}.yaml"))
    assert differing_keys(theirs, load(pair[1])) == DETECTRON2_PAIRS[pair]
