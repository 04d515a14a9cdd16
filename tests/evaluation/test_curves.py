from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from written_runs import write_run

from ws_detectron.evaluation.curves import draw_ap_curves, draw_learning_curves
from ws_detectron.evaluation.figure_style import write_figure
from ws_detectron.evaluation.runs import Run, read_runs


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    write_run(tmp_path / "bn", top=50, seconds=3.0)
    write_run(tmp_path / "gn", top=60, seconds=1.5)
    write_run(tmp_path / "unfinished", evaluate_every=None)
    return read_runs([str(tmp_path / name) for name in ("bn", "gn", "unfinished", "missing")])


def test_losses_are_drawn_over_iterations_and_time(runs: list[Run]) -> None:
    left, right = draw_learning_curves(runs).axes
    assert [line.get_label() for line in left.lines] == ["BN", "GN", "unfinished"]
    np.testing.assert_array_equal(left.lines[0].get_xdata(), [20, 40, 60, 80, 100])
    losses = [row["total_loss"] for row in runs[0].rows if "total_loss" in row]
    np.testing.assert_array_equal(left.lines[0].get_ydata(), losses)
    # the longest run takes 100 x 3 s, five minutes
    assert right.get_xlabel() == "training time (min)"
    np.testing.assert_allclose(right.lines[0].get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(right.lines[1].get_xdata(), [0.5, 1, 1.5, 2, 2.5])


def test_ap_of_both_tasks_is_drawn(runs: list[Run]) -> None:
    box, box_time, mask, mask_time = draw_ap_curves(runs).axes
    assert [panel.get_ylabel() for panel in (box, mask)] == [
        "box AP (%)",
        "mask AP (%)",
    ]
    assert [line.get_label() for line in box.lines] == ["BN", "GN"]  # the third has none
    np.testing.assert_allclose(box.lines[1].get_ydata(), [30, 60])
    np.testing.assert_allclose(mask.lines[1].get_ydata(), [15, 30])
    np.testing.assert_allclose(mask_time.lines[1].get_xdata(), [1.25, 2.5])
    assert all(panel.get_xlabel() for panel in (box, box_time, mask, mask_time))
    assert box.get_ylim()[0] == 0 and box.get_ylim() == mask.get_ylim()
    assert box.get_figure().get_suptitle() == "R-18 Mask R-CNN, scenes_shapes_128_val"


def test_a_run_without_masks_leaves_both_rows_with_the_same_axes(runs: list[Run]) -> None:
    for row in runs[0].rows:  # the longest
        row.pop("segm/AP", None)
    box, box_time, mask, mask_time = draw_ap_curves(runs[:2]).axes
    assert len(mask.lines) == 1 and len(box.lines) == 2
    assert box.get_xlim() == mask.get_xlim() and box_time.get_xlim() == mask_time.get_xlim()


def test_runs_can_be_distinguished_without_colour(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(n)) for n in range(8)]
    left = draw_learning_curves(read_runs([*map(str, folders)])).axes[0]
    styles = {(line.get_linestyle(), line.get_marker()) for line in left.lines}
    assert len(styles) == 8 and len({dashes for dashes, _ in styles}) == 4


def test_a_run_keeps_its_style_in_every_panel(runs: list[Run]) -> None:
    panels = draw_learning_curves(runs).axes + draw_ap_curves(runs[1:2] + runs[1:]).axes
    first = [panel.lines[0].get_color() for panel in panels]
    assert len(set(first)) == 1


def test_figures_are_written_twice_the_same(runs: list[Run], tmp_path: Path) -> None:
    for suffix in (".png", ".svg"):
        one = write_figure(draw_learning_curves(runs), tmp_path / suffix / f"a{suffix}")
        other = write_figure(draw_learning_curves(runs), tmp_path / f"b{suffix}")
        assert [path.name for path in one.parent.iterdir()] == [f"a{suffix}"]
        assert one.read_bytes() == other.read_bytes()
    assert cv2.imread(str(tmp_path / "b.png")).std() > 5
    assert ElementTree.parse(other).getroot().tag.endswith("svg")


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    figure = draw_ap_curves(read_runs([str(tmp_path / "missing")]))
    assert all(panel.texts[0].get_text() == "no values" for panel in figure.axes)
