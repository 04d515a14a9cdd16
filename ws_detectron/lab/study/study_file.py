"""Study files: the variants, batches and seeds that are compared, and how."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional, Union

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from ws_detectron.errors import ConfigError, shown
from ws_detectron.evaluation.coco_report import TITLES
from ws_detectron.utils.yaml_files import read_yaml

TRAIN_NET = "tools/train_net.py"
# keys that the study sets for every run; an override would have no effect or break the match
DECIDED = (
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.REFERENCE_IMS_PER_BATCH",
    "SOLVER.REFERENCE_WORLD_SIZE",
    "SOLVER.MAX_ITER",
    "MODEL.DEVICE",
    "OUTPUT_DIR",
    "SEED",
)


@dataclass
class Variant:
    """What is compared: a choice of normalization, or any other config or options.

    Args:
        config: file, or name of a config of this package; its batch, LR, warm-up and schedule are
            the reference from which every run is scaled. Empty: the variant has options.
        overrides: config key -> value, at the reference batch.
        options: option of the study's command -> value.
        runs: batch -> seeds; empty: all of the study's.
    """

    config: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    runs: dict[int, list[int]] = field(default_factory=dict)


@dataclass
class Search:
    """Short runs before the study that choose values for each variant, with one budget for all.

    Args:
        grid: config key -> values, at the reference batch; all combinations are tried.
        images: training images of each run.
        batches: images per process to search at; a run uses the choice at the nearest (by ratio).
        seed: seed of all runs; should not be one of the study's.
        overrides: for the search alone, such as another DATASETS.TEST.
    """

    grid: dict[str, list[Any]]
    images: int
    batches: list[int]
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class Study:
    """The content of a study file.

    Args:
        variants: name -> variant, in the order of the report.
        batches: images per process and optimizer step.
        seeds: every variant is trained at every batch with each of them.
        title: for the report; default: the name of the file.
        output: folder of all runs; default: output/studies and the name of the file.
        command: script that trains a run, relative to the working directory or the repository.
        options: options of the command for all variants.
        scores: metric in metrics.json -> title, in %; for detectors box and mask AP.
        curves: metric in metrics.json -> title; default: the total loss and the scores.
        images: training images that every run sees; None: as many as the variants' configs say.
        processes: number of processes of each run, one per GPU, or CPU processes.
        device: "cpu" or "cuda".
        evaluations: number per run, evenly spaced; None: as the configs say.
        checkpoints: what a finished run keeps: "all", "last" (the final and the best model) or
            "none"; an unfinished run keeps all, to resume from.
        overrides: config key -> value for all variants, at the reference batch.
        comparisons: pairs of variants (a, b) for which "a - b" is reported; default: each against
            the first.
        search: the search, or None.
        slurm: parameters of submitit's executor (`timeout_min`, `slurm_partition`, ...).
    """

    variants: dict[str, Variant]
    batches: list[int]
    seeds: list[int]
    title: str = ""
    output: Path = Path()
    command: str = TRAIN_NET
    options: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, str] = field(default_factory=dict)
    curves: dict[str, str] = field(default_factory=dict)
    images: Optional[int] = None
    processes: int = 1
    device: str = "cpu"
    evaluations: Optional[int] = None
    checkpoints: str = "last"
    overrides: dict[str, Any] = field(default_factory=dict)
    comparisons: Optional[list[list[str]]] = None
    search: Optional[Search] = None
    slurm: dict[str, Any] = field(default_factory=dict)

    @property
    def detectors(self) -> bool:
        """Whether the variants are configs of detectors, and not options of a command."""
        return any(variant.config for variant in self.variants.values())

    @property
    def titles(self) -> dict[str, str]:
        """Score -> title: of a command's metrics, or of AP."""
        return self.scores or {task: f"{title} AP" for task, title in TITLES.items()}

    @property
    def unit(self) -> str:
        """What `batches` counts, for the report."""
        if self.device == "cuda":
            return "images per GPU"
        return "images per process" if self.processes > 1 else "images per step"


ALLOWED = {
    "batches": "a list of different whole numbers, each 1 or more",
    "seeds": "a list of different whole numbers, each 0 or more",
    "images": "1 or more",
    "processes": "1 or more",
    "evaluations": "1 or more",
    "device": "cpu, cuda",
    "checkpoints": "all, last, none",
    "comparisons": "a list of pairs of variants",
    "search": "`grid` (config key -> values), `images`, `batches`, `seed`, `overrides`",
}


def read_study(path: Union[str, Path]) -> Study:
    """Reads and checks a study file.

    Raises:
        UserError: the file is missing or not YAML.
        ConfigError: a key is missing, unknown, or has a value that cannot work; names the key.
    """
    path = Path(path)
    content = read_yaml(path, "study file")
    if not isinstance(content, dict):
        raise ConfigError(f"study file {path} is {content!r}; allowed: a mapping of keys to values")
    if isinstance(content.get("variants"), dict):
        content["variants"] = {
            name: {"config": value} if isinstance(value, str) else value
            for name, value in content["variants"].items()
        }
    try:
        study: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Study), content))
        study.title = study.title or path.stem
        if "output" not in content:
            study.output = Path("output/studies", path.stem)
        if study.comparisons is None:
            baseline, *others = study.variants or [""]
            study.comparisons = [[name, baseline] for name in others]
        _check(study)
    except OmegaConfBaseException as error:
        raise ConfigError(f"study file {path}: {_explained(error, content)}") from error
    except ConfigError as error:
        raise ConfigError(f"study file {path}: {error}") from error
    return study


