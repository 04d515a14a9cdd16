"""load_config: files, names and overrides, and errors that name the key."""

import logging
import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from ws_detectron.engine import as_flat_dict, load_config
from ws_detectron.errors import ConfigError, UserError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_merges_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "MODEL: {WS: {MODE: paper}}\nSOLVER: {BASE_LR: 0.5, MAX_ITER: 7}\n")
    cfg = load_config(path, ["SOLVER.MAX_ITER", "9", "MODEL.WS.EPS", "1e-3"])
    changed = {
        key: value
        for key, value in as_flat_dict(cfg).items()
        if value != as_flat_dict(load_config("")).get(key)
    }
    assert changed == {
        "MODEL.WS.MODE": "paper",
        "MODEL.WS.EPS": 1e-3,
        "SOLVER.BASE_LR": 0.5,
        "SOLVER.MAX_ITER": 9,
    }


@pytest.mark.parametrize(
    "opts, warned",
    [
        ("SOLVER.IMS_PER_BATCH 8", True),
        ("SOLVER.IMS_PER_BATCH 8 SOLVER.BASE_LR 0.01", False),
        ("SOLVER.IMS_PER_BATCH 8 SOLVER.REFERENCE_IMS_PER_BATCH 16", False),
        ("SOLVER.IMS_PER_BATCH 16", False),
        ("SOLVER.MAX_ITER 8", False),
    ],
)
def test_a_batch_that_changes_alone_is_warned_of(
    opts: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn_ws_2img.yaml"
    with caplog.at_level(logging.WARNING, logger="ws_detectron"):
        load_config(name, opts.split())
    expected = "8 in place of the config's 16, .*add SOLVER.REFERENCE_IMS_PER_BATCH 16"
    assert bool(re.search(expected, caplog.text)) == warned
    assert len(caplog.records) == warned


@pytest.mark.parametrize(
    "opts, warned",
    [
        ("SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.01 SOLVER.MAX_ITER 9", "BASE_LR and SOLVER.MAX_"),
        (
            "SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 9",
            "SOLVER.MAX_ITER: taken as meant for 4",
        ),
        ("SOLVER.IMS_PER_BATCH 2", ""),
        ("SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 9 SOLVER.REFERENCE_IMS_PER_BATCH 2", ""),
    ],
)
def test_values_that_are_scaled_with_a_stated_batch_are_warned_of(
    opts: str, warned: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="ws_detectron"):
        load_config("quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml", opts.split())
    assert warned in caplog.text and len(caplog.records) == bool(warned)


def test_finds_the_configs_of_the_package_by_name() -> None:
    cfg = load_config("quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml")
    assert cfg.MODEL.BACKBONE.NAME == "build_ws_resnet_fpn_backbone"


def test_flat_dict_has_every_value_under_its_full_name() -> None:
    flat = as_flat_dict(get_cfg())
    assert flat["MODEL.RPN.HEAD_NAME"] == "StandardRPNHead" and flat["VERSION"] == 2
    assert "MODEL.RPN" not in flat


@pytest.mark.parametrize(
    "opts, parts",
    [
        (["MODEL.WS.MODUS", "paper"], ["MODEL.WS.MODUS", "MODEL.WS.MODE"]),
        (["SOLVER.BASE_LRR", "0.1"], ["SOLVER.BASE_LRR", "SOLVER.BASE_LR"]),
        (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER", "many"]),
        (["SOLVER.MAX_ITER"], ["pairs", "SOLVER.MAX_ITER"]),
    ],
)
def test_wrong_override_names_key_and_remedy(opts: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("", opts)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_unknown_key_in_a_file_names_file_key_and_near_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "MODEL: {WS: {MASKHEAD: False}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for part in (path, "MODEL.WS.MASKHEAD", "MODEL.WS.MASK_HEAD"):
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["MODEL: [", "just words", "\x00\x01"])
def test_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match="config.yaml"):
        load_config(path)


def test_missing_file() -> None:
    with pytest.raises(UserError, match="no_such_config.yaml"):
        load_config("no_such_config.yaml")
