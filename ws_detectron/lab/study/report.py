"""The report of a study in numbers and text: means, differences with intervals, all runs.

Needs the packages of the extra `lab`, see `runner.check_packages`. Source of the interval: Welch,
"The generalization of Student's problem when several different population variances are involved"
(Biometrika 34, 1947).
"""

import html
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import pandas as pd
from scipy import stats

from ws_detectron.evaluation.coco_report import UNDEFINED, format_metric
from ws_detectron.evaluation.comparison import (
    differing_keys,
    duration,
    effort,
    markdown_table,
    settings_table,
)
from ws_detectron.evaluation.figure_style import DARK, display_name

from .records import DIVERGED, FAILED, FINISHED, RunResult, StudyResults
from .study_file import Search, Study, Values

LEVEL = 0.95

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #fff; --text: #1a1c1f; --link: #0550ae; }}
@media (prefers-color-scheme: dark) {{
:root {{ --back: {dark}; --text: #e4e6e8; --link: #7ab8ff; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 1.5rem auto;
  padding: 0 1rem; background: var(--back); color: var(--text); overflow-wrap: break-word; }}
a {{ color: var(--link); }}
h1 {{ font-size: 1.5rem; line-height: 1.25; }}
h2 {{ font-size: 1.2rem; margin-top: 2rem; }}
table {{ display: block; overflow-x: auto; border-collapse: collapse; font-size: 0.9rem;
  margin: 1rem 0; }}
th, td {{ border-bottom: 1px solid #8886; padding: 0.3rem 0.7rem; text-align: left; }}
svg {{ max-width: 100%; height: auto; }}
svg text {{ font-family: system-ui, sans-serif !important; fill: currentColor; }}
.narrow {{ display: none; }}
@media (max-width: 45rem) {{ .narrow {{ display: inline; }} .wide {{ display: none; }} }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


class Interval(NamedTuple):
    """A mean or difference, and the ends of its interval; NaN if there are too few values."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    @property
    def excludes_zero(self) -> bool:
        return self.low * self.high > 0

    def __str__(self) -> str:
        """Signed, in Markdown: bold if the interval excludes zero."""
        text = f"{self.mean:+.2f}"
        if not math.isnan(self.low):
            text += f" ({self.low:+.2f} to {self.high:+.2f})"
        return f"**{text}**" if self.excludes_zero else text


def contrast(
    plus: Sequence[Sequence[float]], minus: Sequence[Sequence[float]] = ()
) -> Optional[Interval]:
    """Sum of the means of `plus` minus that of the means of `minus`, with Welch's 95 % interval.

        d ± t(0.95, v) * sqrt(sum of s²/n)
        v = (sum of s²/n)² / sum of (s²/n)²/(n - 1)

    over all samples; for a single sample, v = n - 1, this is Student's interval of its mean.
    Values are assumed independent and normally distributed; variances may differ. That runs of one
    seed share the order of the images is not used.

    Returns:
        None if a sample is empty; without an interval if one has a single value.
    """
    samples = [*plus, *minus]
    sizes = [len(sample) for sample in samples]
    if min(sizes) == 0:
        return None
    mean = float(sum(map(np.mean, plus)) - sum(map(np.mean, minus)))
    if min(sizes) == 1:
        return Interval(mean)
    shares = [float(np.var(sample, ddof=1)) / n for sample, n in zip(samples, sizes)]
    total = sum(shares)
    if total == 0:
        return Interval(mean, mean, mean)
    freedom = total**2 / sum(share**2 / (n - 1) for share, n in zip(shares, sizes))
    half = float(stats.t.interval(LEVEL, freedom)[1]) * math.sqrt(total)
    return Interval(mean, mean - half, mean + half)


def titles_of(study: Study, results: Sequence[RunResult]) -> dict[str, str]:
    """Scores that any result has, and their titles; the first score if there is none yet."""
    found = {score for result in results for score in result.scores}
    shown = [score for score in study.scores if score in found] or [*study.scores][:1]
    return {score: study.scores[score] for score in shown}


def score_table(results: StudyResults, score: str) -> pd.DataFrame:
    """The values of a score in %, in long form: variant, batch, seed, value."""
    rows = [
        (r.run.variant, r.run.batch, r.run.seed, r.scores[score])
        for r in results.runs
        if score in r.scores
    ]
    return pd.DataFrame(rows, columns=["variant", "batch", "seed", "value"])


def samples(results: StudyResults, score: str) -> dict[tuple[str, int], list[float]]:
    """(variant, batch) -> the values of its finished runs; an empty list if there are none."""
    groups = score_table(results, score).groupby(["variant", "batch"]).value
    return defaultdict(list, {key: group.tolist() for key, group in groups})


def differences(
    results: StudyResults, pair: Sequence[str], score: str
) -> dict[str, Optional[Interval]]:
    """First minus second variant: at each batch, over all, and how it changes with the batch.

    Over all batches, the values are each seed's mean; seeds with a missing run are skipped, and so
    are batches that a variant leaves out.
    """
    planned = [results.study.variants[name].runs or results.study.batches for name in pair]
    batches = sorted(set.intersection(*map(set, planned)))
    table = score_table(results, score).pivot(
        index=["variant", "seed"], columns="batch", values="value"
    )
    table = table.reindex(columns=batches)
    a, b = (table[table.index.get_level_values("variant") == name] for name in pair)

    def welch(plus: list[pd.Series], minus: list[pd.Series]) -> Optional[Interval]:
        return contrast([some.dropna() for some in plus], [some.dropna() for some in minus])

    rows = {images(batch): welch([a[batch]], [b[batch]]) for batch in batches}
    if len(batches) > 1:
        rows["all batches"] = welch([a.mean(axis=1, skipna=False)], [b.mean(axis=1, skipna=False)])
    for other in batches[1:]:
        first = batches[0]
        name = f"more at {images(first)} than at {images(other)}"
        rows[name] = welch([a[first], b[other]], [b[first], a[other]])
    return rows


def verdict(results: StudyResults) -> str:
    """What the first score says of each comparison, in a sentence for each."""
    study = results.study
    (score, title), *_ = titles_of(study, results.runs).items()
    sentences = []
    for pair in study.comparisons or ():
        one, other = map(display_name, pair)
        found: dict[str, list[str]] = {}
        for where, interval in differences(results, pair, score).items():
            if interval is None or where not in map(images, study.batches):
                continue
            if math.isnan(interval.low):
                what = "differs, without an interval, from"
            elif not interval.excludes_zero:
                what = "is not distinguished from"
            else:
                what = "is ahead of" if interval.mean > 0 else "is behind"
            found.setdefault(what, []).append(f"{interval.mean:+.1f} at {where}")
        told = [f"{what} {other} ({', '.join(some)})" for what, some in found.items()]
        if told:
            sentences.append(f"{one} {'; it '.join(told)}.")
    if not sentences:
        return f"**No difference in {title} is known yet.**"
    basis = f"In {title}, in points, by {100 * LEVEL:g} % intervals over seeds:"
    return f"**{basis}** {' '.join(sentences)}"


def images(batch: int) -> str:
    return "1 image" if batch == 1 else f"{batch} images"


def first_figure(study: Study) -> str:
    """File name of the figure of scores."""
    what = "over_batch" if len(study.batches) > 1 else "by_variant"
    return f"{'ap' if study.detectors else 'score'}_{what}.png"


def report_text(results: StudyResults) -> str:
    """The report as Markdown."""
    study, runs = results.study, results.runs
    several, titles = len(study.batches) > 1, titles_of(study, runs)
    what, points = ("AP", "points of AP") if study.detectors else ("scores", "percentage points")
    parts = [f"# {study.title}", verdict(results), _what_was_run(results)]
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
        *(mean_table(results, score) for score in titles),
        f"![{what} of each variant{' over the batch' if several else ''}]({first_figure(study)})",
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
        found = {title: differences(results, pair, score) for score, title in titles.items()}
        names = " - ".join(map(display_name, pair))
        rows = {name: {names: name} for name in next(iter(found.values()))}
        for title, intervals in found.items():
            for name, interval in intervals.items():
                rows[name][title] = str(interval or UNDEFINED)
        parts.append(markdown_table([*rows.values()]))
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
            problems.append(f"the search for {display_name(variant)} at {images(batch)} {why}")
    return problems


def mean_table(results: StudyResults, score: str) -> str:
    """Mean ± standard deviation (number of seeds): a row per variant, a column per batch."""
    study, values = results.study, samples(results, score)

    def cell(some: list[float]) -> str:
        if not some:
            return UNDEFINED
        deviation = f" ± {np.std(some, ddof=1):.2f}" if len(some) > 1 else ""
        return f"{np.mean(some):.2f}{deviation} ({len(some)})"

    return markdown_table(
        [
            {study.scores[score]: display_name(name)}
            | {images(batch): cell(values[name, batch]) for batch in sorted(study.batches)}
            for name in study.variants
        ]
    )


def run_table(results: StudyResults) -> str:
    """A row per run: state, scores, effort and notes."""
    study, rows = results.study, []
    titles = titles_of(study, results.runs)
    for result in results.runs:
        run, record = result.run, result.record
        iterations, seconds = effort(record.rows if record else [])
        per_image = seconds / (iterations * run.batch) if iterations and seconds else None
        memory = record.run_record.get("peak_memory_bytes") if record else None
        total = run.settings.get("SOLVER.MAX_ITER")
        rows.append(
            {
                "run": run.name,
                "state": result.status,
                **_shown_scores(result, titles),
                **({"LR": f"{run.settings['SOLVER.BASE_LR']:.4g}"} if study.detectors else {}),
                "iterations": f"{iterations or 0}" + (f" / {total}" if total else ""),
                "training time": duration(seconds),
                "wall time": duration(record.seconds if record else None),
                "s per image": format_metric(per_image, 3),
                "peak memory": f"{memory / 2**20:,.0f} MiB" if memory else UNDEFINED,
                "notes": _plain("; ".join(result.notes)),
            }
        )
    return markdown_table(rows)


def _shown_scores(result: RunResult, titles: Mapping[str, str]) -> dict[str, str]:
    return {title: format_metric(result.scores.get(key)) for key, title in titles.items()}


def _search_section(results: StudyResults, search: Search) -> list[str]:
    study, titles = results.study, titles_of(results.study, results.search)
    variants = [*study.variants]

    def position(result: RunResult) -> tuple[Any, ...]:
        """Variants in the order of the study, numbers ascending."""
        values = result.run.choice.values()
        numbers = (v if isinstance(v, (int, float)) else 0 for v in values)
        return (variants.index(result.run.variant), result.run.batch, *numbers)

    rows = []
    for result in sorted(results.search, key=position):
        run, failed = result.run, result.status in (DIVERGED, FAILED)
        reached = result.status if failed else format_metric(result.mean)
        chosen = results.choices[run.variant, run.batch] == run.choice
        rows.append(
            {
                "variant": display_name(run.variant),
                study.unit: str(run.batch),
                **{f"`{key}`": str(value) for key, value in run.choice.items()},
                **_shown_scores(result, titles),
                "mean": f"**{reached}**" if chosen else reached,
            }
        )
    parts = [
        "## Search",
        f"Each variant got the same {len(results.search) // len(study.variants)} runs of "
        f"{search.images:,} images (seed {search.seed}); values are at the reference "
        "batch of the variant's config. **Bold**: chosen, by the mean of box and mask AP. A run "
        "takes what was found at the nearest searched batch.",
        markdown_table(rows),
    ]
    edges = [
        f"{display_name(variant)} at {batch}: {', '.join(f'`{key}`' for key in keys)}"
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
            variants.setdefault(display_name(run.variant), run.settings)
        if run.variant == variant:
            batches.setdefault(str(run.batch), run.settings)
    parts = [f"## Where the {'configs' if results.study.detectors else 'settings'} differ"]
    for title, some in (
        (f"Between variants, at {images(batch)}:", variants),
        (f"Between batches, for {display_name(variant)}:", batches),
    ):
        keys = differing_keys([*some.values()], ("OUTPUT_DIR", "SEED", "seed"))
        parts += [title, settings_table(some, keys)] if keys else [f"{title} nowhere."]
    return parts


def _what_was_run(results: StudyResults) -> str:
    study = results.study
    unit = study.unit if set(study.batches) != {1} else study.unit.replace("images", "image")
    text = (
        f"{len(study.variants)} variants ({', '.join(map(display_name, study.variants))}) at "
        f"{', '.join(map(str, sorted(study.batches)))} {unit}"
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


def as_page(title: str, text: str, figures: Mapping[str, str]) -> str:
    """Converts the report to an HTML page with its figures inside; contents follow the verdict.

    Args:
        title: title of the page.
        text: Markdown, with tables as on GitHub.
        figures: file name in the text -> as returned by `page_figure`.
    """
    import markdown

    def picture(match: re.Match) -> str:
        return f'<span role="img" aria-label={match[1]}>{figures[match[2]]}</span>'

    head, verdict, *rest = text.split("\n\n", 2)
    contents = "\n\n".join([head, verdict, "[TOC]", *rest])
    toc = {"toc": {"toc_depth": "2-2"}}
    body = markdown.markdown(contents, extensions=["tables", "toc"], extension_configs=toc)
    body = re.sub(r'<img alt=("[^"]*") src="([^":]+\.png)"[^>]*>', picture, body)
    return PAGE.format(title=html.escape(title), body=body, dark=DARK)


def _plain(text: str) -> str:
    """Text of a log with HTML escaped."""
    return html.escape(text, quote=False)
