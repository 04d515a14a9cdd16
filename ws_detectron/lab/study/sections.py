"""Sections of a report: what a search found, and where the configs differ."""

from collections.abc import Callable, Sequence
from typing import Any

from ws_detectron.evaluation.coco_report import TITLES, format_metric
from ws_detectron.evaluation.comparison import differing_keys
from ws_detectron.evaluation.runs import Run

from .blocks import Block, Heading, Table, Text
from .choice import at_the_edge, choose, score
from .results import CellResult, StudyResults, tasks_of
from .tables import images

# Where two cells of one study differ without that being a setting of the arm
NOT_SETTINGS = {"OUTPUT_DIR", "SEED"}


def search_blocks(results: StudyResults) -> list[Block]:
    study = results.study
    assert study.search is not None
    keys = tuple(study.search.grid)
    tasks = tasks_of(results.search)
    choices = choose(study, results.search)
    rows = []
    for result in _searched_in_order(results):
        chosen = choices[result.cell.arm, result.cell.batch] == result.cell.choice
        reached = "failed" if result.word == "failed" else format_metric(score(result))
        rows.append(
            (
                result.cell.arm,
                str(result.cell.batch),
                *(str(result.cell.choice[key]) for key in keys),
                *(format_metric(result.ap.get(task)) for task in tasks),
                f"**{reached}**" if chosen else reached,
            )
        )
    headers = ("arm", study.unit, *(f"`{k}`" for k in keys))
    headers += (*(f"{TITLES[task]} AP" for task in tasks), "mean")
    edges = [
        f"{arm} at {batch}: {', '.join(f'`{key}`' for key in at_the_edge(study, choice))}"
        for (arm, batch), choice in choices.items()
        if choice is not None and at_the_edge(study, choice)
    ]
    blocks: list[Block] = [
        Heading("Search"),
        Text(
            f"Each arm got the same {len(results.search) // len(study.arms)} runs of "
            f"{study.search.images:,} images (seed {study.search.seed}); values are at the "
            "reference batch of the arm's config. **Bold**: chosen, by the mean of box and mask "
            "AP. A cell takes what was found at the nearest searched batch."
        ),
        Table(headers, tuple(rows)),
    ]
    if edges:
        blocks.append(
            Text(f"Chosen at the edge of the grid, so the best may lie beyond: {'; '.join(edges)}.")
        )
    return blocks


def _searched_in_order(results: StudyResults) -> list[CellResult]:
    """Arms as the study lists them, and numbers upwards, in whatever order the grid has them."""
    arms = [arm.name for arm in results.study.arms]

    def place(result: CellResult) -> tuple[Any, ...]:
        values = result.cell.choice.values()
        numbers = (v if isinstance(v, (int, float)) else 0 for v in values)
        return (arms.index(result.cell.arm), result.cell.batch, *numbers)

    return sorted(results.search, key=place)


def settings_blocks(results: StudyResults) -> list[Block]:
    """Config keys that differ between arms at one batch, and between batches of one arm."""
    cells = results.cells
    blocks: list[Block] = [Heading("Where the configs differ")]
    batch = max(results.study.batches)
    arms = _first_of(cells, lambda r: r.cell.arm, lambda r: r.cell.batch == batch)
    arm = results.study.arms[0].name
    batches = _first_of(cells, lambda r: str(r.cell.batch), lambda r: r.cell.arm == arm)
    blocks += _settings_table(f"Between arms, at {images(batch)}:", arms)
    blocks += _settings_table(f"Between batches, for {arm}:", batches)
    return blocks


def _first_of(
    results: Sequence[CellResult],
    name: Callable[[CellResult], str],
    wanted: Callable[[CellResult], bool],
) -> list[Run]:
    """The first cell of each name as a run with the config that it has or would have."""
    found: dict[str, Run] = {}
    for result in results:
        if wanted(result):
            run = Run(name(result), result.cell.folder, config=result.cell.settings)
            found.setdefault(name(result), run)
    return [*found.values()]


def _settings_table(title: str, runs: Sequence[Run]) -> list[Block]:
    keys = [key for key in differing_keys(runs) if key not in NOT_SETTINGS]
    if not keys:
        return [Text(f"{title} nowhere.")]
    rows = tuple((f"`{key}`", *(f"`{run.config.get(key)}`" for run in runs)) for key in keys)
    return [Text(title), Table(("key", *(run.name for run in runs)), rows)]
