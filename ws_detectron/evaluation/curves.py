"""Learning curves and AP curves of several runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from .coco_curves import COMPARED, draw_runs, read_curves
from .coco_eval import TASKS
from .coco_report import TITLES
from .figure_style import finish_figure, line_styles, norm_of_config, same_limits, split_name
from .runs import Run, ap_key, series, training_seconds

MODELS = {"PanopticFPN": "Panoptic FPN", "WSRetinaNet": "RetinaNet"}


def styles_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The style of each run, the same in every figure; its config says its normalization."""
    norms = [norm_of_config(run.config) or split_name(run.name)[0] for run in runs]
    return line_styles([run.name for run in runs], norms)


def model_name(config: Mapping[str, Any]) -> str:
    """For example "R-50 Mask R-CNN".

    Args:
        config: full config key -> value.
    """
    name = config.get("MODEL.META_ARCHITECTURE", "")
    if name == "GeneralizedRCNN":
        name = f"{'Mask' if config.get('MODEL.MASK_ON') else 'Faster'} R-CNN"
    resnet = "resnet" in config.get("MODEL.BACKBONE.NAME", "")
    depth = f"R-{config.get('MODEL.RESNETS.DEPTH')} " if resnet else ""
    return depth + MODELS.get(name, name)


def title_of(runs: Sequence[Run], data_key: str = "DATASETS.TEST") -> str:
    """Model and data of runs, as far as their configs agree: "R-50 Mask R-CNN, coco_2017_val"."""
    configs = [run.config for run in runs if run.config]
    models = {model_name(config) for config in configs}
    data = {"+".join(config.get(data_key, ())) for config in configs}
    return ", ".join(some.pop() for some in (models, data) if len(some) == 1)


def draw_learning_curves(runs: Sequence[Run]) -> Figure:
    """Total loss over iterations (left) and over training time (right)."""
    title = "total loss (median of 20 iterations)"
    return _draw(runs, {title: ["total_loss"] * len(runs)}, "DATASETS.TRAIN", markers=8)


def draw_ap_curves(runs: Sequence[Run]) -> Figure:
    """Box AP (above) and mask AP over iterations (left) and over training time (right)."""
    keys = {task: [ap_key(run, task) for run in runs] for task in TASKS}
    drawn = [t for t in TASKS if any(series(r.rows, k)[0] for r, k in zip(runs, keys[t]))]
    rows = {f"{TITLES[task]} AP (%)": keys[task] for task in drawn or TASKS[:1]}
    return _draw(runs, rows, "DATASETS.TEST")


def draw_evaluations(runs: Sequence[Run]) -> dict[str, Figure]:
    """File name -> figure of what tools/evaluate_coco.py wrote, runs over each other.

    Empty if no run has such files.
    """
    tables = {run.name: read_curves(run.evaluation) for run in runs if run.evaluation}
    styles = [style for style, run in zip(styles_of(runs), runs) if run.evaluation]
    figures = {}
    for name in COMPARED:
        rows = {run: found[name] for run, found in tables.items()}
        if any(rows.values()):
            figures[f"{name}.png"] = draw_runs(name, rows, styles, title_of(runs))
    return figures


def _draw(
    runs: Sequence[Run], rows: Mapping[str, Sequence[str]], data_key: str, markers: int = 0
) -> Figure:
    """Draws metrics over iterations and over training time.

    Args:
        runs: runs without a metric are skipped there.
        rows: title -> name of the metric in each run; a row of panels each, with equal axes.
        data_key: the config key of the data that the title names.
        markers: approximate number of markers along a line; 0: one at each value.
    """
    figure = Figure(figsize=(10, 0.7 + 3.5 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False)
    unit, divisor = _time_unit(runs)
    styles = styles_of(runs)
    for (left, right), (title, keys) in zip(panels, rows.items()):
        for number, (run, key) in enumerate(zip(runs, keys)):
            iterations, values = series(run.rows, key)
            if not iterations:
                continue
            style = {**styles[number], "clip_on": False}  # an AP of 0 shows its whole marker
            if markers:
                # markers of different runs are shifted, as their curves may overlap
                step = max(1, len(values) // markers)
                style["markevery"] = (number * step // len(runs), step)
            left.plot([i + 1 for i in iterations], values, **style)
            seconds = training_seconds(run.rows, iterations)
            if len(seconds):
                right.plot(seconds / divisor, values, **style)
        left.set_ylabel(title)
        left.set_xlabel("iteration")
        right.set_xlabel(f"training time ({unit})")
        for panel in (left, right):
            panel.set_xlim(left=0)
            panel.set_ylim(bottom=0)
            if not left.lines:
                panel.text(0.5, 0.5, "no values", transform=panel.transAxes, ha="center")
    same_limits([*panels.flat])
    for column in panels.T:
        same_limits([*column], "x")
    finish_figure(figure, panels.flat, title_of(runs, data_key))
    return figure


def _time_unit(runs: Sequence[Run]) -> tuple[str, float]:
    """Name and seconds of the largest unit of which the longest run takes at least two."""
    ends = [training_seconds(run.rows, [run.rows[-1]["iteration"]]) for run in runs if run.rows]
    longest = max((float(end[0]) for end in ends if len(end)), default=0.0)
    for unit, seconds in (("h", 3600.0), ("min", 60.0)):
        if longest >= 2 * seconds:
            return unit, seconds
    return "s", 1.0
