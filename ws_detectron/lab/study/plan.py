"""The runs of a study, each one training; those of detectors are matched by the linear rule."""

import itertools
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from detectron2.config import CfgNode

import ws_detectron
from ws_detectron.engine import as_flat_dict, load_config
from ws_detectron.engine.checks import (
    check_batch,
    check_datasets,
    check_registered,
    check_weights,
)
from ws_detectron.engine.prepare import find_config
from ws_detectron.engine.scaling import ITERATIONS, PERIODS, before_end, scale_to_batch
from ws_detectron.errors import ConfigError

from .study_file import AP, Search, Study, Values

Choices = Mapping[tuple[str, int], Optional[Values]]  # (variant, searched batch) -> what was found

# keys that the linear rule and the study set, in the order of a command
SCALED = (
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.REFERENCE_IMS_PER_BATCH",
    "SOLVER.REFERENCE_WORLD_SIZE",
    "SOLVER.BASE_LR",
    "SOLVER.STEPS",
    *ITERATIONS,
    *PERIODS,
)


@dataclass(frozen=True)
class StudyRun:
    """One training run."""

    name: str
    variant: str
    batch: int  # images per process and step
    seed: int
    folder: Path  # where it writes
    command: list[str]  # starts or resumes it
    settings: Values = field(repr=False)  # config key or option -> value; lists in place of tuples
    scores: list[str]  # metrics of a finished run
    processes: int
    device: str
    checkpoints: str  # which are kept, see `Study`
    images: Optional[int] = None  # that it sees; None for a command
    choice: Values = field(default_factory=dict)  # what a search tries or found, at the reference
    searching: bool = False  # whether it is a run of a search
    # merged, but for seed and folder; None for a command
    cfg: Optional[CfgNode] = field(default=None, repr=False, compare=False)


def study_runs(study: Study, choices: Choices) -> list[StudyRun]:
    """The runs of a study without its search, from the largest batch, which is fastest.

    Args:
        study: as returned by `read_study`.
        choices: as returned by `records.choose`, empty without a search; runs whose search found
            nothing are skipped.

    Raises:
        ConfigError: a config or override cannot work; names it.
    """
    runs: list[StudyRun] = []
    for batch, name in itertools.product(sorted(study.batches, reverse=True), study.variants):
        own = study.variants[name].runs
        seeds = own.get(batch, []) if own else study.seeds
        choice: Optional[Values] = {}
        if study.search and choices:
            choice = choices[name, nearest(batch, study.search.batches)]
        if seeds and choice is not None:
            first = _first_run(study, name, batch, choice)
            runs += [_with_seed(study, first, seed, "runs", f"seed{seed}") for seed in seeds]
    return sorted(runs, key=lambda run: study.seeds.index(run.seed))


def search_runs(study: Study) -> list[StudyRun]:
    """The runs of the search: every combination of the grid for every variant and searched batch.

    They are evaluated once, at the end.

    Raises:
        ConfigError: a config or override cannot work; names it.
    """
    search = study.search
    if search is None:
        return []
    overrides = {**study.overrides, **search.overrides}
    terms = replace(study, images=search.images, evaluations=1, overrides=overrides)
    return [
        _with_seed(
            terms, _first_run(terms, name, batch, choice), search.seed, "search", _label(choice)
        )
        for batch, name in itertools.product(sorted(search.batches, reverse=True), study.variants)
        for choice in _combinations(search)
    ]


def nearest(batch: int, batches: Sequence[int]) -> int:
    """The element of `batches` with the smallest ratio to `batch`; of two, the smaller."""
    return min(batches, key=lambda other: (max(batch / other, other / batch), other))


def check_runs(runs: Iterable[StudyRun]) -> None:
    """Checks all runs before the first is started.

    The device is not checked, as another machine may train the run.

    Raises:
        ConfigError: a run cannot work; names it and the reason.
    """
    for run in runs:
        if not Path(run.command[1]).is_file():
            raise ConfigError(f"`command`: there is no file {run.command[1]}")
        if run.cfg is None:
            continue
        try:
            check_weights(run.cfg)
            check_registered(run.cfg)
            check_datasets("DATASETS.TRAIN", run.cfg.DATASETS.TRAIN)
            check_datasets("DATASETS.TEST", run.cfg.DATASETS.TEST)
            check_batch(run.cfg, run.processes)
        except ConfigError as error:
            raise ConfigError(f"run {run.name}: {error}") from error


def _combinations(search: Search) -> list[Values]:
    return [dict(zip(search.grid, values)) for values in itertools.product(*search.grid.values())]


def _label(choice: Values) -> str:
    """A name from the values alone, so that a run keeps its folder when the grid grows."""
    ends = [key.rpartition(".")[2] for key in choice]
    keys = ends if len(set(ends)) == len(ends) else list(choice)
    return "_".join(
        f"{key}_{re.sub(r'[^A-Za-z0-9.+-]+', '-', str(value))}"
        for key, value in zip(keys, choice.values())
    )


