"""MODEL.WS: defaults, and errors that name the key of a wrong value."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import logger

from ws_detectron import add_ws_config
from ws_detectron.config import WSSettings
from ws_detectron.errors import ConfigError


def test_add_ws_config_adds_its_keys_with_their_defaults_and_no_others() -> None:
    stock, cfg = get_cfg(), get_cfg()
    add_ws_config(cfg)
    assert cfg.MODEL.WS == {
        "BACKBONE": True,
        "FPN": True,
        "BOX_HEAD": True,
        "MASK_HEAD": True,
        "RETINANET_HEAD": True,
        "SEM_SEG_HEAD": True,
        "MODE": "official",
        "AFFINE": False,
        "EPS": 1e-5,
        "GN_GROUPS": 32,
    }
    assert (cfg.SOLVER.ACCUMULATE_STEPS, cfg.SOLVER.REFERENCE_IMS_PER_BATCH) == (1, 0)
    assert cfg.SOLVER.EPOCHS == 0
    assert cfg.DATASETS.REGISTER == []
    del (
        cfg.DATASETS["REGISTER"],
        cfg.MODEL["WS"],
        cfg.SOLVER["ACCUMULATE_STEPS"],
        cfg.SOLVER["REFERENCE_IMS_PER_BATCH"],
        cfg.SOLVER["EPOCHS"],
    )
    assert cfg == stock


def test_add_ws_config_twice_keeps_what_was_set() -> None:
    cfg = get_cfg()
    add_ws_config(cfg)
    cfg.MODEL.WS.MODE = "bit"
    add_ws_config(cfg)
    assert cfg.MODEL.WS.MODE == "bit"


def test_a_node_of_an_earlier_version_gets_the_keys_that_it_lacks() -> None:
    cfg = get_cfg()
    cfg.MODEL.WS = CfgNode({"BACKBONE": False, "GN_GROUPS": 8})
    assert WSSettings.from_config(cfg) == WSSettings(backbone=False, gn_groups=8)
    add_ws_config(cfg)
    cfg.merge_from_list(["MODEL.WS.RETINANET_HEAD", False])
    expected = WSSettings(backbone=False, retinanet_head=False, gn_groups=8)
    assert WSSettings.from_config(cfg) == expected


def test_settings_carry_every_key() -> None:
    cfg = get_cfg()
    add_ws_config(cfg)
    cfg.merge_from_list(["MODEL.WS.FPN", False, "MODEL.WS.EPS", 1e-3, "MODEL.WS.GN_GROUPS", 8])
    expected = WSSettings(fpn=False, eps=1e-3, gn_groups=8)
    assert WSSettings.from_config(cfg) == expected
    assert expected != WSSettings()


def test_config_without_the_node_means_the_defaults_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "_LOG_COUNTER", Counter())  # as in a new process
    for _ in range(2):
        assert WSSettings.from_config(get_cfg()) == WSSettings()
    assert caplog.text.count("call ws_detectron.add_ws_config(cfg)") == 1


@pytest.mark.parametrize("key", ["MODEL.WS.MODE", "SOLVER.EPOCHS", "DATASETS.REGISTER"])
def test_a_forgotten_call_is_named_where_a_key_of_ours_is_unknown(key: str, tmp_path: Path) -> None:
    node, name, *rest = key.split(".")
    path = tmp_path / "config.yaml"
    path.write_text(f"{node}: {{{name}: {{{rest[0]}: 1}}}}" if rest else f"{node}: {{{name}: 1}}")
    for merge in (
        lambda cfg: cfg.merge_from_file(str(path), allow_unsafe=False),
        lambda cfg: cfg.merge_from_list([key, "1"]),
    ):
        with pytest.raises((KeyError, AssertionError), match=r"call ws_detectron.add_ws_config"):
            merge(get_cfg())
    with pytest.raises(AssertionError) as caught:
        get_cfg().merge_from_list(["SOLVER.EPOCHES", "1"])
    assert "ws_detectron" not in str(caught.value)


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("MODE", "timm", "one of paper, official, bit"),
        ("EPS", 0.0, "between 0 and 1"),
        ("EPS", -1e-5, "between 0 and 1"),
        ("EPS", "1e-5", "between 0 and 1"),
        ("GN_GROUPS", 0, "integer >= 1"),
        ("GN_GROUPS", 2.5, "integer >= 1"),
        ("FPN", "yes", "a boolean"),
        ("SEM_SEG_HEAD", "no", "a boolean"),
    ],
)
def test_refuses_what_cannot_work(key: str, value: Any, allowed: str) -> None:
    cfg = get_cfg()
    add_ws_config(cfg)
    cfg.MODEL.WS[key] = value
    with pytest.raises(ConfigError) as caught:
        WSSettings.from_config(cfg)
    message = str(caught.value)
    assert f"MODEL.WS.{key}" in message and allowed in message and repr(value) in message


def test_refuses_a_key_it_does_not_know() -> None:
    cfg = get_cfg()
    add_ws_config(cfg)
    cfg.MODEL.WS.HEAD = True
    with pytest.raises(ConfigError, match="MODEL.WS.HEAD is not a key; allowed: BACKBONE"):
        WSSettings.from_config(cfg)


def test_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        WSSettings(mode="none")
