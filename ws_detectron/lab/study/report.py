"""The report of a study: Markdown with two figures, and optionally one self-contained HTML page."""

import base64
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

from matplotlib.figure import Figure
from tabulate import tabulate

from ws_detectron.errors import UserError
from ws_detectron.evaluation.coco_report import TITLES, UNDEFINED, format_metric
from ws_detectron.evaluation.comparison import differing_keys, duration, effort
from ws_detectron.evaluation.curves import write_figure
from ws_detectron.evaluation.runs import Run
from ws_detectron.evaluation.statistics import LEVEL, Difference, Summary
from ws_detectron.utils.io import write_text

from .choice import at_the_edge, choose, has_ended, score
from .differences import (
    change_of_difference,
    overall_difference,
    pairs_of_batches,
    summary,
    variant_difference,
)
from .figures import draw_ap_by_variant, draw_ap_over_batch, draw_study_curves
from .records import DIVERGED, FAILED, FINISHED, RunResult, StudyResults, tasks_of
from .spec import Study

# keys that differ between runs and are not settings of a variant
NOT_SETTINGS = {"OUTPUT_DIR", "SEED"}

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; }}
table {{ display: block; overflow-x: auto; border-collapse: collapse; font-size: 0.9rem; }}
th, td {{ border-bottom: 1px solid #8886; padding: 0.3rem 0.7rem; text-align: left; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_report(results: StudyResults, folder: Path, *, page: bool = False) -> list[Path]:
    """Writes report.md and two figures; with `page`, also report.html, with the figures inside.

    Returns:
        The paths, the report first.

    Raises:
        UserError: the folder cannot be written to, or the package `markdown` is missing.
    """
    text = report_text(results)
    try:
        figures = [
            write_figure(draw(results.study, results.runs), folder / name)
            for name, draw, _ in figures_of(results.study)
        ]
        paths = [folder / "report.md", *figures]
        write_text(paths[0], text)
        if page:
            paths.append(folder / "report.html")
            write_text(paths[-1], as_page(results.study.title, text, folder))
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    return paths


def figures_of(study: Study) -> list[tuple[str, Callable[..., Figure], str]]:
    """File name, drawing function and caption of each figure."""
    return [
        ("ap_over_batch.png", draw_ap_over_batch, "AP of each variant over the batch")
        if len(study.batches) > 1
        else ("ap_by_variant.png", draw_ap_by_variant, "AP of each variant"),
        ("learning_curves.png", draw_study_curves, "Loss and AP of each variant over images seen"),
    ]


def as_page(title: str, text: str, folder: Path) -> str:
    """Converts Markdown to an HTML page with its images inside.

    Args:
        title: title of the page.
        text: Markdown, with tables as on GitHub.
        folder: folder of its images.

    Raises:
        UserError: the package `markdown` is missing.
    """
    try:
        import markdown
    except ImportError as error:
        raise UserError("--html needs the package markdown: pip install -e '.[lab]'") from error

    def inside(match: re.Match) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode("ascii")
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^":]+\.png)"', inside, markdown.markdown(text, extensions=["tables"]))
    return PAGE.format(title=html.escape(title), body=body)


def report_text(results: StudyResults) -> str:
    """The report as Markdown."""
    study, runs = results.study, results.runs
    images_in_text = [f"![{caption}]({name})" for name, _, caption in figures_of(study)]
    parts = [f"# {study.title}", _what_was_run(results)]
    for verb, some in (("Measured", runs), ("Searched", results.search)):
        environments = _environments(some)
        if environments:
            parts.append(f"{verb} on {'; '.join(environments)}.")
    problems = problems_of(results)
    if problems:
        parts += ["## Missing or failed", "\n".join(f"- **{_plain(p)}**" for p in problems)]
    parts += [
        "## AP over batch size",
        "Mean ± standard deviation (n - 1) over seeds, in brackets their number; AP in % at the "
        "end of training, not the best of it.",
        *(ap_table(results, task) for task in tasks_of(runs)),
        images_in_text[0],
    ]
    if study.comparisons:
        parts += [
            "## Differences",
            f"In points of AP, in brackets the {LEVEL:.0%} confidence interval of Welch's t-test "
            "over seeds, **bold** where it excludes 0. Intervals are not corrected for their "
            "number: of twenty, one is expected to miss."
            + (
                " Below, the difference of each seed's mean over all batches, and how the "
                "difference changes with the batch."
                if len(study.batches) > 1
                else ""
            ),
            *(difference_table(results, pair) for pair in study.comparisons),
        ]
    parts += ["## Learning curves", images_in_text[1]]
    if results.search:
        parts += _search_section(results)
    parts += _settings_section(results)
    parts += [
        "## Runs",
        "Training time is that of the training steps (median of 20 iterations); per image it is "
        "divided by the images of one GPU or process. Wall time includes start-up, evaluations and "
        "checkpoints, of the last start alone. Memory is the peak of the main process: on a GPU "
        "what torch allocated there, on the CPU all that is resident, libraries included.",
        run_table(runs),
    ]
    return "\n\n".join(parts) + "\n"


def problems_of(results: StudyResults) -> list[str]:
    """Runs that are not finished, with the reason, and searches without a result.

    Runs that were never started share a line: a study that takes several sessions has many.
    """
    problems = []
    every = [*results.search, *results.runs]
    waiting = [result.run.name for result in every if result.state is None]
    if waiting:
        problems.append(f"{len(waiting)} of {len(every)} not started: {', '.join(waiting)}")
    for result in every:
        if result.state is not None and result.status != FINISHED:
            reason = f": {result.state.reason}" if result.state.reason else ""
            problems.append(f"{result.run.name} is {result.status}{reason}")
    for (variant, batch), choice in choose(results.study, results.search).items():
        if choice is None:
            tried = [r for r in results.search if (r.run.variant, r.run.batch) == (variant, batch)]
            why = (
                "found nothing: all its runs diverged"
                if all(has_ended(result) for result in tried)
                else "has not ended, and what follows from it is not shown"
            )
            problems.append(f"the search for {variant} at {images(batch)} {why}")
    return problems


def ap_table(results: StudyResults, task: str) -> str:
    batches = sorted(results.study.batches)
    rows = [
        [
            variant.name,
            *(_summary(summary(results.runs, variant.name, batch, task)) for batch in batches),
        ]
        for variant in results.study.variants
    ]
    return table([f"{TITLES[task]} AP", *map(images, batches)], rows)


def difference_table(results: StudyResults, pair: tuple[str, str]) -> str:
    tasks, runs, batches = tasks_of(results.runs), results.runs, results.study.batches
    rows = [
        [images(batch), *(_difference(variant_difference(runs, pair, batch, t)) for t in tasks)]
        for batch in sorted(batches)
    ]
    if len(rows) > 1:
        overall = [_difference(overall_difference(runs, pair, batches, task)) for task in tasks]
        rows.append(["all batches", *overall])
    for here, there in pairs_of_batches(batches):
        changes = [change_of_difference(runs, pair, (here, there), task) for task in tasks]
        name = f"more at {images(here)} than at {images(there)}"
        rows.append([name, *map(_difference, changes)])
    return table([f"{pair[0]} - {pair[1]}", *(f"{TITLES[task]} AP" for task in tasks)], rows)


def run_table(results: Sequence[RunResult]) -> str:
    tasks = tasks_of(results)
    rows = []
    for result in results:
        run = result.run
        iterations, seconds = effort(result.metrics)
        per_image = seconds / (iterations * run.batch) if iterations and seconds else None
        memory = result.run_record.get("peak_memory_bytes")
        rows.append(
            [
                run.name,
                result.status,
                *(format_metric(result.ap.get(task)) for task in tasks),
                f"{run.options['SOLVER.BASE_LR']:.4g}",
                f"{iterations or 0} / {run.iterations}",
                duration(seconds),
                duration(result.state.seconds if result.state else None),
                format_metric(per_image, 3),
                UNDEFINED if memory is None else f"{memory / 2**20:,.0f} MiB",
                _plain("; ".join(result.notes)),
            ]
        )
    headers = ["run", "state", *(f"{TITLES[task]} AP" for task in tasks), "LR", "iterations"]
    headers += ["training time", "wall time", "s per image", "peak memory", "notes"]
    return table(headers, rows)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown."""
    escaped = [[text.replace("|", "\\|") for text in row] for row in rows]
    return tabulate(escaped, headers, tablefmt="github", disable_numparse=True)


def images(batch: int) -> str:
    return "1 image" if batch == 1 else f"{batch} images"


def _search_section(results: StudyResults) -> list[str]:
    study = results.study
    assert study.search is not None
    keys = list(study.search.grid)
    tasks = tasks_of(results.search)
    choices = choose(study, results.search)
    rows = []
    for result in _searched_in_order(results):
        run = result.run
        chosen = choices[run.variant, run.batch] == run.choice
        failed = result.status in (DIVERGED, FAILED)
        reached = result.status if failed else format_metric(score(result))
        rows.append(
            [
                run.variant,
                str(run.batch),
                *(str(run.choice[key]) for key in keys),
                *(format_metric(result.ap.get(task)) for task in tasks),
                f"**{reached}**" if chosen else reached,
            ]
        )
    headers = ["variant", study.unit, *(f"`{key}`" for key in keys)]
    headers += [*(f"{TITLES[task]} AP" for task in tasks), "mean"]
    edges = [
        f"{variant} at {batch}: {', '.join(f'`{key}`' for key in at_the_edge(study, choice))}"
        for (variant, batch), choice in choices.items()
        if choice is not None and at_the_edge(study, choice)
    ]
    parts = [
        "## Search",
        f"Each variant got the same {len(results.search) // len(study.variants)} runs of "
        f"{study.search.images:,} images (seed {study.search.seed}); values are at the reference "
        "batch of the variant's config. **Bold**: chosen, by the mean of box and mask AP. A run "
        "takes what was found at the nearest searched batch.",
        table(headers, rows),
    ]
    if edges:
        parts.append(
            f"Chosen at the edge of the grid, so the best may lie beyond: {'; '.join(edges)}."
        )
    return parts


def _searched_in_order(results: StudyResults) -> list[RunResult]:
    """The searched runs: variants in the order of the study, numbers ascending."""
    variants = [variant.name for variant in results.study.variants]

    def position(result: RunResult) -> tuple[Any, ...]:
        values = result.run.choice.values()
        numbers = (v if isinstance(v, (int, float)) else 0 for v in values)
        return (variants.index(result.run.variant), result.run.batch, *numbers)

    return sorted(results.search, key=position)


def _settings_section(results: StudyResults) -> list[str]:
    """Config keys that differ between variants at one batch, and between batches of one variant."""
    runs, batch = results.runs, max(results.study.batches)
    variant = results.study.variants[0].name
    variants = _first_of(runs, lambda r: r.run.variant, lambda r: r.run.batch == batch)
    batches = _first_of(runs, lambda r: str(r.run.batch), lambda r: r.run.variant == variant)
    return [
        "## Where the configs differ",
        *_settings_table(f"Between variants, at {images(batch)}:", variants),
        *_settings_table(f"Between batches, for {variant}:", batches),
    ]


def _first_of(
    results: Sequence[RunResult],
    name: Callable[[RunResult], str],
    wanted: Callable[[RunResult], bool],
) -> list[Run]:
    """The first run of each name with its config, also if it was not started."""
    found: dict[str, Run] = {}
    for result in filter(wanted, results):
        run = Run(name(result), result.run.folder, config=result.run.settings)
        found.setdefault(name(result), run)
    return [*found.values()]


def _settings_table(title: str, runs: Sequence[Run]) -> list[str]:
    keys = [key for key in differing_keys(runs) if key not in NOT_SETTINGS]
    if not keys:
        return [f"{title} nowhere."]
    rows = [[f"`{key}`", *(f"`{run.config.get(key)}`" for run in runs)] for key in keys]
    return [title, table(["key", *(run.name for run in runs)], rows)]


def _what_was_run(results: StudyResults) -> str:
    study = results.study
    counts = sorted({result.run.images for result in results.runs})
    seen = " or ".join(f"{count:,}" for count in counts) or "no"
    data = " and ".join(
        ", ".join(sorted({str(_setting(r, key)) for r in results.runs})) or UNDEFINED
        for key in ("DATASETS.TRAIN", "DATASETS.TEST")
    )
    return (
        f"{len(study.variants)} variants ({', '.join(v.name for v in study.variants)}) at "
        f"{', '.join(map(str, sorted(study.batches)))} {study.unit}"
        + (f" ({study.processes} of them)" if study.processes > 1 else "")
        + f", seeds {', '.join(map(str, study.seeds))}. "
        f"Every run sees {seen} training images: LR is proportional to the batch, warm-up and "
        f"schedule are counted in images. Trained and evaluated on {data}."
    )


def _setting(result: RunResult, key: str) -> str:
    value = result.run.settings[key]
    return "+".join(value) if isinstance(value, list) else str(value)


def _environments(results: Sequence[RunResult]) -> list[str]:
    """One line for each combination of machine and versions, with its range of dates."""
    found: dict[str, set[str]] = {}
    for record in (result.run_record for result in results):
        if "device" in record:
            versions = ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items())
            threads = f"{record.get('threads')} thread(s) per process"
            what = f"{record['device']}, {threads}, {versions}"
            found.setdefault(what, set()).add(str(record.get("date")))
    return [
        f"{what}, {min(dates)}" + (f" to {max(dates)}" if len(dates) > 1 else "")
        for what, dates in sorted(found.items())
    ]


def _plain(text: str) -> str:
    """Text of a log with HTML escaped."""
    return html.escape(text, quote=False)


def _summary(value: Optional[Summary]) -> str:
    if value is None:
        return UNDEFINED
    deviation = "" if value.deviation is None else f" ± {value.deviation:.2f}"
    return f"{value.mean:.2f}{deviation} ({value.count})"


def _difference(value: Optional[Difference]) -> str:
    if value is None:
        return UNDEFINED
    text = f"{value.mean:+.2f}"
    if value.low is not None and value.high is not None:
        text += f" ({value.low:+.2f} to {value.high:+.2f})"
    return f"**{text}**" if value.excludes_zero else text
