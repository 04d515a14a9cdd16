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

from .study_file import AP, Study, Values

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
    study: Study = field(repr=False)  # that it is of; in a search with other images and overrides
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
            runs += _runs(study, name, batch, choice, {f"seed{seed}": seed for seed in seeds})
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
    runs: list[StudyRun] = []
    for batch, name, values in itertools.product(
        sorted(search.batches, reverse=True),
        study.variants,
        itertools.product(*search.grid.values()),
    ):
        choice = dict(zip(search.grid, values))
        seeds = {_label(choice): search.seed}
        runs += _runs(terms, name, batch, choice, seeds, searching=True)
    return runs


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
            check_batch(run.cfg, run.study.processes)
        except ConfigError as error:
            raise ConfigError(f"run {run.name}: {error}") from error


def _label(choice: Values) -> str:
    """A name from the values alone, so that a run keeps its folder when the grid grows."""
    ends = [key.rpartition(".")[2] for key in choice]
    keys = ends if len(set(ends)) == len(ends) else list(choice)
    return "_".join(
        f"{key}_{re.sub(r'[^A-Za-z0-9.+-]+', '-', str(value))}"
        for key, value in zip(keys, choice.values())
    )


def _runs(
    study: Study,
    variant: str,
    batch: int,
    choice: Values,
    seeds: Mapping[str, int],
    *,
    searching: bool = False,
) -> list[StudyRun]:
    """The runs of a variant at a batch; `seeds` is the end of each one's name -> its seed."""
    script = Path(study.command)
    if not script.is_file():
        script = Path(ws_detectron.__file__).parents[1] / script
    start, cfg, images = [sys.executable, str(script)], None, None
    if study.detectors:
        config = study.variants[variant].config
        overrides = {**study.overrides, **study.variants[variant].overrides, **choice}
        cfg, images = _scaled(study, load_config(config, as_arguments(overrides)), batch, variant)
        settings = {key: _plain(value) for key, value in as_flat_dict(cfg).items()}
        decided = {key: settings[key] for key in (*SCALED, "MODEL.DEVICE")}
        start += ["--resume", "--config-file", find_config(config)]
        if study.processes > 1:
            # the default address is the same for all runs of a user
            start += ["--num-gpus", str(study.processes), "--dist-url", "auto"]
        start += as_arguments({**overrides, **decided})
    else:
        given = {**study.options, **study.variants[variant].options}
        settings = {"batch-size": batch, "device": study.device}
        settings.update({key.replace("_", "-"): value for key, value in given.items()})
        start += _as_options(settings)
        settings["command"] = study.command
    runs = []
    for end, seed in seeds.items():
        name = f"{variant}_{batch}img_{end}"
        folder = study.output / ("search" if searching else "runs") / name
        own: Values = {"SEED": seed, "OUTPUT_DIR": str(folder)} if cfg else {"seed": seed}
        last = as_arguments(own)
        if cfg is None:
            last = _as_options({**own, "output": folder, "resume": True})
        run = StudyRun(
            name=f"search_{name}" if searching else name,
            variant=variant,
            batch=batch,
            seed=seed,
            folder=folder,
            command=[*start, *last],
            settings={**settings, **own},
            scores=[*AP][:1] if cfg and not cfg.MODEL.MASK_ON else [*study.scores],
            study=study,
            images=images,
            choice=choice,
            searching=searching,
            cfg=cfg,
        )
        runs.append(run)
    return runs


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


def _scaled(study: Study, cfg: CfgNode, batch: int, variant: str) -> tuple[CfgNode, int]:
    """A variant's config, scaled to another batch and number of images, and that number.

    Milestones keep their relative position in the schedule; warm-up keeps its number of images.
    Checkpoints are at most as many images apart as in the config, and at least as many as
    `evaluations`.
    """
    reference, _ = scale_to_batch(cfg)
    images = study.images or reference.SOLVER.MAX_ITER * reference.SOLVER.IMS_PER_BATCH
    per_step = batch * study.processes
    if images % per_step:
        raise ConfigError(
            f"runs {variant}_{batch}img: {images} images are not a whole number of steps of "
            f"{per_step} images; give the study a number of `images` that is a multiple of "
            "every batch times `processes`"
        )
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
    if study.evaluations:
        cfg.TEST.EVAL_PERIOD = period = -(-cfg.SOLVER.MAX_ITER // study.evaluations)
        parts = -(-period // max(1, cfg.SOLVER.CHECKPOINT_PERIOD))
        cfg.SOLVER.CHECKPOINT_PERIOD = -(-period // parts)
    cfg.MODEL.DEVICE = study.device
    return cfg, images


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
