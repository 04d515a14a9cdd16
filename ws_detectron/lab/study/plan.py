"""The runs of a study, each one training, matched by the linear rule."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from detectron2.config import CfgNode

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

from .spec import Search, Study, Variant

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
        name: name of the run and of its folder.
        variant: name of its variant.
        batch: images per process and step.
        seed: seed of the run.
        folder: OUTPUT_DIR.
        config: path of the variant's config file.
        options: config key -> value of the overrides, OUTPUT_DIR included.
        processes: number of processes.
        images: number of training images.
        checkpoints: which checkpoints are kept, see `Study`.
        settings: the merged config, by full key, with lists in place of tuples.
        choice: values that a search tries or has found, at the reference batch.
        searching: whether it is a run of a search.
    """

    name: str
    variant: str
    batch: int
    seed: int
    folder: Path
    config: str
    options: Values
    processes: int
    images: int
    checkpoints: str
    settings: Values = field(repr=False)
    choice: Values = field(default_factory=dict)
    searching: bool = False

    @property
    def iterations(self) -> int:
        return self.options["SOLVER.MAX_ITER"]


def study_runs(study: Study, choices: Mapping[tuple[str, int], Optional[Values]]) -> list[StudyRun]:
    """The runs of a study without its search, from the largest batch, which is fastest.

    Args:
        study: as returned by `read_study`.
        choices: as returned by `choice.choose`, empty without a search; runs whose search found
            nothing are skipped.

    Raises:
        ConfigError: a config or override cannot work; names it.
    """
    runs = []
    for seed, batch, variant in itertools.product(
        study.seeds, sorted(study.batches, reverse=True), study.variants
    ):
        choice: Optional[Values] = {}
        if study.search and choices:
            choice = choices[variant.name, nearest(batch, study.search.batches)]
        if choice is not None:
            name = f"{variant.name}_{batch}img_seed{seed}"
            runs.append(_run(study, variant, batch, seed, f"runs/{name}", choice))
    return runs


def search_runs(study: Study) -> list[StudyRun]:
    """The runs of the search: every combination of the grid for every variant and searched batch.

    They are evaluated once, at the end.

    Raises:
        ConfigError: a config or override cannot work, or two values of the grid are the same.
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
    choices = {_folder_name(choice): choice for choice in combinations(search)}
    if len(choices) < len(combinations(search)):
        raise ConfigError(f"search: `grid` has a value twice: {search.grid}")
    return [
        _run(terms, variant, batch, search.seed, f"search/{variant.name}_{batch}img_{name}", choice)
        for batch, variant in itertools.product(
            sorted(search.batches, reverse=True), study.variants
        )
        for name, choice in choices.items()
    ]


def _folder_name(choice: Values) -> str:
    """A name from the values alone, so that a run keeps its folder when the grid grows."""
    ends = [key.rpartition(".")[2] for key in choice]
    keys = ends if len(set(ends)) == len(ends) else list(choice)
    return "_".join(
        f"{key}_{re.sub(r'[^A-Za-z0-9.+-]+', '-', str(value))}"
        for key, value in zip(keys, choice.values())
    )


def combinations(search: Search) -> list[Values]:
    """All combinations of the grid, as config key -> value."""
    return [dict(zip(search.grid, values)) for values in itertools.product(*search.grid.values())]


def nearest(batch: int, batches: Sequence[int]) -> int:
    """The element of `batches` with the smallest ratio to `batch`; of two, the smaller."""
    return min(batches, key=lambda other: (max(batch / other, other / batch), other))


def _run(
    study: Study, variant: Variant, batch: int, seed: int, path: str, choice: Values
) -> StudyRun:
    name = path.replace("runs/", "").replace("/", "_")
    at_reference = {**study.overrides, **variant.overrides, **choice}
    reference, _ = scale_to_batch(load_config(variant.config, as_arguments(at_reference)))
    per_step = batch * study.processes
    seen = study.images or reference.SOLVER.MAX_ITER * reference.SOLVER.IMS_PER_BATCH
    if seen % per_step:
        raise ConfigError(
            f"run {name}: {seen} images are not a whole number of steps of {per_step} images; give "
            "the study a number of `images` that is a multiple of every batch times `processes`"
        )
    scaled = _scaled(reference, per_step, seen, study.evaluations)
    folder = study.output / path
    flat = as_flat_dict(scaled)
    options = {key: value for key, value in at_reference.items() if key not in SCALED}
    options.update({key: flat[key] for key in SCALED})
    options.update({"SEED": seed, "MODEL.DEVICE": study.device, "OUTPUT_DIR": str(folder)})
    cfg = load_config(variant.config, as_arguments(options))
    return StudyRun(
        name=name,
        variant=variant.name,
        batch=batch,
        seed=seed,
        folder=folder,
        config=find_config(variant.config),
        options=options,
        processes=study.processes,
        images=seen,
        checkpoints=study.checkpoints,
        settings={key: _plain(value) for key, value in as_flat_dict(cfg).items()},
        choice=choice,
        searching=path.startswith("search/"),
    )


def check_runs(runs: Sequence[StudyRun]) -> None:
    """Checks all runs before the first is started.

    The device is not checked, as another machine may train the run.

    Raises:
        UserError: a run cannot work; names it and the reason.
    """
    for run in runs:
        cfg = load_config(run.config, as_arguments(run.options))
        try:
            check_weights(cfg)
            check_registered(cfg)
            check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
            check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
            check_batch(cfg, run.processes)
        except ConfigError as error:
            raise ConfigError(f"run {run.name}: {error}") from error


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
