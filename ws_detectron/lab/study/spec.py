"""A study file: which arms, batches and seeds are compared, and on what terms."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from ws_detectron.errors import ConfigError
from ws_detectron.utils.yaml_files import read_yaml

# What the study itself decides for every cell; an override of it would be lost or break the match.
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
class Arm:
    """One side of the comparison.

    Args:
        name: for folders and tables.
        config: file, or name of a config of this package; its batch, LR, warm-up and schedule are
            the reference from which every cell is scaled.
        overrides: config key -> value, at the reference batch.
    """

    name: str
    config: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """Short runs before the study that choose values for each arm, with one budget for all.

    Args:
        grid: config key -> values, at the reference batch; all combinations are tried.
        images: that each run sees.
        batches: images per process at which is searched; a cell takes what was found at the
            nearest of them (by ratio).
        seed: of all runs; better none of the study's.
        overrides: for the search alone, such as other DATASETS.TEST.
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
        name: of the study.
        title: for the report.
        output: folder of all runs.
        arms: in the order of the report; the first is the baseline of `comparisons` by default.
        batches: images per process and optimizer step.
        seeds: each makes a cell of every arm and batch.
        images: training images that every cell sees; None: as many as the arms' configs say.
        processes: of each cell, one per GPU, or CPU processes.
        device: "cpu" or "cuda".
        evaluations: per cell, spread evenly; None: as the configs say.
        checkpoints: what a cell keeps when it has finished: "all", "last" (the final and the best
            model) or "none"; a run cannot be resumed without, so an unfinished cell keeps all.
        overrides: config key -> value for all arms, at the reference batch.
        comparisons: pairs of arms (a, b) for which "a - b" is reported.
        search: None for none.
        slurm: what submitit's executor is told (`timeout_min`, `slurm_partition`, ...).
    """

    name: str
    title: str
    output: Path
    arms: tuple[Arm, ...]
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
    return _study(_Keys(content, f"study file {path}"), path.stem)


def _study(keys: "_Keys", name: str) -> Study:
    arms = tuple(_arm(name, value) for name, value in keys.mapping("arms").items())
    if not arms:
        raise ConfigError(f"{keys.where}: `arms` is empty; name at least one")
    names = [arm.name for arm in arms]
    study = Study(
        name=name,
        title=keys.text("title", name),
        output=Path(keys.text("output", f"output/studies/{name}")),
        arms=arms,
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
    given = [study.overrides, *(arm.overrides for arm in study.arms)]
    search = study.search
    if search and "TEST.EVAL_PERIOD" in {**search.grid, **search.overrides}:
        raise ConfigError(
            f"{where}, `search`: TEST.EVAL_PERIOD has no effect, as its runs are evaluated once, "
            "at their end"
        )
    if study.evaluations and any("TEST.EVAL_PERIOD" in values for values in given):
        raise ConfigError(
            f"{where}: TEST.EVAL_PERIOD is overridden and `evaluations` is {study.evaluations}; "
            "only one of them can say when is evaluated"
        )


def _arm(name: Any, value: Any) -> Arm:
    where = f"arm {name}"
    if isinstance(value, str):
        value = {"config": value}
    keys = _Keys(value, where)
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"{where}: allowed in names are letters, digits, - and _")
    arm = Arm(name, keys.text("config"), _overrides(keys, "overrides"))
    keys.end()
    return arm


def _comparisons(keys: "_Keys", names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    given = keys.take("comparisons", None)
    if given is None:
        return tuple((name, names[0]) for name in names[1:])
    if not isinstance(given, list):
        raise ConfigError(f"{keys.where}: `comparisons` is no list of pairs of arms")
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
                f"{keys.where}: `{name}` has {key}, which the study sets for every cell"
            )
    return overrides


class _Keys:
    """The keys of one mapping, taken one by one; what is left in the end is unknown."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, Mapping):
            raise ConfigError(f"{where} is no mapping of keys to values: {content!r}")
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
            kind = f"one of {', '.join(allowed)}" if allowed else "text"
            raise ConfigError(f"{self.where}: `{key}` is {value!r}; allowed: {kind}")
        return value

    def count(self, key: str, default: Optional[int], least: int = 1) -> Optional[int]:
        value = self.take(key, default)
        if value is not None and not _is_count(value, least):
            raise ConfigError(f"{self.where}: `{key}` is {value!r}; allowed: {least} or more")
        return value

    def counts(self, key: str, least: int = 1) -> tuple[int, ...]:
        values = self.take(key)
        sound = isinstance(values, list) and values and all(_is_count(v, least) for v in values)
        if not sound or len(set(values)) < len(values):
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
    """The number that a text is: YAML takes 1e-3, without a point, for one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
