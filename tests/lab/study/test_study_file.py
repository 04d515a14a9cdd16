"""Study files: what is read, and errors that name the key."""

from pathlib import Path
from typing import Any

import pytest

from ws_detectron.errors import ConfigError, UserError
from ws_detectron.lab.study import Variant, read_study

SEARCH = {"grid": {"SOLVER.BASE_LR": [0.1, 0.2]}, "images": 40, "batches": [4]}


def test_everything_is_read(make_study) -> None:
    study = make_study(
        variants={"bn": "a.yaml", "gn": {"config": "b.yaml", "overrides": {"SOLVER.BASE_LR": 0.1}}},
        search={**SEARCH, "seed": 9},
        comparisons=[["gn", "bn"]],
        slurm={"timeout_min": 5},
        evaluations=2,
        processes=2,
    )
    assert study.title == "A study"
    assert study.variants == {
        "bn": Variant("a.yaml"),
        "gn": Variant("b.yaml", {"SOLVER.BASE_LR": 0.1}),
    }
    assert (study.batches, study.seeds, study.images) == ([1, 4], [1, 2], 80)
    assert study.search and study.search.grid == {"SOLVER.BASE_LR": [0.1, 0.2]}
    assert (study.search.images, study.search.batches, study.search.seed) == (40, [4], 9)
    assert (study.evaluations, study.processes, study.slurm) == (2, 2, {"timeout_min": 5})


def test_numbers_of_a_grid_that_yaml_takes_for_text(make_study) -> None:
    """YAML 1.1 needs a point in 1e-3."""
    grid = {"SOLVER.BASE_LR": ["1e-3", 0.01, "1e-1"], "MODEL.RESNETS.NORM": ["GN", "BN"]}
    search = make_study(search={**SEARCH, "grid": grid}).search
    assert search.grid["SOLVER.BASE_LR"] == [0.001, 0.01, 0.1]
    assert search.grid["MODEL.RESNETS.NORM"] == ["GN", "BN"]


def test_first_variant_is_the_baseline_unless_said_otherwise(make_study) -> None:
    variants = {"a": "a.yaml", "b": "b.yaml", "c": "c.yaml"}
    assert make_study(variants=variants).comparisons == [["b", "a"], ["c", "a"]]
    assert make_study(variants=variants, comparisons=[]).comparisons == []


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"variants": None}, ["`variants` is missing"]),
        ({"variants": {}}, ["`variants` is empty"]),
        ({"variants": {"b/n": "a.yaml"}}, ["variant b/n", "letters"]),
        ({"variants": {"bn": {"confg": "a.yaml"}}}, ["`variants.bn.confg`", "mean `config`"]),
        ({"variants": {"bn": {}}}, ["need a `config`", "`scores` is missing"]),
        ({"variants": {"bn": {"config": "a", "options": {"b": 1}}}}, ["variant bn", "`options`"]),
        ({"variants": {"bn": {"config": "a", "runs": {8: [1]}}}}, ["8: [1]", "[1, 4]"]),
        ({"variants": {"bn": {"config": "a", "runs": {4: [9]}}}}, ["4: [9]", "[1, 2]"]),
        ({"scores": {"a": "b"}}, ["`scores` has no effect", "`config`"]),
        ({"variants": {"bn": {"config": "a.yaml", "overide": {}}}}, ["bn.overide`", "`overrides`"]),
        ({"batches": [0, 1]}, ["`batches`", "1 or more"]),
        ({"batches": [1, 1]}, ["`batches`", "different"]),
        ({"batches": 4}, ["`batches` is 4"]),
        ({"seeds": []}, ["`seeds` is []"]),
        ({"image": 80}, ["`image` is not a key", "did you mean `images`", "batches"]),
        ({"images": "many"}, ["`images` is 'many'"]),
        ({"device": "tpu"}, ["`device` is 'tpu'", "cpu, cuda"]),
        ({"checkpoints": "best"}, ["`checkpoints` is 'best'", "all, last, none"]),
        ({"comparisons": [["gn", "ln"]]}, ["`comparisons`", "['gn', 'ln']", "bn, gn"]),
        ({"comparisons": [[{}, "bn"]]}, ["`comparisons`", "[{}, 'bn']"]),
        (
            {"overrides": {"SOLVER.MAX_ITER": 5}},
            ["SOLVER.MAX_ITER is overridden", "sets for every run"],
        ),
        (
            {"evaluations": 2, "overrides": {"TEST.EVAL_PERIOD": 5}},
            ["TEST.EVAL_PERIOD", "`evaluations` is 2"],
        ),
        ({"search": {**SEARCH, "grid": {"SEED": [1]}}}, ["SEED is overridden"]),
        ({"search": {**SEARCH, "grid": {"SOLVER.BASE_LR": 0.1}}}, ["'SOLVER.BASE_LR': 0.1"]),
        ({"search": {**SEARCH, "grid": {"A": [0.1, "1e-1"]}}}, ["`search`", "[0.1, 0.1]"]),
        ({"search": {**SEARCH, "overrides": {"TEST.EVAL_PERIOD": 5}}}, ["TEST.EVAL_PERIOD"]),
        ({"search": {**SEARCH, "grid": {"TEST.EVAL_PERIOD": [5]}}}, ["TEST.EVAL_PERIOD"]),
        ({"search": {"grid": {"A": [1]}, "batches": [1]}}, ["`search.images` is missing"]),
    ],
)
def test_mistakes_name_the_key(make_study, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_study(**changes)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("text", ["variants: [", "\x00"])
def test_file_that_is_no_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match="s.yaml is not YAML"):
        read_study(tmp_path / "s.yaml")


def test_missing_file_and_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read study file .*none.yaml"):
        read_study(tmp_path / "none.yaml")
    (tmp_path / "s.yaml").write_text("just words")
    with pytest.raises(ConfigError, match="allowed: a mapping"):
        read_study(tmp_path / "s.yaml")