def _with_seed(study: Study, run: StudyRun, seed: int, parent: str, label: str) -> StudyRun:
    """A run of `_first_run` with a seed, a folder and a name that ends in `label`."""
    name = f"{run.variant}_{run.batch}img_{label}"
    folder = study.output / parent / name
    if run.cfg is not None:
        own: Values = {"SEED": seed, "OUTPUT_DIR": str(folder)}
        arguments = as_arguments(own)
    else:
        own = {"seed": seed}
        arguments = _as_options({**own, "output": folder, "resume": True})
    return replace(
        run,
        name=f"search_{name}" if parent == "search" else name,
        seed=seed,
        folder=folder,
        command=[*run.command, *arguments],
        settings={**run.settings, **own},
        searching=parent == "search",
    )


def _first_run(study: Study, name: str, batch: int, choice: Values) -> StudyRun:
    """A run of a variant at a batch, without what `_with_seed` adds."""
    variant, script = study.variants[name], Path(study.command)
    if not script.is_file():
        script = Path(ws_detectron.__file__).parents[1] / script
    command = [sys.executable, str(script)]
    cfg, images, scores = None, None, [*study.scores]
    if study.detectors:
        overrides = {**study.overrides, **variant.overrides, **choice}
        reference, _ = scale_to_batch(load_config(variant.config, as_arguments(overrides)))
        images = study.images or reference.SOLVER.MAX_ITER * reference.SOLVER.IMS_PER_BATCH
        per_step = batch * study.processes
        if images % per_step:
            raise ConfigError(
                f"runs {name}_{batch}img: {images} images are not a whole number of steps of "
                f"{per_step} images; give the study a number of `images` that is a multiple of "
                "every batch times `processes`"
            )
        cfg = _scaled(reference, per_step, images, study.evaluations)
        cfg.MODEL.DEVICE = study.device
        scores = scores if cfg.MODEL.MASK_ON else [*AP][:1]
        settings = {key: _plain(value) for key, value in as_flat_dict(cfg).items()}
        decided = {key: settings[key] for key in (*SCALED, "MODEL.DEVICE")}
        command += ["--resume", "--config-file", find_config(variant.config)]
        if study.processes > 1:
            # the default address is the same for all runs of a user
            command += ["--num-gpus", str(study.processes), "--dist-url", "auto"]
        command += as_arguments({**overrides, **decided})
    else:
        given = {**study.options, **variant.options}
        settings = {"batch-size": batch, "device": study.device}
        settings.update({key.replace("_", "-"): value for key, value in given.items()})
        command += _as_options(settings)
        settings["command"] = study.command
    return StudyRun(
        name="",
        variant=name,
        batch=batch,
        seed=0,
        folder=study.output,
        command=command,
        settings=settings,
        scores=scores,
        processes=study.processes,
        device=study.device,
        checkpoints=study.checkpoints,
        images=images,
        choice=choice,
        cfg=cfg,
    )


def as_arguments(values: Values) -> list[str]:
    """Keys and values as command-line arguments."""
    return [str(item) for pair in values.items() for item in pair]


def _as_options(values: Values) -> list[str]:
    """Options of a command; True is a flag, and False or None is left out."""
    options = []
    for key, value in values.items():
        if value is not None and value is not False:
            several = value if isinstance(value, list) else [] if value is True else [value]
            options += [f"--{key}", *map(str, several)]
    return options


def _scaled(reference: CfgNode, per_step: int, images: int, evaluations: Optional[int]) -> CfgNode:
    """Scales LR and schedule of a reference config to another batch and number of images.

    Milestones keep their relative position in the schedule; warm-up keeps its number of images.
    Checkpoints are at most as many images apart as in the reference, and at least as many as
    `evaluations`.
    """
    cfg = reference.clone()
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = cfg.SOLVER.IMS_PER_BATCH
    cfg.SOLVER.IMS_PER_BATCH = per_step
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    cfg, _ = scale_to_batch(cfg)
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = per_step  # even if it was 0: this LR is for this batch
    cfg.SOLVER.MAX_ITER = images // per_step
    length = cfg.SOLVER.MAX_ITER / reference.SOLVER.MAX_ITER
    steps = [round(step * length) for step in reference.SOLVER.STEPS]
    cfg.SOLVER.STEPS = before_end(steps, cfg.SOLVER.MAX_ITER)
    if evaluations:
        cfg.TEST.EVAL_PERIOD = period = -(-cfg.SOLVER.MAX_ITER // evaluations)
        parts = -(-period // max(1, cfg.SOLVER.CHECKPOINT_PERIOD))
        cfg.SOLVER.CHECKPOINT_PERIOD = -(-period // parts)
    return cfg


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
