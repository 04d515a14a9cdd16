from itertools import combinations

import pytest
from contrast import contrast
from matplotlib.figure import Figure

from ws_detectron.evaluation.figure_style import (
    DARK,
    NORM_STYLES,
    add_title,
    line_styles,
    norm_of_config,
    split_name,
)


@pytest.mark.parametrize(
    ("name", "norm", "shown"),
    [
        ("gn_ws", "gn_ws", "GN+WS"),
        ("GN+WS", "gn_ws", "GN+WS"),
        ("BN", "bn", "BN"),
        ("sync_bn", "sync_bn", "SyncBN"),
        ("gn_ws_8_groups", "gn_ws", "GN+WS 8 groups"),
        ("none", "none", "none"),
        ("bnorm", None, "bnorm"),
        ("wn_ws", None, "wn_ws"),
        ("output/gn_ws", None, "output/gn_ws"),
    ],
)
def test_names_start_with_a_normalization_or_stay(name: str, norm: str, shown: str) -> None:
    assert split_name(name) == (norm, shown)


def test_a_normalization_looks_the_same_in_every_figure() -> None:
    alone, few, other = (
        {style["label"]: style for style in line_styles(names)}
        for names in (["gn_ws"], ["bn", "gn", "gn_ws"], ["gn_ws", "ln", "mine", "wn"])
    )
    assert alone["GN+WS"] == few["GN+WS"] == other["GN+WS"]
    assert other["mine"]["color"] not in {NORM_STYLES[n].colour for n in ("gn_ws", "ln", "wn")}


def test_lines_with_one_normalization_differ_by_dashes_and_fill_or_if_all_by_colour() -> None:
    bn, gn, decay, third = line_styles(["bn", "gn_ws", "gn_ws_decay", "gn_ws_9"])
    assert gn["color"] == decay["color"] == third["color"] != bn["color"]
    assert "markerfacecolor" not in gn and decay["markerfacecolor"] == "white"
    assert len({style["linestyle"] for style in (gn, decay, third)}) == 3
    first, second = line_styles(["gn_ws_a", "gn_ws_b"])
    assert first["color"] != second["color"] and first["marker"] != second["marker"]


def test_colours_are_visible_on_white_and_dark_and_styles_differ() -> None:
    for style in NORM_STYLES.values():
        assert contrast(style.colour, "white") >= 3 and contrast(style.colour, DARK) >= 3
    for one, other in combinations(NORM_STYLES.values(), 2):
        assert not {*one} & {*other}


@pytest.mark.parametrize(
    ("backbone", "norm", "switch", "expected"),
    [
        ("build_resnet_fpn_backbone", "BN", True, "bn"),
        ("build_ws_resnet_fpn_backbone", "BN", True, "bn_ws"),
        ("build_ws_resnet_fpn_backbone", "GN", False, "gn"),
        ("build_ws_resnet_fpn_backbone", "GN", True, "gn_ws"),
        ("build_resnet_fpn_backbone", "", True, "none"),
        ("build_resnet_fpn_backbone", "MyNorm", True, None),
    ],
)
def test_a_config_says_its_normalization(
    backbone: str, norm: str, switch: bool, expected: str
) -> None:
    config = {"MODEL.BACKBONE.NAME": backbone, "MODEL.RESNETS.NORM": norm}
    assert norm_of_config({**config, "MODEL.WS.BACKBONE": switch}) == expected
    assert norm_of_config({}) is None


def test_titles_are_not_cut_off() -> None:
    figure = Figure(figsize=(4, 3), layout="constrained")
    figure.subplots()
    add_title(figure, "a $title$ of many words " * 6 + "\nsecond")
    figure.draw_without_rendering()
    (text,) = figure.texts
    assert text.get_text().endswith("\nsecond") and r"\$title\$" in text.get_text()
    box = text.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width
