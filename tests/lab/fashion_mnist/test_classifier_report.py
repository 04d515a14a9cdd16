import csv
import json
from pathlib import Path

import numpy as np
import pytest
from finished_runs import ENVIRONMENT, write_run

from ws_detectron.lab.fashion_mnist.accuracy_report import (
    accuracy_table,
    difference_text,
    draw_accuracy_over_batch,
    draw_learning_curves,
    draw_misclassified,
    report_text,
    write_report,
)
from ws_detectron.lab.fashion_mnist.accuracy_results import group_runs, read_runs


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    for seed, (gn, gn_ws) in enumerate([(0.91, 0.92), (0.93, 0.92), (0.92, 0.95)]):
        write_run(folder, gn, variant="gn", batch_size=32, seed=seed)
        write_run(folder, gn_ws, variant="gn_ws", batch_size=32, seed=seed)
    write_run(folder, 0.1, variant="bn", batch_size=2, compile=True)
    return folder


def test_table_shows_the_reports_results_next_to_ours(runs: Path) -> None:
    lines = accuracy_table(group_runs(read_runs(runs))).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows == [
        ["BN", "2", "0.0015", "1", "22, compiled", "10.00", "255", "18.76"],
        ["GN", "32", "0.02", "3", "22", "92.00 ± 1.00", "–", "–"],
        ["GN+WS", "32", "0.02", "3", "22", "93.00 ± 1.73", "20", "92.82"],
    ]


def test_differences_are_taken_seed_by_seed(runs: Path) -> None:
    text = difference_text(group_runs(read_runs(runs)))
    # mean 1, deviation 2, and t = 4.303 for two degrees of freedom: 1 -+ 4.303 * 2 / sqrt(3)
    assert "- GN+WS - GN, batch 32: +1.00 (-3.97 to +5.97; +1.00, -1.00, +3.00)\n" in text
    assert "- BN" not in text
    write_run(runs, 0.5, variant="gn_ws", batch_size=2, compile=True)  # beside a BN of one seed
    more = difference_text(group_runs(read_runs(runs)))
    assert more.startswith(text)
    assert more[len(text) :] == "- GN+WS - BN, batch 2: +40.00 (one seed, so no interval)\n"


def test_report_holds_everything(runs: Path, datasets_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    paths = write_report(runs, out, datasets_root)
    assert {path.name for path in out.iterdir()} == {path.name for path in paths} == {
        "README.md", "table.csv", "runs.json", "misclassified.png",
        "learning_curves.png", "accuracy_over_batch.png",
    }  # fmt: skip
    text = paths[0].read_text()
    assert text.count("    python tools/train_fashion_mnist.py --all\n") == 1
    # the best is 93 %: 100 * sqrt(0.93 * 0.07 / 100 images)
    assert "adds a standard\nerror of 2.55 points to an accuracy of 93.0 %" in text
    assert "Nesterov momentum 0.9, weight decay\n0.0005" in text
    assert "A CPU, 2 threads" in text and "device cpu" in text
    assert "500 / 100 / 100 images" in text and "torch 2.11.0" in text and "2026-01-02" in text
    for name in ("accuracy_over_batch.png", "learning_curves.png", "misclassified.png"):
        assert f"({name})" in text
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert len(rows) == 7 and {row["seed"] for row in rows} == {"0", "1", "2"}
    data = json.loads((out / "runs.json").read_text())
    assert len(data) == 7 and all(len(run["history"]) == 2 for run in data)


def test_every_machine_of_a_resumed_run_is_named(runs: Path) -> None:
    path = runs / "gn_batch32_seed1" / "result.json"
    result = json.loads(path.read_text())
    result["resumed"] = [{**ENVIRONMENT, "cpu": "B CPU", "threads": 7}]
    result["finished"] = "2026-02-03 04:05 UTC"
    path.write_text(json.dumps(result))
    text = report_text(group_runs(read_runs(runs)))
    assert "A CPU, 2 threads, torch 2.11.0, Python 3.11.1; B CPU, 7 threads" in text
    assert "finished 2026-01-02 03:04 UTC to 2026-02-03 04:05 UTC" in text


def test_a_single_seed_has_no_bar(runs: Path) -> None:
    whole, _ = draw_accuracy_over_batch(group_runs(read_runs(runs))).axes
    bars = {bar.get_label(): bar.lines[1][0] for bar in whole.containers}  # type: ignore[attr-defined]
    ends = {name: caps.get_ydata().astype(float) for name, caps in bars.items()}
    assert np.isnan(ends["BN"]).all()
    np.testing.assert_allclose(ends["GN"], [91])


def test_curves_show_means_over_seeds(runs: Path) -> None:
    groups = group_runs(read_runs(runs))
    figure = draw_learning_curves(groups)
    top = figure.axes[:2]
    assert [panel.get_title() for panel in top] == ["batch 2", "batch 32"]
    assert [line.get_label() for line in top[1].lines] == ["GN", "GN+WS"]
    np.testing.assert_allclose(top[1].lines[0].get_ydata(), [50, 40])
    whole, _ = draw_accuracy_over_batch(groups).axes
    points = {bar.get_label(): bar.lines[0].get_ydata() for bar in whole.containers}  # type: ignore[attr-defined]
    assert {name: [round(v, 6) for v in y] for name, y in points.items()} == {
        "BN": [10], "GN": [92], "GN+WS": [93],
    }  # fmt: skip


def test_lines_have_the_order_of_the_variants(runs: Path) -> None:
    """Other models than the report's come last."""
    write_run(runs, 0.9, variant="none", batch_size=32)
    write_run(runs, 0.9, variant="bn", batch_size=2, groups=8, compile=True)
    whole, _ = draw_accuracy_over_batch(group_runs(read_runs(runs))).axes
    names = [bar.get_label() for bar in whole.containers]  # type: ignore[attr-defined]
    assert names == ["none", "BN", "GN", "GN+WS", "BN, 8 groups"]
    (legend,) = draw_learning_curves(group_runs(read_runs(runs))).legends
    assert [text.get_text() for text in legend.get_texts()] == names


def test_a_run_that_diverged_does_not_hide_the_others(runs: Path) -> None:
    path = runs / "gn_batch32_seed1" / "history.json"
    history = json.loads(path.read_text())
    history[1]["train_loss"] = None
    path.write_text(json.dumps(history))
    losses = draw_learning_curves(group_runs(read_runs(runs))).axes[3]
    np.testing.assert_allclose(losses.lines[0].get_ydata(), [1, 0.5])


def test_misclassified_images_are_sorted_by_confidence() -> None:
    logits = np.zeros((4, 10), dtype=np.float32)
    labels = np.array([0, 1, 2, 3])
    logits[0, 0] = 9  # correct
    logits[1, 5], logits[2, 6], logits[3, 7] = 2, 8, 4  # wrong, with rising confidence 1, 3, 2
    images = np.zeros((4, 28, 28), dtype=np.uint8)
    classes = [f"class {n}" for n in range(10)]
    figure = draw_misclassified("GN", images, labels, logits, classes)
    titles = [panel.get_title() for panel in figure.axes if panel.get_title()]
    assert [title.split(" ")[1] for title in titles] == ["6", "7", "5"]
    assert titles[0].endswith("is class 2")
    assert "3 of 4 test images" in figure.get_suptitle()
