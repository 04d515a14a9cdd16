"""Study files: the variants, batches and seeds that are compared, and how."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from ws_detectron.errors import ConfigError
from ws_detectron.utils.yaml_files import read_yaml

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Variant:
    """A choice of normalization, or any other config, to compare.

    Args:
        name: for folders and tables.
        config: file, or name of a config of this package; its batch, LR, warm-up and schedule are
            the reference from which every run is scaled.
        overrides: config key -> value, at the reference batch.
    """

    name: str
    config: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """Short runs before the study that choose values for each variant, with one budget for all.

    Args:
        grid: config key -> values, at the reference batch; all combinations are tried.
        images: training images of each run.
        batches: images per process to search at; a run uses the choice at the nearest (by ratio).
        seed: seed of all runs; should not be one of the study's.
        overrides: for the search alone, such as another DATASETS.TEST.
    """

    grid: dict[str, tuple[Any, ...]]
    images: int
    batches: tuple[int, ...]
    seed: int
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A checked study file.

    Args:
        name: name of the study file, without its ending.
        title: for the report.
        output: folder of all runs.
        variants: in the order of the report; the first is the baseline of `comparisons` by default.
        batches: images per process and optimizer step.
        seeds: every variant is trained at every batch with each of them.
        images: training images that every run sees; None: as many as the variants' configs say.
        processes: number of processes of each run, one per GPU, or CPU processes.
        device: "cpu" or "cuda".
        evaluations: number per run, evenly spaced; None: as the configs say.
        checkpoints: what a finished run keeps: "all", "last" (the final and the best model) or
            "none"; an unfinished run keeps all, to resume from.
        overrides: config key -> value for all variants, at the reference batch.
        comparisons: pairs of variants (a, b) for which "a - b" is reported.
        search: the search, or None.
        slurm: parameters of submitit's executor (`timeout_min`, `slurm_partition`, ...).
    """

    name: str
    title: str
    output: Path
    variants: tuple[Variant, ...]
    batches: tuple[int, ...]
    seeds: tuple[int, ...]
    images: Optional[int] = None
    processes: int = 1
    device: str = "cpu"
    evaluations: Optional[int] = None
    checkpoints: str = "last"
    overrides: dict[str, Any] = field(default_factory=dict)
    comparisons: tuple[tuple[str, str], ...] = ()
    search: Optional[Search] = None
    slurm: dict[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What `batches` counts, for the report."""
        if self.device == "cuda":
            return "images per GPU"
        return "images per process" if self.processes > 1 else "images per step"


def read_study(path: Union[str, Path]) -> Study:
    """Reads and checks a study file.

    Raises:
        UserError: the file is missing or not YAML.
        ConfigError: a key is missing, unknown, or has a value that cannot work; names the key.
    """
    path = Path(path)
    content = read_yaml(path, "study file")
    if isinstance(content, dict) and "arms" in content and "variants" not in content:
        logger.warning("study file %s: `arms` is now called `variants`; rename it", path)
        content["variants"] = content.pop("arms")
    return _study(_Keys(content, f"study file {path}"), path.stem)


def _study(keys: "_Keys", name: str) -> Study:
    variants = tuple(_variant(name, value) for name, value in keys.mapping("variants").items())
    if not variants:
        raise ConfigError(f"{keys.where}: `variants` is empty; name at least one")
    names = [variant.name for variant in variants]
    study = Study(
        name=name,
        title=keys.text("title", name),
        output=Path(keys.text("output", f"output/studies/{name}")),
        variants=variants,
        batches=keys.counts("batches"),
        seeds=keys.counts("seeds", least=0),
        images=keys.count("images", None),
        processes=keys.count("processes", 1) or 1,
        device=keys.text("device", "cpu", ("cpu", "cuda")),
        evaluations=keys.count("evaluations", None),
        checkpoints=keys.text("checkpoints", "last", ("all", "last", "none")),
        overrides=_overrides(keys, "overrides"),
        comparisons=_comparisons(keys, names),
        search=_search(keys),
        slurm=keys.mapping("slurm", {}),
    )
    keys.end()
    _check_evaluations(study, keys.where)
    return study


def _check_evaluations(study: Study, where: str) -> None:
    given = [study.overrides, *(variant.overrides for variant in study.variants)]
    search = study.search
    if search and "TEST.EVAL_PERIOD" in {**search.grid, **search.overrides}:
        raise ConfigError(
            f"{where}, `search`: TEST.EVAL_PERIOD has no effect, as its runs are evaluated once, "
            "at their end"
        )
    if study.evaluations and any("TEST.EVAL_PERIOD" in values for values in given):
        raise ConfigError(
            f"{where}: TEST.EVAL_PERIOD is overridden and `evaluations` is {study.evaluations}; "
            "set only one of them"
        )


def _variant(name: Any, value: Any) -> Variant:
    where = f"variant {name}"
    if isinstance(value, str):
        value = {"config": value}
    keys = _Keys(value, where)
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"{where}: allowed in names: letters, digits, - and _")
    variant = Variant(name, keys.text("config"), _overrides(keys, "overrides"))
    keys.end()
    return variant


def _comparisons(keys: "_Keys", names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    given = keys.take("comparisons", None)
    if given is None:
        return tuple((name, names[0]) for name in names[1:])
    if not isinstance(given, list):
        raise ConfigError(
            f"{keys.where}: `comparisons` is {given!r}; allowed: a list of pairs of variants"
        )
    for pair in given:
        if not isinstance(pair, list) or len(pair) != 2 or not all(name in names for name in pair):
            raise ConfigError(
                f"{keys.where}: `comparisons` holds {pair!r}; allowed: pairs of {', '.join(names)}"
            )
    return tuple((a, b) for a, b in given)


def _search(keys: "_Keys") -> Optional[Search]:
    given = keys.take("search", None)
    if given is None:
        return None
    inner = _Keys(given, f"{keys.where}, `search`")
    grid = {}
    for key, values in inner.mapping("grid").items():
        if key in DECIDED or not isinstance(values, list) or not values:
            raise ConfigError(
                f"{inner.where}: `grid` has {key}: {values!r}; allowed: a list of values for a "
                f"config key other than {', '.join(DECIDED)}"
            )
        grid[key] = tuple(map(_number, values))
    images = inner.count("images", None)
    if not grid or images is None:
        raise ConfigError(f"{inner.where}: `grid` and `images` are needed")
    search = Search(
        grid=grid,
        images=images,
        batches=inner.counts("batches"),
        seed=inner.count("seed", 0, least=0) or 0,
        overrides=_overrides(inner, "overrides"),
    )
    inner.end()
    return search


def _overrides(keys: "_Keys", name: str) -> dict[str, Any]:
    overrides = keys.mapping(name, {})
    for key in overrides:
        if key in DECIDED:
            raise ConfigError(
                f"{keys.where}: `{name}` has {key}, which the study sets for every run"
            )
    return overrides


class _Keys:
    """The keys of a mapping, taken one by one; `end` refuses those that are left."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, Mapping):
            raise ConfigError(f"{where} is {content!r}; allowed: a mapping of keys to values")
        self.where = where
        self._left = dict(content)
        self._known: list[str] = []

    def take(self, key: str, *default: Any) -> Any:
        self._known.append(key)
        if key in self._left:
            return self._left.pop(key)
        if not default:
            raise ConfigError(f"{self.where}: `{key}` is missing")
        return default[0]

    def text(self, key: str, default: Optional[str] = None, allowed: Sequence[str] = ()) -> str:
        value = self.take(key) if default is None else self.take(key, default)
        if not isinstance(value, str) or (allowed and value not in allowed):
            choices = f"one of {', '.join(allowed)}" if allowed else "text"
            raise ConfigError(f"{self.where}: `{key}` is {value!r}; allowed: {choices}")
        return value

    def count(self, key: str, default: Optional[int], least: int = 1) -> Optional[int]:
        value = self.take(key, default)
        if value is not None and not _is_count(value, least):
            raise ConfigError(f"{self.where}: `{key}` is {value!r}; allowed: {least} or more")
        return value

    def counts(self, key: str, least: int = 1) -> tuple[int, ...]:
        values = self.take(key)
        valid = isinstance(values, list) and values and all(_is_count(v, least) for v in values)
        if not valid or len(set(values)) < len(values):
            raise ConfigError(
                f"{self.where}: `{key}` is {values!r}; allowed: a list of different whole numbers, "
                f"each {least} or more"
            )
        return tuple(values)

    def mapping(self, key: str, *default: Mapping) -> dict[str, Any]:
        value = self.take(key, *default)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}: `{key}` is {value!r}; allowed: keys with values")
        return dict(value)

    def end(self) -> None:
        for key in self._left:
            near = difflib.get_close_matches(str(key), self._known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ConfigError(
                f"{self.where}: `{key}` is not a key{hint} (allowed: {', '.join(self._known)})"
            )


def _number(value: Any) -> Any:
    """The number in a text, else the value itself: YAML reads 1e-3, without a point, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
