"""The report of a study that a stand-in has trained."""

import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import product, zip_longest
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes
from small_study import VARIANT, write_study

from ws_detectron.errors import UserError
from ws_detectron.evaluation.comparison import markdown_table
from ws_detectron.lab.study import (
    Options,
    StudyResults,
    check_packages,
    draw_studies,
    read_study_results,
    report_study,
    run_study,
)
from ws_detectron.lab.study.figures import (
    draw_batches,
    draw_over_batch,
    draw_scores,
    draw_study_curves,
)
from ws_detectron.lab.study.report import (
    as_page,
    problems_of,
    report_text,
    verdict,
)

SEARCH = {"grid": {"SOLVER.BASE_LR": [0.02, 0.04, 0.08]}, "images": 40, "batches": [4]}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> StudyResults:
    """Both variants, batches and seeds after a search; gn of seed 2 at batch 1 failed."""
    folder = tmp_path_factory.mktemp("study")
    study = write_study(folder, search=SEARCH, evaluations=2)
    failing = study.output / "runs" / "gn_1img_seed2"
    failing.mkdir(parents=True)
    (failing / "fail").touch()
    return run_study(study, Options(jobs=2), lambda line: None)


@pytest.fixture(scope="module")
def report(ran: StudyResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report_study(ran, folder / "report", print, page=True)
    return folder / "report"


def test_markdown_has_figures_intervals_and_what_is_missing(report: Path) -> None:
    text = (report / "report.md").read_text()
    # the stand-in reaches 101 and 102 with the LR that the search finds
    assert re.search(r"\| BN +\| 101\.50 ± 0\.71 \(2\) +\| 101\.50 ± 0\.71 \(2\) +\|", text)
    assert re.search(r"\| GN +\| 101\.00 \(1\) ", text)
    assert re.search(r"\| GN - BN +\| box AP +\| mask AP", text)
    assert "of each seed's mean over all batches, and how the difference changes" in text
    assert re.search(r"\| more at 1 image than at 4 images +\| -0\.50 +\|", text)
    assert re.search(r"\| 4 images +\| \+0\.00 \(-3\.04 to \+3\.04\)", text)
    assert "- **gn_1img_seed2 is diverged: training diverged at iteration 3" in text
    assert re.search(r"\| key +\| BN +\| GN +\|", text) and "Between batches, for BN:" in text
    assert "| `MODEL.RESNETS.NORM` " in text and "`SOLVER.MAX_ITER`" in text
    assert "Measured on a processor, 1 thread(s) per process, torch 2.11, 2026-01-02" in text
    assert "Searched on a processor, 1 thread(s) per process, torch 2.11, 2026-01-02" in text
    assert "1,024 MiB" in text
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert cv2.imread(str(report / name)).std() > 5


def test_search_is_reported_with_its_choice(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert "the same 3 runs of 40 images" in text
    found = re.findall(r"\| (BN|GN) +\| 4 +\| (0\.0\d) +\| [\d.]+ +\| [\d.]+ +\| (\S+)", text)
    assert len(found) == 6
    assert [lr for _, lr, mean in found if mean.startswith("**")] == ["0.04", "0.04"]


def test_search_is_listed_in_the_order_of_variants_and_upwards(make_study) -> None:
    grid = {"SOLVER.BASE_LR": [0.04, 0.08, 0.02], "MODEL.RESNETS.NORM": ["GN", "BN"]}
    variants = {name: VARIANT.format(name) for name in ("gn", "bn")}
    study = make_study(variants=variants, search={**SEARCH, "grid": grid})
    text = report_text(read_study_results(study))
    found = re.findall(r"^\| (GN|BN) +\| 4 +\| (0\.0\d) +\| (GN|BN) ", text, re.MULTILINE)
    assert [variant for variant, _, _ in found] == ["GN"] * 6 + ["BN"] * 6
    values = [("0.02", "GN"), ("0.02", "BN"), ("0.04", "GN"), ("0.04", "BN")]
    assert [row[1:] for row in found[:4]] == values


SVG = re.compile("<svg.*?</svg>", re.DOTALL)


def test_page_is_sound_and_needs_nothing_else(report: Path) -> None:
    text = (report / "report.html").read_text()
    rest = SVG.sub("", text)
    opened, closed = (Counter(re.findall(rf"<{end}(\w+)", rest)) for end in ("", "/"))
    assert {tag for tag in opened if opened[tag] != closed[tag]} == {"meta"}
    assert not re.search(r"url\((?!#)|src=|@import|<script", text)
    assert "gn_1img_seed2 is diverged" in text and "101.50 ± 0.71" in text
    assert "<td>gn_1img_seed2</td>" in text and "<code>MODEL.RESNETS.NORM</code>" in text
    figures = re.findall('role="img" aria-label="(.*?)"', text)
    assert figures == re.findall(r"!\[(.*?)\]", (report / "report.md").read_text())


def test_page_has_figures_for_narrow_and_dark_windows(report: Path) -> None:
    text = (report / "report.html").read_text()
    assert "color-scheme: light dark" in text and "@media (max-width: 45rem) { .narrow" in text
    names = ("ap_over_batch", "learning_curves")
    for svg, (name, width) in zip_longest(SVG.findall(text), product(names, ("wide", "narrow"))):
        root = ElementTree.fromstring(svg)
        assert root.get("class") == f"{name} {width}"
        assert (float(root.get("width", "").rstrip("pt")) < 360) == (width == "narrow")
        texts = [part.text for part in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {"BN", "GN", "box AP (%)"} < {*texts}
        assert "currentColor" in svg and "var(--back)" in svg
        assert not re.search("#000000|#ffffff|black|white", svg)
    ids = re.findall(' id="(.*?)"', text)
    assert len(ids) == len({*ids}), "a clip path or marker would be that of another figure"


def test_page_starts_with_the_verdict_and_its_contents(report: Path) -> None:
    text = SVG.sub("", (report / "report.html").read_text())
    places = [
        text.index(part)
        for part in ("<h1", "In box AP", '<div class="toc">', "2 variants (BN, GN)", "<table>")
    ]
    assert places == sorted(places)
    linked, headed = re.findall(r'href="#(.*?)"', text), re.findall(r'<h2 id="(.*?)"', text)
    assert linked == headed and len(headed) > 4


def with_scores(ran: StudyResults, scores: dict[tuple[str, int], list[float]]) -> StudyResults:
    """Finished runs with these values of box AP."""
    (seen, *_) = (run for run in ran.runs if run.status == "finished")
    runs = [
        replace(
            seen,
            run=replace(seen.run, variant=variant, batch=batch, seed=seed),
            scores={"bbox/AP": value},
        )
        for (variant, batch), values in scores.items()
        for seed, value in enumerate(values, start=1)
    ]
    return replace(ran, runs=runs)


def test_verdict_says_who_is_ahead_where(ran: StudyResults) -> None:
    """t(0.975, 4) = 2.776; s = 1 of three each: the interval is +- 2.776 * sqrt(2 / 3) = 2.27."""
    around = {value: [value - 1.0, value, value + 1.0] for value in (10, 12, 20, 30)}
    results = with_scores(
        ran,
        {
            ("gn", 1): around[30],
            ("bn", 1): around[20],
            ("gn", 4): around[12],
            ("bn", 4): around[10],
        },
    )
    start = "**In box AP, in points, by 95 % intervals over seeds:** "
    assert verdict(results) == (
        f"{start}GN is ahead of BN (+10.0 at 1 image); it is not distinguished from BN "
        "(+2.0 at 4 images)."
    )
    results = with_scores(ran, {("gn", 1): around[10], ("bn", 1): around[20]})
    assert verdict(results) == f"{start}GN is behind BN (-10.0 at 1 image)."
    results = with_scores(ran, {("gn", 1): [10], ("bn", 1): [20]})
    assert "GN differs, without an interval, from BN (-10.0 at 1 image)." in verdict(results)
    assert "No difference in box AP is known yet" in verdict(with_scores(ran, {("gn", 1): [1]}))


def test_page_is_written_on_request_alone(ran: StudyResults, tmp_path: Path) -> None:
    report_study(ran, tmp_path, print)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.md", "ap_over_batch.png", "learning_curves.png"}


def test_missing_packages_are_named_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "markdown", None)
    check_packages()
    with pytest.raises(UserError, match=r"needs markdown: pip install 'ws_detectron\[lab\]'"):
        check_packages(page=True)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match="needs scipy: pip"):
        check_packages()


def test_report_of_nothing_yet_says_so(make_study, tmp_path: Path) -> None:
    results = read_study_results(make_study())
    report_study(results, tmp_path / "report", print)
    text = (tmp_path / "report" / "report.md").read_text()
    (problem,) = problems_of(results)
    assert problem.startswith("8 of 8 not started: ") and problem in text
    assert {f"{a}_{b}img_seed{s}" for a in ("bn", "gn") for b in (1, 4) for s in (1, 2)} == set(
        problem.partition(": ")[2].split(", ")
    )
    report_study(read_study_results(make_study(search=SEARCH)), tmp_path / "report", print)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "the search for BN at 4 images has not ended" in text


def test_folder_that_cannot_be_written(ran: StudyResults, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        report_study(ran, tmp_path / "file", print)


def test_figures_hold_means_and_deviations(ran: StudyResults) -> None:
    box, mask = draw_over_batch(ran).axes
    assert (box.get_ylabel(), mask.get_ylabel()) == ("box AP (%)", "mask AP (%)")
    (line, _, (bars,)) = box.containers[0]
    assert [*line.get_ydata()] == [101.5, 101.5]
    assert [label.get_text() for label in box.get_xticklabels()] == ["1", "4"]
    assert box.get_ylim() == mask.get_ylim()
    assert "A study\nmean and standard deviation of 1 to 2 seeds" in ran_title(box)
    ends = [*bars.get_segments()[0][:, 1]]
    assert ends == pytest.approx([101.5 - 0.5**0.5, 101.5 + 0.5**0.5])


def ran_title(panel: Axes) -> str:
    suptitle = panel.get_figure().get_suptitle()
    return str(suptitle)


def test_variants_stand_within_the_place_of_their_batch(ran: StudyResults) -> None:
    """Half of the distance of two batches would read as a batch between them."""
    box, _ = draw_over_batch(ran).axes
    for container in box.containers:
        places = [*container[0].get_xdata()]
        assert [round(place) for place in places] == [0, 1]
        assert all(abs(place - round(place)) < 0.25 for place in places)
    bands = [patch.get_extents().intervalx for patch in box.patches]
    inside = box.transData.inverted().transform
    assert [[round(inside((x, 0))[0], 6) for x in band] for band in bands] == [[-0.5, 0.5]]


def test_many_variants_are_rows_at_every_batch(ran: StudyResults) -> None:
    """Lines of nine variants would lie over each other."""
    variants = dict.fromkeys([f"gn_ws_{n}" for n in range(7)], ran.study.variants["gn"])
    (seen, *_) = (run for run in ran.runs if run.status == "finished")
    runs = [
        replace(seen, run=replace(seen.run, variant=name, batch=batch))
        for name in variants
        for batch in (1, 4)
    ]
    many = replace(ran, study=replace(ran.study, variants=variants), runs=runs)
    panels = draw_scores(many).axes
    assert [panel.get_title().split("\n")[0] for panel in panels] == [
        title for title in ("1 image per step", "4 images per step") for _ in ("box", "mask")
    ]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [
        f"GN+WS {n}" for n in range(7)
    ]
    assert len({panel.get_xlim() for panel in panels}) == 1
    narrow = draw_scores(many, stacked=True)
    assert narrow.get_figwidth() < 5 and len(narrow.axes) == 4
    assert len({panel.get_position().x0 for panel in narrow.axes}) == 1


def test_legend_of_many_variants_is_not_cut_off(ran: StudyResults) -> None:
    variants = dict.fromkeys([f"{n}_of_eight_all" for n in range(8)], ran.study.variants["bn"])
    study = replace(ran.study, variants=variants, batches=[1])
    (seen, *_) = (c for c in ran.runs if c.status == "finished" and c.run.batch == 1)
    runs = [replace(seen, run=replace(seen.run, variant=variant)) for variant in variants]
    figure = draw_study_curves(replace(ran, study=study, runs=runs))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 8
    box = legend.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width


def test_curves_are_over_images_so_that_batches_can_be_compared(ran: StudyResults) -> None:
    panels = draw_study_curves(ran).axes
    loss_1, loss_4 = panels[:2]
    assert (loss_1.get_title(), loss_4.get_title()) == ("1 image per step", "4 images per step")
    np.testing.assert_array_equal(loss_1.lines[0].get_xdata(), np.arange(1, 81))
    np.testing.assert_array_equal(loss_4.lines[0].get_xdata(), np.arange(4, 81, 4))
    box_4 = panels[3]
    assert len({panel.get_xlim() for panel in panels}) == 1
    assert len({panel.get_ylim() for panel in panels[2:]}) == 1  # box and mask AP
    np.testing.assert_array_equal(box_4.lines[0].get_xdata(), [80])
    np.testing.assert_allclose(box_4.lines[0].get_ydata(), [101.5])


def test_curves_are_of_finished_runs_and_may_lack_a_value(ran: StudyResults) -> None:
    """gn of seed 2 at batch 1 failed; bn of seed 2 at batch 4 has no value at 40 images."""
    runs = [*ran.runs]
    number = next(i for i, r in enumerate(runs) if r.run.name == "bn_4img_seed2")
    rows = [row for row in runs[number].record.rows if row["iteration"] != 9]
    runs[number] = replace(runs[number], record=replace(runs[number].record, rows=rows))
    loss_1, loss_4 = draw_study_curves(replace(ran, runs=runs)).axes[:2]
    (gn,) = (line for line in loss_1.lines if line.get_label() == "GN")
    assert len(gn.get_xdata()) == 80
    np.testing.assert_array_equal(loss_4.lines[0].get_xdata(), np.arange(4, 81, 4))
    assert np.isfinite(loss_4.lines[0].get_ydata()).all()

    number = next(i for i, r in enumerate(runs) if r.run.name == "gn_1img_seed2")
    diverged = [{"iteration": 0, "total_loss": 1000.0}]
    runs[number] = replace(runs[number], record=replace(runs[number].record, rows=diverged))
    (gn,) = (
        x for x in draw_study_curves(replace(ran, runs=runs)).axes[0].lines if x.get_label() == "GN"
    )
    assert len(gn.get_xdata()) == 80 and max(gn.get_ydata()) < 10


def test_text_of_a_log_is_escaped(ran: StudyResults, tmp_path: Path) -> None:
    number = next(i for i, r in enumerate(ran.runs) if r.run.name == "gn_1img_seed2")
    runs = [*ran.runs]
    record = runs[number].record
    assert record is not None
    said = replace(record, reason="<class 'x'> & a|b")
    runs[number] = replace(runs[number], record=said, notes=("FAILED: <class 'x'> & a|b",))
    text = report_text(replace(ran, runs=runs))
    assert "is diverged: &lt;class 'x'&gt; &amp; a|b**" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| gn_1img_seed2"))
    assert row.rstrip(" |").endswith("FAILED: &lt;class 'x'&gt; &amp; a\\|b")
    assert "<title>t&lt;i&gt;</title>" in as_page("t<i>", "# t\n\nverdict\n\ntext", {})
    assert "h|1" not in markdown_table([{"a": "h|1"}])


def test_one_batch_is_drawn_by_variant(ran: StudyResults) -> None:
    results = replace(ran, study=replace(ran.study, batches=[4]))
    box, mask = draw_batches([results], scores=["bbox/AP", "segm/AP"]).axes
    assert [label.get_text() for label in box.get_yticklabels()] == ["BN", "GN"]
    # the stand-in reaches 101 and 102 with its two seeds: t(0.975, 1) = 12.706, s = 0.7071
    half = 12.7062 * 0.70711 / 2**0.5
    seeds, interval, mean = box.lines[:3]
    assert sorted(seeds.get_xdata()) == [101, 102] and list(mean.get_xdata()) == [101.5]
    assert interval.get_xdata() == pytest.approx([101.5 - half, 101.5 + half], rel=1e-4)
    assert box.get_xlabel() == "box AP (%)" and mask.get_xlabel() == "mask AP (%)"
    assert box.get_xlim() == mask.get_xlim()
    assert ran_title(box) == "A study\nsymbol: mean, bar: 95 % interval, tick: a run"


def test_panels_of_several_studies(ran: StudyResults) -> None:
    only_gn = replace(ran.study, variants={"gn": ran.study.variants["gn"]}, batches=[4])
    figure = draw_batches([ran, replace(ran, study=only_gn)], batches=[4])
    both, alone = figure.axes
    assert "4 images per step\n" in both.get_title() and "images" in alone.get_title()
    other = [replace(ran, study=replace(ran.study, title=f"{n}: data, model")) for n in "ab"]
    assert ran_title(draw_batches(other).axes[0]).startswith("Data, model\n")
    assert both.lines[3].get_color() == alone.lines[0].get_color() != both.lines[0].get_color()


def test_figure_of_studies_is_drawn_from_their_records(ran: StudyResults, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 studies need as many --records; got 1"):
        draw_studies(["a.yaml", "b.yaml"], [tmp_path], None, tmp_path / "figure.png")