def _explained(error: OmegaConfBaseException, content: dict[Any, Any]) -> str:
    """An error of OmegaConf with key, found, allowed and near names."""
    key = str(error.full_key)
    if isinstance(error, ConfigKeyError):
        known = [f.name for f in fields(error.object_type)]  # type: ignore[arg-type]
        near = difflib.get_close_matches(str(error.key), known, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"`{key}` is not a key{hint} (allowed: {', '.join(known)})"
    if isinstance(error, MissingMandatoryValue):
        return f"`{key}` is missing"
    reason = str(error).splitlines()[0]
    top = key.partition(".")[0].partition("[")[0]
    found = f"`{top}` is {shown(repr(content.get(top)), 200)}"
    return f"{found}; allowed: {ALLOWED[top]}" if top in ALLOWED else f"{found}: {reason}"


def _check(study: Study) -> None:
    """Checks what types do not say; raises ConfigError."""
    if not study.variants:
        raise ConfigError("`variants` is empty; name at least one")
    valid = {
        "batches": _different(study.batches, 1),
        "seeds": _different(study.seeds, 0),
        "images": study.images is None or study.images > 0,
        "processes": study.processes > 0,
        "evaluations": study.evaluations is None or study.evaluations > 0,
        "device": study.device in ("cpu", "cuda"),
        "checkpoints": study.checkpoints in ("all", "last", "none"),
        "comparisons": all(
            len(pair) == 2 and all(name in [*study.variants] for name in pair)
            for pair in study.comparisons or ()
        ),
    }
    for key, is_valid in valid.items():
        if not is_valid:
            names = f" {', '.join(study.variants)}" if key == "comparisons" else ""
            raise ConfigError(f"`{key}` is {getattr(study, key)!r}; allowed: {ALLOWED[key]}{names}")
    for name, variant in study.variants.items():
        where = f"variant {name}"
        if not name.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"{where}: allowed in names: letters, digits, - and _")
        if bool(variant.config) != study.detectors or (variant.config and variant.options):
            raise ConfigError(f"{where}: all variants need a `config`, or all `options` instead")
        for batch, seeds in variant.runs.items():
            if batch not in study.batches or not all(seed in study.seeds for seed in seeds):
                raise ConfigError(
                    f"{where}: `runs` has {batch}: {seeds}; allowed: seeds of "
                    f"{study.seeds} at batches of {study.batches}"
                )
        _check_overrides(f"{where}: `overrides`", variant.overrides)
    _check_overrides("`overrides`", study.overrides)
    given = [study.overrides, *(variant.overrides for variant in study.variants.values())]
    if study.evaluations and any("TEST.EVAL_PERIOD" in values for values in given):
        raise ConfigError(
            f"TEST.EVAL_PERIOD is overridden and `evaluations` is {study.evaluations}; set only "
            "one of them"
        )
    if study.search:
        _check_search(study.search)
    if not study.detectors and not study.scores:
        raise ConfigError("variants need a `config`; for runs of a command `scores` is missing")
    no_effect: dict[str, Any] = {
        "images": study.images,
        "evaluations": study.evaluations,
        "search": study.search,
        "overrides": any(given),
        "processes": study.processes > 1,
    }
    if study.detectors:
        no_effect = {key: getattr(study, key) for key in ("options", "scores", "curves")}
    for key, value in no_effect.items():
        if value:
            kind = "a `config`" if study.detectors else "`options`"
            raise ConfigError(f"`{key}` has no effect on variants with {kind}; remove it")


def _check_search(search: Search) -> None:
    if not search.grid or search.images < 1 or search.seed < 0 or not _different(search.batches, 1):
        raise ConfigError(
            "`search`: a `grid`, `images` (1 or more), `batches` (a list of different whole "
            f"numbers) and a `seed` (0 or more) are needed; it is {search}"
        )
    if "TEST.EVAL_PERIOD" in {**search.grid, **search.overrides}:
        raise ConfigError(
            "`search`: TEST.EVAL_PERIOD has no effect, as its runs are evaluated once, at their end"
        )
    _check_overrides("`search`: `grid`", search.grid)
    _check_overrides("`search`: `overrides`", search.overrides)
    for key, values in search.grid.items():
        search.grid[key] = values = [_number(value) for value in values]
        if not values or any(value in values[:i] for i, value in enumerate(values)):
            raise ConfigError(f"`search`: `grid` has {key}: {values}; allowed: different values")


def _check_overrides(where: str, overrides: dict[str, Any]) -> None:
    for key in DECIDED:
        if key in overrides:
            raise ConfigError(f"{where} has {key}, which the study sets for every run")


def _different(values: Sequence[int], least: int) -> bool:
    numbers = [value for value in values if type(value) is int and value >= least]
    return bool(values) and len({*numbers}) == len(values)


def _number(value: Any) -> Any:
    """The number in a text, else the value itself: YAML reads 1e-3, without a point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
