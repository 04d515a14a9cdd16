"""The runs of a study, each one training; those of detectors are matched by the linear rule."""

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
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

from .study_file import Search, Study

Values = dict[str, Any]

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
    """One training run.

    Args:
        name: name of the run.
        variant: name of its variant.
        batch: images per process and step.
        seed: seed of the run.
        folder: where it writes.
        command: the command line that starts or resumes it.
        settings: what decides its result, by config key or option, with lists in place of tuples.
        processes: number of processes.
        device: "cpu" or "cuda".
        checkpoints: which checkpoints are kept, see `Study`.
        scores: metrics that a finished run of a command has; empty for a detector.
        images: number of training images; None for a command.
        choice: values that a search tries or has found, at the reference batch.
        searching: whether it is a run of a search.
        cfg: the merged config, of the first seed; None for a command.
    """

    name: str
    variant: str
    batch: int
    seed: int
    folder: Path
    command: Sequence[str]
    settings: Values = field(repr=False)
    processes: int = 1
    device: str = "cpu"
    checkpoints: str = "last"
    scores: Sequence[str] = ()
    images: Optional[int] = None
    choice: Values = field(default_factory=dict)
    searching: bool = False
    cfg: Optional[CfgNode] = field(default=None, repr=False, compare=False)


def study_runs(study: Study, choices: Mapping[tuple[str, int], Optional[Values]]) -> list[StudyRun]:
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
        chosen = study.variants[name].runs
        seeds = chosen.get(batch, []) if chosen else study.seeds
        labels = {f"seed{seed}": seed for seed in study.seeds if seed in seeds}
        choice: Optional[Values] = {}
        if study.search and choices:
            choice = choices[name, nearest(batch, study.search.batches)]
        if not study.detectors:
            runs += _command_runs(study, name, batch, labels)
        elif choice is not None:
            runs += _detector_runs(study, name, batch, labels, choice)
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
    terms = replace(
        study,
        images=search.images,
        evaluations=1,
        overrides={**study.overrides, **search.overrides},
    )
    return [
        run
        for batch, variant in itertools.product(
            sorted(search.batches, reverse=True), study.variants
        )
        for choice in combinations(search)
        for run in _detector_runs(
            terms, variant, batch, {_label(choice): search.seed}, choice, searching=True
        )
    ]


def combinations(search: Search) -> list[Values]:
    """All combinations of the grid, as config key -> value."""
    return [dict(zip(search.grid, values)) for values in itertools.product(*search.grid.values())]


def _label(choice: Values) -> str:
    """A name from the values alone, so that a run keeps its folder when the grid grows."""
    ends = [key.rpartition(".")[2] for key in choice]
    keys = ends if len(set(ends)) == len(ends) else list(choice)
    return "_".join(
        f"{key}_{re.sub(r'[^A-Za-z0-9.+-]+', '-', str(value))}"
        for key, value in zip(keys, choice.values())
    )


def nearest(batch: int, batches: Sequence[int]) -> int:
    """The element of `batches` with the smallest ratio to `batch`; of two, the smaller."""
    return min(batches, key=lambda other: (max(batch / other, other / batch), other))


def check_runs(runs: Sequence[StudyRun]) -> None:
    """Checks all runs before the first is started.

    The device is not checked, as another machine may train the run.

    Raises:
        ConfigError: a run cannot work; names it and the reason.
    """
    for run in runs:
        script = run.command[1]
        if not Path(script).is_file():
            raise ConfigError(f"`command`: there is no file {script}")
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


def _start(study: Study) -> list[str]:
    """Interpreter and script of a command; a relative script may also be in the repository."""
    in_repository = Path(ws_detectron.__file__).parents[1] / study.command
    script = Path(study.command)
    return [sys.executable, str(script if script.is_file() else in_repository)]


def _command_runs(
    study: Study, name: str, batch: int, labels: Mapping[str, int]
) -> Iterator[StudyRun]:
    """The runs of a variant with options at a batch; `labels`: end of the name -> seed."""
    given = {**study.options, **study.variants[name].options}
    options = {key.replace("_", "-"): value for key, value in given.items()}
    for label, seed in labels.items():
        run = f"{name}_{batch}img_{label}"
        settings = {"batch-size": batch, "seed": seed, "device": study.device, **options}
        folder = study.output / "runs" / run
        arguments = []
        for key, value in {**settings, "output": folder, "resume": True}.items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            if value is not None and value is not False:
                arguments += [f"--{key}", *map(str, values)]
        yield StudyRun(
            name=run,
            variant=name,
            batch=batch,
            seed=seed,
            folder=folder,
            command=[*_start(study), *arguments],
            settings={"command": study.command, **settings},
            device=study.device,
            checkpoints=study.checkpoints,
            scores=[*study.scores],
        )


def _detector_runs(
    study: Study,
    name: str,
    batch: int,
    labels: Mapping[str, int],
    choice: Values,
    searching: bool = False,
) -> Iterator[StudyRun]:
    """The runs of a variant with a config at a batch; `labels`: end of the name -> seed."""
    variant = study.variants[name]
    overrides = {**study.overrides, **variant.overrides, **choice}
    reference, _ = scale_to_batch(load_config(variant.config, as_arguments(overrides)))
    per_step = batch * study.processes
    seen = study.images or reference.SOLVER.MAX_ITER * reference.SOLVER.IMS_PER_BATCH
    prefix = "search_" if searching else ""
    if seen % per_step:
        raise ConfigError(
            f"run {prefix}{name}_{batch}img_{next(iter(labels))}: {seen} images are not a whole "
            f"number of steps of {per_step} images; give the study a number of `images` that is a "
            "multiple of every batch times `processes`"
        )
    cfg = _scaled(reference, per_step, seen, study.evaluations)
    cfg.MODEL.DEVICE = study.device
    flat = as_flat_dict(cfg)
    own = {key: value for key, value in overrides.items() if key not in SCALED}
    own.update({key: flat[key] for key in (*SCALED, "MODEL.DEVICE")})
    start = [*_start(study), "--resume", "--config-file", find_config(variant.config)]
    if study.processes > 1:
        # the default address is the same for all runs of a user
        start += ["--num-gpus", str(study.processes), "--dist-url", "auto"]
    for label, seed in labels.items():
        run = f"{name}_{batch}img_{label}"
        folder = study.output / ("search" if searching else "runs") / run
        decided = {"SEED": seed, "OUTPUT_DIR": str(folder)}
        yield StudyRun(
            name=prefix + run,
            variant=name,
            batch=batch,
            seed=seed,
            folder=folder,
            command=[*start, *as_arguments({**own, **decided})],
            settings={key: _plain(value) for key, value in {**flat, **decided}.items()},
            processes=study.processes,
            device=study.device,
            checkpoints=study.checkpoints,
            images=seen,
            choice=choice,
            searching=searching,
            cfg=cfg,
        )


def as_arguments(values: Values) -> list[str]:
    """Keys and values as command-line arguments."""
    return [str(item) for pair in values.items() for item in pair]


def _scaled(reference: CfgNode, per_step: int, seen: int, evaluations: Optional[int]) -> CfgNode:
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
    cfg.SOLVER.MAX_ITER = seen // per_step
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
