"""The small configs of the quick start: twins differ in what they study, and all build."""

import pytest
from detectron2.modeling import build_model
from leaves import differing_keys
from test_config_pairs import NORM, WS
from torch import nn

from ws_detectron import WSConv2d
from ws_detectron.model_zoo import config_names, get_config

QUICKSTART = [name for name in config_names() if name.startswith("quickstart/mask_rcnn")]
SOLVER = ("IMS_PER_BATCH", "REFERENCE_IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "WARMUP_ITERS")
BATCH = {f"SOLVER.{key}" for key in SOLVER}
# GN without WS is the WS builders' as well, for their MODEL.WS.GN_GROUPS
WS_FLAGS = {f"MODEL.WS.{part}" for part in ("BACKBONE", "FPN", "BOX_HEAD", "MASK_HEAD")}
COMPARED = {
    ("bn", "gn_ws"): NORM | WS,
    ("bn", "bn_ws"): WS,
    ("gn", "gn_ws"): WS_FLAGS,
    ("bn_ws", "gn_ws"): NORM,
}
FASHION = "quickstart/mask_rcnn_R_18_FPN_fashion_{}_{}img.yaml"


@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("pair", COMPARED, ids=" ".join)
def test_variants_differ_in_norm_and_ws_alone(pair: tuple[str, str], images: int) -> None:
    first, second = (get_config(FASHION.format(variant, images)) for variant in pair)
    assert differing_keys(first, second) - {"OUTPUT_DIR"} == COMPARED[pair]


@pytest.mark.parametrize("variant", ["bn", "gn", "bn_ws", "gn_ws"])
def test_batches_differ_in_what_the_linear_rule_scales(variant: str) -> None:
    small, large = (get_config(FASHION.format(variant, images)) for images in (1, 8))
    assert differing_keys(small, large) - {"OUTPUT_DIR"} == BATCH
    one, eight = small.SOLVER, large.SOLVER
    assert eight.IMS_PER_BATCH == 8 * one.IMS_PER_BATCH
    assert eight.BASE_LR == pytest.approx(8 * one.BASE_LR)
    assert 8 * eight.MAX_ITER == one.MAX_ITER and 8 * eight.WARMUP_ITERS == one.WARMUP_ITERS


@pytest.mark.parametrize("name", QUICKSTART)
def test_every_leaf_builds_its_variant(name: str) -> None:
    model = build_model(get_config(name))
    convs = sum(isinstance(module, WSConv2d) for module in model.modules())
    assert convs == (20 + 8 + 2 + 2 if "_ws" in name else 0)
    norms = {"_bn_": nn.BatchNorm2d, "_gn_": nn.GroupNorm}
    (norm,) = [kind for part, kind in norms.items() if part in name]
    # one behind each of these convs
    assert sum(isinstance(module, norm) for module in model.modules()) == 32
