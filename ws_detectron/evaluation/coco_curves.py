"""Curves of an evaluation as tables and figures, and those of several runs over each other.

- `precision_recall`: COCO's precision, interpolated at 101 recalls, at the IoU thresholds 0.50 and
  0.75 and averaged over all ten; of each category at 0.50. Its mean over recalls is AP.
- `f1_over_confidence`: F1 = 2 TP / (predictions + objects) of predictions with at least a score,
  matched by category at IoU 0.5 by COCO's rules; for all categories of their summed counts.
- `confusion_matrix`: annotated against predicted category at the score with the best F1. After
  the matches by category, what is left is matched whatever its category; what then is left is
  background. So the diagonal holds the true positives.
- `ap_by_group`: AP of small, medium and large objects, and of images with few and many objects.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools.coco import COCO

from ws_detectron.utils.command_line import progress
from ws_detectron.utils.io import csv_text, write_text, writing

from .coco_eval import TASKS, CocoResult, Entry, NumberedSet, coco_metrics
from .coco_report import TITLES, format_metric
from .figure_style import (
    DASHES,
    OTHERS,
    add_grid,
    add_title,
    as_label,
    finish_figure,
    same_limits,
    write_figure,
)
from .image_errors import FOREGROUND, greedy_matches, pair_ious, same_class

Row = dict[str, Any]
Tables = dict[str, list[Row]]  # name of a file, without suffix -> its rows

TABLES = ("precision_recall", "f1_over_confidence", "confusion_matrix", "ap_by_group")
COMPARED = ("precision_recall", "f1_over_confidence", "ap_by_group")
FILES = [f"{name}.{suffix}" for name in TABLES for suffix in ("csv", "png")]
ALL, BACKGROUND = "(all)", "(background)"  # instead of a category; brackets, as names may be both
IOUS = {"0.5": 0, "0.75": 5}  # of COCO's ten thresholds
MEAN = "mean of ten IoUs"
SCORES = np.linspace(0, 1, 101)
SIZES = {"small": ("APs", 0, 32**2), "medium": ("APm", 32**2, 96**2), "large": ("APl", 96**2, 1e10)}
COUNTS = {"1": (1, 1), "2 to 3": (2, 3), "4 to 7": (4, 7), "8 to 15": (8, 15), "16 +": (16, 10**9)}
GROUPS = {"size": "objects", "objects per image": "images"}  # and what is counted
MANY = 10  # more categories than this have no legend
NUMBERS = ("recall", "precision", "score", "f1", "count", "percent", "images", "objects", "AP")
MATRIX = 20  # categories in the figure of the confusion matrix


class _ImageMatches(NamedTuple):
    """The predictions of an image, highest score first, and its objects except crowds."""

    scores: np.ndarray  # (D,)
    predicted: np.ndarray  # (D,) numbers of categories, from 0
    annotated: np.ndarray  # (G,) numbers of categories
    ious: np.ndarray  # (D, G)
    matched: np.ndarray  # (D,) an object of the same category, or -1
    ignored: np.ndarray  # (D,) bool, unmatched and on a crowd of the category


def curve_tables(
    annotations: dict[str, Any], predictions: Sequence[Entry], result: CocoResult
) -> Tables:
    """The tables of an evaluation; precision, recall, F1 and AP in %, None where undefined.

    Args:
        annotations: those of `result`.
        predictions: those of `result`.
        result: as returned by `evaluate`.
    """
    tables: Tables = {name: [] for name in TABLES}
    count = Counter(category.name for category in result.categories)
    names = [c.name if count[c.name] == 1 else f"{c.name} ({c.id})" for c in result.categories]
    for task in result.metrics:
        tables["precision_recall"] += _precision_recall(task, names, result.precision[task])
        images = _match(annotations, predictions, task)
        rows, best = _f1(task, names, images)
        tables["f1_over_confidence"] += rows
        tables["confusion_matrix"] += _confusions(task, names, images, best)
        tables["ap_by_group"] += _by_group(task, annotations, predictions, result)
    return tables


def write_curves(tables: Tables, folder: Path, title: str = "") -> list[Path]:
    """Writes each table as CSV and as PNG.

    Args:
        tables: as returned by `curve_tables`.
        folder: created if missing.
        title: names data and model in the figures.

    Returns:
        The paths, in the order of `FILES`.

    Raises:
        UserError: a file cannot be written.
    """
    draw = {
        "precision_recall": draw_precision_recall,
        "f1_over_confidence": draw_f1,
        "confusion_matrix": draw_confusions,
        "ap_by_group": draw_by_group,
    }
    paths = []
    for name, rows in tables.items():
        header = list(rows[0]) if rows else []
        path = folder / f"{name}.csv"
        write_text(path, csv_text([header, *([*row.values()] for row in rows)]))
        with writing(folder):
            paths += [path, write_figure(draw[name](rows, title), folder / f"{name}.png")]
    return paths


def read_curves(folder: Path) -> Tables:
    """The tables that `write_curves` wrote into a folder; those that are missing are empty."""
    tables: Tables = {}
    for name in TABLES:
        path = folder / f"{name}.csv"
        text = path.read_text("utf-8").splitlines() if path.is_file() else []
        tables[name] = [
            {k: (float(v) if v else None) if k in NUMBERS else v for k, v in row.items()}
            for row in csv.DictReader(text)
        ]
    return tables


def best_threshold(rows: Sequence[Row], task: str) -> Optional[Row]:
    """The row of `f1_over_confidence` with the highest F1 of all categories; None without one.

    Of equal ones the lowest score.
    """
    found = [row for row in _of(rows, task=task, category=ALL) if row["f1"]]
    return max(found, key=lambda row: row["f1"], default=None)


def best_text(tables: Tables) -> str:
    """The best F1 of each task and where it is, a line each."""
    rows = tables["f1_over_confidence"]
    best = {task: best_threshold(rows, task) for task in _tasks(rows)}
    return "\n".join(
        f"best {TITLES[task]} F1 {row['f1']:.2f} % with a score of {row['score']:g} and more"
        for task, row in best.items()
        if row
    )


def _precision_recall(task: str, names: Sequence[str], precision: np.ndarray) -> list[Row]:
    """Args: `precision` of COCOeval, (T, R, K), -1 where a category has no object."""
    defined = (precision >= 0).all(axis=(0, 1))
    if not defined.any():
        return []
    over_all = precision[:, :, defined].mean(axis=2)
    curves = [(ALL, iou, over_all[number]) for iou, number in IOUS.items()]
    curves.append((ALL, MEAN, over_all.mean(axis=0)))
    curves += [(names[k], "0.5", precision[0, :, k]) for k in np.flatnonzero(defined).tolist()]
    return [
        {"task": task, "category": name, "iou": iou, "recall": float(r), "precision": 100 * p}
        for name, iou, curve in curves
        for r, p in zip(range(101), curve.tolist())
    ]


def _match(
    annotations: dict[str, Any], predictions: Sequence[Entry], task: str
) -> list[_ImageMatches]:
    numbered = NumberedSet(annotations, masks=task == "segm", coco_class=COCO)
    found, truth = numbered.results(predictions, task).imgToAnns, numbered.truth.imgToAnns
    images = []
    numbers = range(1, len(numbered.image_ids) + 1)
    for number in progress(numbers, f"matching {TITLES[task]} predictions", "image"):
        ranked = sorted(found[number], key=lambda entry: -entry["score"])
        crowds = [a for a in truth[number] if a.get("iscrowd")]
        single = [a for a in truth[number] if not a.get("iscrowd")]
        ious = pair_ious(ranked, single, task)
        matched = greedy_matches(np.where(same_class(ranked, single), ious, 0))
        on_crowd = (pair_ious(ranked, crowds, task) >= FOREGROUND) & same_class(ranked, crowds)
        images.append(
            _ImageMatches(
                np.array([entry["score"] for entry in ranked], dtype=float),
                np.array([entry["category_id"] - 1 for entry in ranked], dtype=int),
                np.array([entry["category_id"] - 1 for entry in single], dtype=int),
                ious,
                matched,
                on_crowd.any(axis=1) & (matched < 0),
            )
        )
    return images


def _f1(
    task: str, names: Sequence[str], images: Sequence[_ImageMatches]
) -> tuple[list[Row], Optional[float]]:
    """Rows of `f1_over_confidence`, and the score with the best F1."""
    annotated = np.concatenate([np.zeros(0, int), *(image.annotated for image in images)])
    kept = [
        np.stack([image.predicted, image.scores, image.matched >= 0])[:, ~image.ignored]
        for image in images
    ]
    predicted, scores, true = np.hstack([np.zeros((3, 0)), *kept])
    rows = []
    groups = [(-1, ALL), *enumerate(names)]
    for number, name in progress(groups, f"F1 of {TITLES[task]} predictions", "category"):
        objects = int((annotated == number).sum()) if number >= 0 else len(annotated)
        own = predicted == number if number >= 0 else np.ones(len(predicted), bool)
        if not objects:
            continue
        for score in SCORES.tolist():
            chosen = own & (scores >= score)
            found, hits = int(chosen.sum()), int(true[chosen].sum())
            row = {"task": task, "category": name, "score": round(score, 2)}
            row["precision"] = 100 * hits / found if found else None
            rows.append(
                {**row, "recall": 100 * hits / objects, "f1": 200 * hits / (found + objects)}
            )
    best = best_threshold(rows, task)
    return rows, best["score"] if best else None


def _confusions(
    task: str, names: Sequence[str], images: Sequence[_ImageMatches], score: Optional[float]
) -> list[Row]:
    """Rows of `confusion_matrix`, without pairs that never occur."""
    pairs: Counter[tuple[int, int]] = Counter()  # len(names) is background
    background = len(names)
    for image in progress(images, f"confusions of {TITLES[task]} predictions", "image"):
        chosen = ~image.ignored & (image.scores >= (np.inf if score is None else score))
        matched = np.where(chosen, image.matched, -1)
        rest = np.flatnonzero(chosen & (matched < 0))
        free = np.setdiff1d(np.arange(len(image.annotated)), matched)
        others = greedy_matches(image.ious[np.ix_(rest, free)])
        matched[rest[others >= 0]] = free[others[others >= 0]]
        for n in np.flatnonzero(chosen):
            object_ = matched[n]
            true = int(image.annotated[object_]) if object_ >= 0 else background
            pairs[true, int(image.predicted[n])] += 1
        for object_ in np.setdiff1d(np.arange(len(image.annotated)), matched):
            pairs[int(image.annotated[object_]), background] += 1
    totals: Counter[int] = Counter()
    for (true, _), count in pairs.items():
        totals[true] += count
    labels = [*names, BACKGROUND]
    return [
        {
            "task": task,
            "score": score,
            "annotated": labels[true],
            "predicted": labels[found],
            "count": count,
            "percent": 100 * count / totals[true],
        }
        for (true, found), count in sorted(pairs.items())
    ]


def _by_group(
    task: str, annotations: dict[str, Any], predictions: Sequence[Entry], result: CocoResult
) -> list[Row]:
    single = [a for a in annotations["annotations"] if not a.get("iscrowd")]
    rows = []
    for name, (metric, low, high) in SIZES.items():
        some = [a for a in single if low <= a["area"] <= high]
        value = result.metrics[task][metric]
        seen = len({a["image_id"] for a in some})
        rows.append(("size", name, seen, len(some), value))
    per_image = Counter(a["image_id"] for a in single)
    groups = progress(COUNTS.items(), f"{TITLES[task]} AP by objects per image", "group")
    for name, (low, high) in groups:
        ids = {image_id for image_id, count in per_image.items() if low <= count <= high}
        value = None
        if ids:
            part = {**annotations}
            part["images"] = [image for image in annotations["images"] if image["id"] in ids]
            part["annotations"] = [a for a in annotations["annotations"] if a["image_id"] in ids]
            found = [entry for entry in predictions if entry["image_id"] in ids]
            slow = result.backend.startswith("pycocotools")
            value = coco_metrics(part, found, [task], reference=slow).metrics[task]["AP"]
        rows.append(("objects per image", name, len(ids), sum(per_image[i] for i in ids), value))
    keys = ("group", "value", "images", "objects", "AP")
    return [{"task": task, **dict(zip(keys, row))} for row in rows]


def draw_precision_recall(rows: Sequence[Row], title: str = "") -> Figure:
    """All categories at several IoUs (above) and each category at IoU 0.5; a column per task."""
    tasks = _tasks(rows)
    figure, grid = _grid(2, len(tasks), 3.4)
    for task, upper, lower in zip(tasks, *grid):
        for number, iou in enumerate((*IOUS, MEAN)):
            curve = _of(rows, task=task, category=ALL, iou=iou)
            mean = f"{np.mean([row['precision'] for row in curve]):.1f}" if curve else ""
            text = f"IoU {iou}" if iou in IOUS else iou
            style = {"color": OTHERS[number].colour, "linestyle": DASHES[number]}
            _line(upper, curve, "recall", "precision", label=f"{text}: AP {mean}", **style)
        categories = [row["category"] for row in _of(rows, task=task, iou="0.5", recall=0)][1:]
        _draw_categories(
            lower, rows, categories, {"task": task, "iou": "0.5"}, ("recall", "precision"), "AP50"
        )
        for panel, what in ((upper, "all categories"), (lower, "each category, IoU 0.5")):
            panel.set_title(f"{TITLES[task]}, {what}", fontsize="medium")
            _percent_axes(panel, "recall (%)", "precision (%)")
            if panel.lines:
                panel.legend(loc="lower left", fontsize="small")
    finish_figure(figure, [], title)
    return figure


def draw_f1(rows: Sequence[Row], title: str = "") -> Figure:
    """F1 of all categories and of each, over the confidence threshold; a panel per task."""
    tasks = _tasks(rows)
    figure, grid = _grid(1, len(tasks), 3.6)
    for task, panel in zip(tasks, grid[0]):
        categories = [row["category"] for row in _of(rows, task=task, score=0)][1:]
        _draw_categories(panel, rows, categories, {"task": task}, ("score", "f1"), "")
        best = best_threshold(rows, task)
        text = f": best {best['f1']:.1f} at {best['score']:g}" if best else ""
        curve = _of(rows, task=task, category=ALL)
        style = {"color": "black", "linewidth": 2.5}
        _line(panel, curve, "score", "f1", label=f"all together{text}", **style)
        if best:
            panel.axvline(best["score"], color=style["color"], linewidth=1, linestyle=":")
        panel.set_title(f"{TITLES[task]}, IoU 0.5", fontsize="medium")
        _percent_axes(panel, "confidence threshold", "F1 (%)")
        panel.set_xlim(0, 1)
        if panel.lines:
            panel.legend(loc="lower left", fontsize="small")
    finish_figure(figure, [], title)
    return figure


def draw_confusions(rows: Sequence[Row], title: str = "") -> Figure:
    """The matrix of the last task, in % of each annotated category; of the most frequent ones.

    The row of the background has the false predictions that are on no object.
    """
    task = [*_tasks(rows)][-1]
    rows = _of(rows, task=task)
    objects: Counter[str] = Counter()
    for row in rows:
        objects[row["annotated"]] += row["count"]
    frequent = [name for name, _ in objects.most_common() if name != BACKGROUND][:MATRIX]
    seen = dict.fromkeys(row[key] for key in ("annotated", "predicted") for row in rows)
    names = [name for name in seen if name in frequent]
    others = [name for name in seen if name not in names and name != BACKGROUND]
    labels = [*names, *(["other"] if others else []), BACKGROUND]
    place = {**dict.fromkeys(others, len(names)), **{n: i for i, n in enumerate(labels)}}
    counts = np.zeros((len(labels), len(labels)))
    for row in rows:
        counts[place[row["annotated"]], place[row["predicted"]]] += row["count"]
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4.5, 1.5 + 0.36 * len(labels))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    panel = figure.subplots()
    picture = panel.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for true, found in np.argwhere(percent >= 0.5):
        value = percent[true, found]
        colour = "white" if value > 55 else "black"
        panel.text(found, true, f"{value:.0f}", ha="center", va="center", size=8, color=colour)
    texts = [as_label(label) for label in labels]
    panel.set_xticks(range(len(labels)), texts, rotation=90)
    panel.set_yticks(range(len(labels)), texts)
    panel.set_xlabel("predicted")
    panel.set_ylabel("annotated")
    figure.colorbar(picture, label="% of the row", shrink=0.8)
    score = rows[0]["score"] if rows else None
    above = "no predictions" if score is None else f"score ≥ {100 * score:g} %, the best F1"
    add_title(figure, f"{title}\n{TITLES[task]}, IoU 0.5, {above}".strip())
    return figure


def draw_runs(
    name: str, runs: Mapping[str, Sequence[Row]], styles: Sequence[Row], title: str
) -> Figure:
    """A table of several runs over each other: a row of panels per task.

    Args:
        name: one of `COMPARED`.
        runs: name of a run -> its rows of that table.
        styles: arguments of `plot` for each run.
        title: of the figure.
    """
    tasks = [t for t in TASKS if any(_of(rows, task=t) for rows in runs.values())] or TASKS[:1]
    if name == "precision_recall":
        columns = [{"iou": iou} for iou in (*IOUS, MEAN)]
        x, y, labels = "recall", "precision", ("recall (%)", "precision (%)")
    elif name == "f1_over_confidence":
        columns, x, y, labels = [{}], "score", "f1", ("confidence threshold", "F1 (%)")
    else:
        columns = [{"group": group} for group in GROUPS]
        x, y, labels = "value", "AP", ("", "AP (%)")
    figure, grid = _grid(len(tasks), len(columns), 3.2, 3.4)
    for task, line in zip(tasks, grid):
        for panel, column in zip(line, columns):
            where = {**column, **({} if "group" in column else {"category": ALL})}
            for rows, style in zip(runs.values(), styles):
                look = {**style, "markevery": 20} if name != "ap_by_group" else style
                _line(panel, _of(rows, task=task, **where), x, y, **look)
            of = [f"IoU {v}" if v in IOUS else v for v in column.values()]
            panel.set_title(", ".join([TITLES[task], *of]), fontsize="medium")
            if name != "ap_by_group":
                _percent_axes(panel, *labels)
                panel.set_xlim(0, 1 if x == "score" else 100)
            else:
                panel.set_ylabel(labels[1])
                panel.set_ylim(bottom=0)
    if name == "ap_by_group":
        same_limits([*grid.flat])
    finish_figure(figure, [*grid.flat], title)
    return figure


def draw_by_group(rows: Sequence[Row], title: str = "") -> Figure:
    """AP by size of the objects, and by their number in an image; bars for each task."""
    figure, grid = _grid(1, 2, 3.4)
    tasks = _tasks(rows)
    width = 0.8 / len(tasks)
    for panel, (group, unit) in zip(grid[0], GROUPS.items()):
        for number, task in enumerate(tasks):
            some = _of(rows, task=task, group=group)
            places = np.arange(len(some)) + (number - (len(tasks) - 1) / 2) * width
            heights = [row["AP"] or 0 for row in some]
            style = {"label": TITLES[task], "color": OTHERS[number].colour}
            bars = panel.bar(places, heights, width, **style)
            texts = [format_metric(row["AP"], 0) for row in some]
            panel.bar_label(bars, texts, padding=2, fontsize=8)
            ticks = [f"{row['value']}\n{row[unit]:,.0f}" for row in some]
            panel.set_xticks(range(len(some)), ticks)
        panel.set_xlabel(f"{'object size' if group == 'size' else group}; number of {unit}")
        panel.set_ylabel("AP (%)")
        panel.margins(y=0.12)
    same_limits([*grid[0]])
    finish_figure(figure, [*grid[0]], title)
    for panel in grid[0]:
        panel.grid(False, axis="x")
    return figure


def _draw_categories(
    panel: Axes,
    rows: Sequence[Row],
    categories: Sequence[str],
    where: Mapping[str, Any],
    axes: tuple[str, str],
    mean: str,
) -> None:
    """A line for each category, coloured and named if there are few.

    Args:
        panel: to draw on.
        rows: of a table.
        categories: to draw.
        where: further keys of the rows.
        axes: keys of x and y.
        mean: what the mean of y is, for the legend; empty to leave it out.
    """
    by_category: dict[str, list[Row]] = {name: [] for name in categories}
    for row in _of(rows, **where):
        if row["category"] in by_category:
            by_category[row["category"]].append(row)
    for number, (name, curve) in enumerate(by_category.items()):
        if len(categories) > MANY:
            style: dict[str, Any] = {"color": "0.5", "alpha": 0.35, "linewidth": 0.9}
            style["label"] = "_" if number else f"each of {len(categories)} categories"
        else:
            values = [row[axes[1]] for row in curve]
            text = f": {mean} {np.mean(values):.1f}" if mean else ""
            dashes = DASHES[number // len(OTHERS)]
            style = {"color": OTHERS[number % len(OTHERS)].colour, "linestyle": dashes}
            style.update(label=as_label(name) + text, linewidth=1.2)
        _line(panel, curve, *axes, **style)


def _line(panel: Axes, rows: Sequence[Row], x: str, y: str, **style: Any) -> None:
    shown = [row for row in rows if row[y] is not None]
    if shown:
        panel.plot([row[x] for row in shown], [row[y] for row in shown], **style)


def _percent_axes(panel: Axes, x: str, y: str) -> None:
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.set_xlim(0, 100)
    panel.set_ylim(0, 102)
    add_grid(panel)


def _grid(rows: int, columns: int, height: float, width: float = 4.6) -> tuple[Figure, np.ndarray]:
    figsize = (max(5.0, width * columns), 0.6 + height * rows)
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _tasks(rows: Sequence[Row]) -> list[str]:
    """The tasks of a table; boxes if it is empty."""
    return [*dict.fromkeys(row["task"] for row in rows)] or [TASKS[0]]


def _of(rows: Sequence[Row], **where: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in where.items())]
