"""Study files: the variants, batches and seeds that are compared, and how."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional, Union

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from ws_detectron.errors import ConfigError, shown
from ws_detectron.utils.yaml_files import read_yaml

Values = dict[str, Any]

AP = {"bbox/AP": "box AP", "segm/AP": "mask AP"}
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
    """What is compared: a choice of normalization, or any other config or options."""

    # File, or name of a config of this package. Its batch, LR, warm-up and schedule are the
    # reference from which every run is scaled. Empty: the variant has options of a command.
    config: str = ""
    overrides: Values = field(default_factory=dict)  # at the reference batch
    options: Values = field(default_factory=dict)  # of the study's command
    runs: dict[int, list[int]] = field(default_factory=dict)  # batch -> seeds; empty: all


@dataclass
class Search:
    """Short runs before the study that choose values for each variant, with one budget for all."""

    grid: dict[str, list[Any]]  # at the reference batch; all combinations are tried
    images: int  # training images of each run
    batches: list[int]  # to search at; a run uses the choice at the nearest (by ratio)
    seed: int = 0  # of all runs; should not be one of the study's
    overrides: Values = field(default_factory=dict)  # such as another DATASETS.TEST


@dataclass
class Study:
    """The content of a study file; docs/studies.md has an example."""

    variants: dict[str, Variant]  # in the order of the report
    batches: list[int]  # images per process and optimizer step
    seeds: list[int]  # every variant is trained at every batch with each of them
    title: str = ""  # default: the name of the file
    output: Path = Path()  # folder of all runs; default: output/studies/NAME
    command: str = "tools/train_net.py"  # in the working directory or the repository
    options: Values = field(default_factory=dict)  # of the command, for all variants
    scores: dict[str, str] = field(default_factory=dict)  # metric in metrics.json, in % -> title
    curves: dict[str, str] = field(default_factory=dict)  # default: total loss and scores
    images: Optional[int] = None  # that every run sees; None: as many as the configs say
    processes: int = 1  # of each run, one per GPU, or CPU processes
    device: str = "cpu"
    evaluations: Optional[int] = None  # per run, evenly spaced; None: as the configs say
    checkpoints: str = "last"  # of a finished run: "all", "last" (and best), "none"
    overrides: Values = field(default_factory=dict)  # for all variants, at the reference batch
    comparisons: Optional[list[list[str]]] = None  # pairs; default: each against the first
    search: Optional[Search] = None
    slurm: Values = field(default_factory=dict)  # parameters of submitit's executor

    @property
    def detectors(self) -> bool:
        """Whether the variants are configs of detectors, and not options of a command."""
        return any(variant.config for variant in self.variants.values())

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
        if study.search:
            grid = study.search.grid.items()
            study.search.grid = {key: [*map(_number, values)] for key, values in grid}
        _check(study)
    except OmegaConfBaseException as error:
        raise ConfigError(f"study file {path}: {_explain(error, content)}") from error
    except ConfigError as error:
        raise ConfigError(f"study file {path}: {error}") from error
    study.scores = study.scores or AP
    return study


def _explain(error: OmegaConfBaseException, content: dict[Any, Any]) -> str:
    """An error of OmegaConf with key, found, allowed and near names."""
    key = str(error.full_key)
    if isinstance(error, ConfigKeyError):
        known = [f.name for f in fields(error.object_type)]  # type: ignore[arg-type]
        near = difflib.get_close_matches(str(error.key), known, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"`{key}` is not a key{hint} (allowed: {', '.join(known)})"
    if isinstance(error, MissingMandatoryValue):
        return f"`{key}` is missing"
    top = key.partition(".")[0].partition("[")[0]
    found = f"`{top}` is {shown(repr(content.get(top)), 200)}"
    if top in ALLOWED:
        return f"{found}; allowed: {ALLOWED[top]}"
    return f"{found}: {str(error).splitlines()[0]}"


def _check(study: Study) -> None:
    """Checks what types do not say; raises ConfigError."""
    names, search = [*study.variants], study.search
    if not names:
        raise ConfigError("`variants` is empty; name at least one")
    pairs = study.comparisons or ()
    valid = {
        "batches": _different(study.batches, 1),
        "seeds": _different(study.seeds, 0),
        "images": study.images is None or study.images > 0,
        "processes": study.processes > 0,
        "evaluations": study.evaluations is None or study.evaluations > 0,
        "device": study.device in ("cpu", "cuda"),
        "checkpoints": study.checkpoints in ("all", "last", "none"),
        "comparisons": all(len(some) == 2 and all(n in names for n in some) for some in pairs),
        "search": search is None or _can_search(search),
    }
    for key, allowed in ALLOWED.items():
        if not valid[key]:
            allowed += f" {', '.join(names)}" if key == "comparisons" else ""
            raise ConfigError(f"`{key}` is {getattr(study, key)!r}; allowed: {allowed}")
    overridden: Values = dict(study.overrides)
    for name, variant in study.variants.items():
        if not name.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"variant {name}: allowed in names: letters, digits, - and _")
        if bool(variant.config) != study.detectors or (variant.config and variant.options):
            raise ConfigError(f"variant {name}: all need a `config`, or all `options` instead")
        for batch, seeds in variant.runs.items():
            if batch not in study.batches or not all(seed in study.seeds for seed in seeds):
                raise ConfigError(
                    f"variant {name}: `runs` has {batch}: {seeds}; allowed: seeds of "
                    f"{study.seeds} at batches of {study.batches}"
                )
        overridden.update(variant.overrides)
    searched = {**search.grid, **search.overrides} if search else {}
    for key in (*overridden, *searched):
        if key in DECIDED:
            raise ConfigError(f"{key} is overridden, which the study sets for every run; remove it")
    period = "TEST.EVAL_PERIOD"
    if period in searched or (period in overridden and study.evaluations):
        reason = f"`evaluations` is {study.evaluations}"
        if period in searched:
            reason = "a search evaluates at the end alone"
        raise ConfigError(f"{period} is overridden, but {reason}; remove the override")
    if not study.detectors and not study.scores:
        raise ConfigError("variants need a `config`; for runs of a command `scores` is missing")
    kind, others = "a `config`", ["options", "scores", "curves"]
    if not study.detectors:
        kind, others = "`options`", ["images", "evaluations", "search", "overrides", "processes"]
    given = {**vars(study), "overrides": overridden, "processes": study.processes > 1}
    for key in others:
        if given[key]:
            raise ConfigError(f"`{key}` has no effect on variants with {kind}; remove it")


def _can_search(search: Search) -> bool:
    """Whether it has what is needed, and no value twice."""
    grids = search.grid.values()
    different = all(values.index(value) == i for values in grids for i, value in enumerate(values))
    counted = search.images > 0 and search.seed >= 0 and _different(search.batches, 1)
    return bool(grids) and all(grids) and different and counted


def _different(values: Sequence[int], least: int) -> bool:
    numbers = [value for value in values if type(value) is int and value >= least]
    return bool(values) and len({*numbers}) == len(values)


def _number(value: Any) -> Any:
    """The number in a text, else the value itself: YAML reads 1e-3, without a point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
