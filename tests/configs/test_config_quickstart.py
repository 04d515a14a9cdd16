"""The small configs of the quick start: twins differ in what they study, and all build."""

import pytest
from detectron2.modeling import build_model
from torch import nn

from ws_detectron import WSConv2d
from ws_detectron.engine import as_flat_dict
from ws_detectron.model_zoo import config_names, get_config

LEAVES = [name for name in config_names() if name.startswith("quickstart/mask_rcnn")]
NORMS = {f"MODEL.{node}.NORM" for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}
WS_NAMES = {f"MODEL.{node}.NAME" for node in ("BACKBONE", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}
BATCH = {
    f"SOLVER.{key}"
    for key in (
        "IMS_PER_BATCH",
        "REFERENCE_IMS_PER_BATCH",
        "BASE_LR",
        "MAX_ITER",
        "WARMUP_ITERS",
    )
}
WS_FLAGS = {f"MODEL.WS.{part}" for part in ("BACKBONE", "FPN", "BOX_HEAD", "MASK_HEAD")}
ARMS = {
    ("bn", "gn_ws"): NORMS | WS_NAMES,
    ("bn", "bn_ws"): WS_NAMES,
    ("gn", "gn_ws"): WS_FLAGS,
    ("bn_ws", "gn_ws"): NORMS,
}
FASHION = "quickstart/mask_rcnn_R_18_FPN_fashion_{}.yaml"


def differing_keys(first: str, second: str) -> set[str]:
    one, other = (as_flat_dict(get_config(FASHION.format(name))) for name in (first, second))
    assert one.keys() == other.keys()
    return {key for key in one if one[key] != other[key]} - {"OUTPUT_DIR"}


@pytest.mark.parametrize("batch", ["1img", "8img"])
@pytest.mark.parametrize("arms", ARMS, ids=" ".join)
def test_arms_differ_in_norm_and_ws_alone(arms: tuple[str, str], batch: str) -> None:
    first, second = arms
    assert differing_keys(f"{first}_{batch}", f"{second}_{batch}") == ARMS[arms]


@pytest.mark.parametrize("arm", ["bn", "gn", "bn_ws", "gn_ws"])
def test_batches_differ_in_what_the_linear_rule_scales(arm: str) -> None:
    assert differing_keys(f"{arm}_1img", f"{arm}_8img") == BATCH
    one, eight = (get_config(FASHION.format(f"{arm}_{n}img")).SOLVER for n in (1, 8))
    assert eight.IMS_PER_BATCH == 8 * one.IMS_PER_BATCH
    assert eight.BASE_LR == pytest.approx(8 * one.BASE_LR)
    assert 8 * eight.MAX_ITER == one.MAX_ITER and 8 * eight.WARMUP_ITERS == one.WARMUP_ITERS


@pytest.mark.parametrize("name", LEAVES)
def test_every_leaf_builds_its_arm(name: str) -> None:
    model = build_model(get_config(name))
    convs = sum(isinstance(module, WSConv2d) for module in model.modules())
    assert convs == (20 + 8 + 2 + 2 if "_ws" in name else 0)
    norms = {"_bn_": nn.BatchNorm2d, "_gn_": nn.GroupNorm}
    (norm,) = [kind for part, kind in norms.items() if part in name]
    # one behind each of these convs
    assert sum(isinstance(module, norm) for module in model.modules()) == 32
