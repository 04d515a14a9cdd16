"""The report of a study: Markdown with two figures, and optionally one self-contained HTML page.

Needs the packages of the extra `lab`, see `runner.check_packages`.
"""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pandas as pd

from ws_detectron.evaluation.coco_report import UNDEFINED, format_metric
from ws_detectron.evaluation.comparison import duration, effort
from ws_detectron.evaluation.curves import write_figure
from ws_detectron.evaluation.runs import Run
from ws_detectron.utils.io import write_text

from .figures import draw_batches, draw_over_batch, draw_study_curves
from .plan import Values
from .records import DIVERGED, FAILED, FINISHED, RunResult, StudyResults
from .scores import LEVEL, Interval, differences, images, samples, scores_of
from .study_file import Search, Study

# settings that differ between runs and are not those of a variant
NOT_SETTINGS = {"OUTPUT_DIR", "SEED", "seed"}

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
        UserError: the folder cannot be written to.
    """
    study = results.study
    paths = [folder / "report.md", folder / _first_figure(study), folder / "learning_curves.png"]
    if len(study.batches) > 1:
        write_figure(draw_over_batch(results), paths[1])
    else:
        scores = scores_of(results.runs, study.scores)
        write_figure(draw_batches([results], scores=scores), paths[1])
    write_figure(draw_study_curves(results), paths[2])
    text = report_text(results)
    write_text(paths[0], text)
    if page:
        paths.append(folder / "report.html")
        write_text(paths[-1], as_page(study.title, text, folder))
    return paths


def as_page(title: str, text: str, folder: Path) -> str:
    """Converts Markdown to an HTML page with its images inside.

    Args:
        title: title of the page.
        text: Markdown, with tables as on GitHub.
        folder: folder of its images.
    """
    import markdown

    def inside(match: re.Match) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode("ascii")
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^":]+\.png)"', inside, markdown.markdown(text, extensions=["tables"]))
    return PAGE.format(title=html.escape(title), body=body)


def report_text(results: StudyResults) -> str:
    """The report as Markdown."""
    study, runs = results.study, results.runs
    several, scores = len(study.batches) > 1, scores_of(runs, study.scores)
    what, points = ("AP", "points of AP") if study.detectors else ("scores", "percentage points")
    parts = [f"# {study.title}", _what_was_run(results)]
    for verb, some in (("Measured", runs), ("Searched", results.search)):
        environments = _environments(some)
        if environments:
            parts.append(f"{verb} on {'; '.join(environments)}.")
    problems = problems_of(results)
    if problems:
        parts += ["## Missing or failed", "\n".join(f"- **{_plain(p)}**" for p in problems)]
    parts += [
        f"## {'AP' if study.detectors else 'Scores'} over batch size",
        f"Mean ± standard deviation (n - 1) over seeds, in brackets their number; {what} in % at "
        "the end of training, not the best of it.",
        *(mean_table(results, score) for score in scores),
        f"![{what} of each variant{' over the batch' if several else ''}]({_first_figure(study)})",
    ]
    if study.comparisons:
        overall = (
            " Below, the difference of each seed's mean over all batches, and how the difference "
            "changes with the batch."
        )
        parts += [
            "## Differences",
            f"In {points}, in brackets the {LEVEL:.0%} confidence interval of Welch's t-test over "
            "seeds, **bold** where it excludes 0. Intervals are not corrected for their number: of "
            f"twenty, one is expected to miss.{overall if several else ''}",
        ]
    for pair in study.comparisons or ():
        columns = {study.scores[score]: differences(results, pair, score) for score in scores}
        table = pd.DataFrame(columns, dtype=object).map(_signed)
        parts.append(markdown_table(table, " - ".join(pair)))
    parts += [
        "## Learning curves",
        f"![Loss and {what} of each variant over images seen](learning_curves.png)",
        *(_search_section(results, study.search) if study.search else []),
        *_settings_section(results),
        "## Runs",
        "Training time is that of the training steps (median of 20 iterations); per image it is "
        "divided by the images of one GPU or process. Wall time includes start-up, evaluations and "
        "checkpoints, of the last start alone. Memory is the peak of the main process: on a GPU "
        "what torch allocated there, on the CPU all that is resident, libraries included.",
        run_table(results),
    ]
    return "\n\n".join(parts) + "\n"


def problems_of(results: StudyResults) -> list[str]:
    """Runs that are not finished, with the reason, and searches without a result.

    Runs that were never started share a line: a study that takes several sessions has many.
    """
    problems = []
    every = [*results.search, *results.runs]
    waiting = [result.run.name for result in every if result.record is None]
    if waiting:
        problems.append(f"{len(waiting)} of {len(every)} not started: {', '.join(waiting)}")
    for result in every:
        if result.record is not None and result.status != FINISHED:
            reason = f": {result.record.reason}" if result.record.reason else ""
            problems.append(f"{result.run.name} is {result.status}{reason}")
    for (variant, batch), choice in results.choices.items():
        if choice is None:
            tried = [r for r in results.search if (r.run.variant, r.run.batch) == (variant, batch)]
            why = (
                "found nothing: all its runs diverged"
                if all(result.has_ended for result in tried)
                else "has not ended, and what follows from it is not shown"
            )
            problems.append(f"the search for {variant} at {images(batch)} {why}")
    return problems


def mean_table(results: StudyResults, score: str) -> str:
    """Mean ± standard deviation (number of seeds): a row per variant, a column per batch."""
    study, values = results.study, samples(results.runs, score)

    def cell(some: list[float]) -> str:
        if not some:
            return UNDEFINED
        deviation = f" ± {np.std(some, ddof=1):.2f}" if len(some) > 1 else ""
        return f"{np.mean(some):.2f}{deviation} ({len(some)})"

    columns = {
        images(batch): {name: cell(values[name, batch]) for name in study.variants}
        for batch in sorted(study.batches)
    }
    return markdown_table(pd.DataFrame(columns), study.scores[score])


def run_table(results: StudyResults) -> str:
    """A row per run: state, scores, effort and notes."""
    study, rows = results.study, []
    scores = scores_of(results.runs, study.scores)
    for result in results.runs:
        run, record = result.run, result.record
        iterations, seconds = effort(Run(run.name, run.folder, rows=record.rows if record else []))
        per_image = seconds / (iterations * run.batch) if iterations and seconds else None
        memory = record.run_record.get("peak_memory_bytes") if record else None
        total = run.settings.get("SOLVER.MAX_ITER")
        rows.append(
            {
                "state": result.status,
                **{study.scores[key]: format_metric(result.scores.get(key)) for key in scores},
                **({"LR": f"{run.settings['SOLVER.BASE_LR']:.4g}"} if study.detectors else {}),
                "iterations": f"{iterations or 0}" + (f" / {total}" if total else ""),
                "training time": duration(seconds),
                "wall time": duration(record.seconds if record else None),
                "s per image": format_metric(per_image, 3),
                "peak memory": f"{memory / 2**20:,.0f} MiB" if memory else UNDEFINED,
                "notes": _plain("; ".join(result.notes)),
            }
        )
    return markdown_table(pd.DataFrame(rows, index=[r.run.name for r in results.runs]), "run")


def markdown_table(table: pd.DataFrame, index: str) -> str:
    """A table of text in GitHub's Markdown; `index` is the header of the rows' names."""
    escaped = table.rename_axis(index).reset_index().map(lambda text: text.replace("|", "\\|"))
    return escaped.to_markdown(index=False, tablefmt="github", disable_numparse=True)


def _first_figure(study: Study) -> str:
    """File name of the figure of scores."""
    what = "over_batch" if len(study.batches) > 1 else "by_variant"
    return f"{'ap' if study.detectors else 'score'}_{what}.png"


def _search_section(results: StudyResults, search: Search) -> list[str]:
    study, scores = results.study, scores_of(results.search, results.study.scores)
    variants = [*study.variants]

    def position(result: RunResult) -> tuple[Any, ...]:
        """Variants in the order of the study, numbers ascending."""
        values = result.run.choice.values()
        numbers = (v if isinstance(v, (int, float)) else 0 for v in values)
        return (variants.index(result.run.variant), result.run.batch, *numbers)

    searched, rows = sorted(results.search, key=position), []
    for result in searched:
        run = result.run
        failed = result.status in (DIVERGED, FAILED)
        reached = result.status if failed else format_metric(result.mean)
        chosen = results.choices[run.variant, run.batch] == run.choice
        rows.append(
            {
                study.unit: str(run.batch),
                **{f"`{key}`": str(value) for key, value in run.choice.items()},
                **{study.scores[key]: format_metric(result.scores.get(key)) for key in scores},
                "mean": f"**{reached}**" if chosen else reached,
            }
        )
    parts = [
        "## Search",
        f"Each variant got the same {len(results.search) // len(study.variants)} runs of "
        f"{search.images:,} images (seed {search.seed}); values are at the reference "
        "batch of the variant's config. **Bold**: chosen, by the mean of box and mask AP. A run "
        "takes what was found at the nearest searched batch.",
        markdown_table(pd.DataFrame(rows, index=[r.run.variant for r in searched]), "variant"),
    ]
    edges = [
        f"{variant} at {batch}: {', '.join(f'`{key}`' for key in keys)}"
        for (variant, batch), choice in results.choices.items()
        if choice is not None and (keys := at_the_edge(search, choice))
    ]
    if edges:
        parts.append(
            f"Chosen at the edge of the grid, so the best may lie beyond: {'; '.join(edges)}."
        )
    return parts


def at_the_edge(search: Search, choice: Values) -> list[str]:
    """Keys whose chosen value is the smallest or largest of three or more numbers.

    The best value may be outside the grid.
    """
    return [
        key
        for key, values in search.grid.items()
        if len(values) > 2
        and all(isinstance(value, (int, float)) for value in values)
        and choice[key] in (min(values), max(values))
    ]


def _settings_section(results: StudyResults) -> list[str]:
    """Settings that differ between variants at one batch, and between batches of one variant.

    Of the first run of each, also if it was not started.
    """
    batch, variant = max(results.study.batches), next(iter(results.study.variants))
    variants: dict[str, Values] = {}
    batches: dict[str, Values] = {}
    for run in (result.run for result in results.runs):
        if run.batch == batch:
            variants.setdefault(run.variant, run.settings)
        if run.variant == variant:
            batches.setdefault(str(run.batch), run.settings)
    parts = [f"## Where the {'configs' if results.study.detectors else 'settings'} differ"]
    for title, columns in (
        (f"Between variants, at {images(batch)}:", variants),
        (f"Between batches, for {variant}:", batches),
    ):
        table = pd.DataFrame(columns, dtype=object).map("`{}`".format, na_action="ignore")
        table = table.drop(index=NOT_SETTINGS, errors="ignore").sort_index().fillna(UNDEFINED)
        table = table[table.nunique(axis=1) > 1].rename("`{}`".format)
        parts += [title, markdown_table(table, "key")] if len(table) else [f"{title} nowhere."]
    return parts


def _what_was_run(results: StudyResults) -> str:
    study = results.study
    text = (
        f"{len(study.variants)} variants ({', '.join(study.variants)}) at "
        f"{', '.join(map(str, sorted(study.batches)))} {study.unit}"
        + (f" ({study.processes} of them)" if study.processes > 1 else "")
        + f", seeds {', '.join(map(str, study.seeds))}."
    )
    if not study.detectors:
        return f"{text} Every run is one of `{study.command}`."
    counts = sorted({result.run.images or 0 for result in results.runs})
    seen = " or ".join(f"{count:,}" for count in counts) or "no"
    train, test = (
        ", ".join(sorted({"+".join(r.run.settings[key]) for r in results.runs})) or UNDEFINED
        for key in ("DATASETS.TRAIN", "DATASETS.TEST")
    )
    return (
        f"{text} Every run sees {seen} training images: LR is proportional to the batch, warm-up "
        f"and schedule are counted in images. Trained and evaluated on {train} and {test}."
    )


def _environments(results: Sequence[RunResult]) -> list[str]:
    """One line for each combination of machine and versions, with its range of dates."""
    found: dict[str, set[str]] = {}
    for record in (result.record.run_record for result in results if result.record):
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


def _signed(value: Optional[Interval]) -> str:
    if value is None:
        return UNDEFINED
    text = f"{value.mean:+.2f}"
    if value.low is not None and value.high is not None:
        text += f" ({value.low:+.2f} to {value.high:+.2f})"
    return f"**{text}**" if value.excludes_zero else text
