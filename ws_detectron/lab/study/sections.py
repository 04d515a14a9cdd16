"""Sections of a report: what a search found, and where the configs differ."""

from collections.abc import Callable, Sequence
from typing import Any

from ws_detectron.evaluation.coco_report import TITLES, figure
from ws_detectron.evaluation.comparison import differing_keys
from ws_detectron.evaluation.runs import Run

from .blocks import Block, Heading, Table, Text
from .choice import at_the_edge, choose, score
from .results import RunResult, StudyResults, tasks_of
from .tables import images

# Where two runs of one study differ without that being a setting of the variant
NOT_SETTINGS = {"OUTPUT_DIR", "SEED"}


def search_blocks(results: StudyResults) -> list[Block]:
    study = results.study
    assert study.search is not None
    keys = tuple(study.search.grid)
    tasks = tasks_of(results.search)
    choices = choose(study, results.search)
    rows = []
    for result in _searched_in_order(results):
        chosen = choices[result.run.variant, result.run.batch] == result.run.choice
        reached = "failed" if result.word == "failed" else figure(score(result))
        rows.append(
            (
                result.run.variant,
                str(result.run.batch),
                *(str(result.run.choice[key]) for key in keys),
                *(figure(result.ap.get(task)) for task in tasks),
                f"**{reached}**" if chosen else reached,
            )
        )
    headers = ("variant", study.unit, *(f"`{k}`" for k in keys))
    headers += (*(f"{TITLES[task]} AP" for task in tasks), "mean")
    edges = [
        f"{variant} at {batch}: {', '.join(f'`{key}`' for key in at_the_edge(study, choice))}"
        for (variant, batch), choice in choices.items()
        if choice is not None and at_the_edge(study, choice)
    ]
    blocks: list[Block] = [
        Heading("Search"),
        Text(
            f"Each variant got the same {len(results.search) // len(study.variants)} runs of "
            f"{study.search.images:,} images (seed {study.search.seed}); values are at the "
            "reference batch of the variant's config. **Bold**: chosen, by the mean of box and "
            "mask AP. A run takes what was found at the nearest searched batch."
        ),
        Table(headers, tuple(rows)),
    ]
    if edges:
        blocks.append(
            Text(f"Chosen at the edge of the grid, so the best may lie beyond: {'; '.join(edges)}.")
        )
    return blocks


def _searched_in_order(results: StudyResults) -> list[RunResult]:
    """Variants as the study lists them, and numbers upwards, however the grid orders them."""
    variants = [variant.name for variant in results.study.variants]

    def place(result: RunResult) -> tuple[Any, ...]:
        values = result.run.choice.values()
        numbers = (v if isinstance(v, (int, float)) else 0 for v in values)
        return (variants.index(result.run.variant), result.run.batch, *numbers)

    return sorted(results.search, key=place)


def settings_blocks(results: StudyResults) -> list[Block]:
    """Config keys that differ between variants at one batch, and between batches of one variant."""
    runs = results.runs
    blocks: list[Block] = [Heading("Where the configs differ")]
    batch = max(results.study.batches)
    variants = _first_of(runs, lambda r: r.run.variant, lambda r: r.run.batch == batch)
    variant = results.study.variants[0].name
    batches = _first_of(runs, lambda r: str(r.run.batch), lambda r: r.run.variant == variant)
    blocks += _settings_table(f"Between variants, at {images(batch)}:", variants)
    blocks += _settings_table(f"Between batches, for {variant}:", batches)
    return blocks


def _first_of(
    results: Sequence[RunResult],
    name: Callable[[RunResult], str],
    wanted: Callable[[RunResult], bool],
) -> list[Run]:
    """The first run of each name as a run with the config that it has or would have."""
    found: dict[str, Run] = {}
    for result in results:
        if wanted(result):
            run = Run(name(result), result.run.folder, config=result.run.settings)
            found.setdefault(name(result), run)
    return [*found.values()]


def _settings_table(title: str, runs: Sequence[Run]) -> list[Block]:
    keys = [key for key in differing_keys(runs) if key not in NOT_SETTINGS]
    if not keys:
        return [Text(f"{title} nowhere.")]
    rows = tuple((f"`{key}`", *(f"`{run.config.get(key)}`" for run in runs)) for key in keys)
    return [Text(title), Table(("key", *(run.name for run in runs)), rows)]
