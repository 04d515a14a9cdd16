"""MODEL_ZOO.md and configs/README.md list what is there."""

import re

import pytest
from detectron2 import model_zoo as detectron2_zoo
from leaves import CONFIGS
from write_config_tables import PAGES, ROOT, filled

from ws_detectron.checkpoint import PUBLISHED
from ws_detectron.model_zoo import get_config

ZOO = (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8")
MMDET = sorted(path for path in CONFIGS.glob("COCO-*/mmdet/*.yaml") if path.stem[:4] != "Base")
ALL = [*CONFIGS.glob("COCO-*/*.yaml"), *MMDET, *CONFIGS.glob("quickstart/mask_rcnn*.yaml")]


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_what_the_configs_say(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == filled(page), "run python tools/write_config_tables.py"


def test_model_zoo_links_every_config_once() -> None:
    linked = re.findall(r"\[\d\]\(configs/([^)]*)\)", ZOO)
    assert sorted(linked) == sorted(path.relative_to(CONFIGS).as_posix() for path in ALL)


def test_published_detectors_have_configs_that_expect_their_ap() -> None:
    cfgs = [get_config(path.relative_to(CONFIGS).as_posix()) for path in MMDET]
    named = [f"ws://{name}" for name in PUBLISHED if name.startswith("mmdet/")]
    assert sorted(cfg.MODEL.WEIGHTS for cfg in cfgs) == sorted(named)
    for cfg in cfgs:
        tasks = [task for task, *_ in cfg.TEST.EXPECTED_RESULTS]
        assert tasks == (["bbox", "segm"] if cfg.MODEL.MASK_ON else ["bbox"])


def test_detectron2s_weights_are_where_the_command_says() -> None:
    url = detectron2_zoo.get_checkpoint_url("Misc/mask_rcnn_R_50_FPN_3x_gn.yaml")
    assert url.partition("/detectron2/")[2] in ZOO
