"""Runs: matched by the linear rule, by hand; and the shipped studies."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from ws_detectron.engine import as_flat_dict, load_config
from ws_detectron.errors import ConfigError
from ws_detectron.lab.study import read_study, read_study_results, search_runs, study_runs
from ws_detectron.lab.study.plan import StudyRun, check_runs, nearest
from ws_detectron.model_zoo import get_config_file

ROOT = Path(__file__).resolve().parents[3]
STUDIES = ROOT / "configs" / "studies"
RECORDS = ROOT / "results" / "batch_size_study"
SEARCH = {
    "grid": {"SOLVER.BASE_LR": [0.08, 0.16], "SOLVER.WEIGHT_DECAY": [0.0001, 0.001, 0.01]},
    "images": 40,
    "batches": [1, 4],
    "seed": 7,
}


def trained(run: StudyRun) -> dict:
    """The config that the run's command trains with."""
    config, *overrides = run.command[run.command.index("--config-file") + 1 :]
    if "auto" in overrides:  # after --num-gpus N --dist-url
        overrides = overrides[overrides.index("auto") + 1 :]
    return as_flat_dict(load_config(config, overrides))


def by_name(runs: list) -> dict:
    return {run.name: run for run in runs}


def test_every_variant_batch_and_seed_once(make_study) -> None:
    runs = by_name(study_runs(make_study(), {}))
    assert set(runs) == {
        f"{a}_{b}img_seed{s}" for a in ("bn", "gn") for b in (1, 4) for s in (1, 2)
    }
    assert len({run.folder for run in runs.values()}) == 8
    assert runs["gn_4img_seed2"].settings["SEED"] == 2


def test_runs_see_the_same_images_at_an_lr_for_their_batch(make_study) -> None:
    """The config: LR 0.04 and 50 iterations of warm-up at 8 images, so 400 images."""
    runs = by_name(study_runs(make_study(evaluations=2), {}))
    for batch, lr, iterations, warmup in ((1, 0.005, 80, 400), (4, 0.02, 20, 100)):
        options = runs[f"bn_{batch}img_seed1"].settings
        assert options["SOLVER.IMS_PER_BATCH"] == batch
        assert options["SOLVER.BASE_LR"] == pytest.approx(lr)
        assert (options["SOLVER.MAX_ITER"], options["SOLVER.WARMUP_ITERS"]) == (iterations, warmup)
        assert options["TEST.EVAL_PERIOD"] == options["SOLVER.CHECKPOINT_PERIOD"] == iterations / 2


def test_several_processes_make_a_larger_step(make_study) -> None:
    run = by_name(study_runs(make_study(processes=2), {}))["bn_4img_seed1"]
    assert run.settings["SOLVER.IMS_PER_BATCH"] == 8 and run.settings["SOLVER.MAX_ITER"] == 10
    assert run.settings["SOLVER.BASE_LR"] == pytest.approx(0.04)
    assert run.images == 80


def test_milestones_keep_their_relative_position(make_study) -> None:
    """The config: LR falls at 400 and 600 of 800 iterations of 8 images."""
    study = make_study(overrides={"SOLVER.STEPS": [400, 600]})
    runs = by_name(study_runs(study, {}))
    assert runs["bn_1img_seed1"].settings["SOLVER.STEPS"] == [40, 60]
    assert runs["bn_4img_seed1"].settings["SOLVER.STEPS"] == [10, 15]


def test_without_images_the_config_says_how_many(make_study) -> None:
    run = by_name(study_runs(make_study(images=None), {}))["bn_4img_seed1"]
    assert run.images == 6400 and run.settings["SOLVER.MAX_ITER"] == 1600


def test_a_config_may_be_for_another_batch_than_its_own(make_study, tmp_path: Path) -> None:
    """LR 0.04 and 800 iterations, here meant for 16 images: 12,800 of them."""
    path = tmp_path / "mine.yaml"
    base = get_config_file("quickstart/mask_rcnn_R_18_FPN_fashion_bn_8img.yaml")
    path.write_text(f"_BASE_: {base}\nSOLVER: {{REFERENCE_IMS_PER_BATCH: 16}}\n")
    study = make_study(images=None, variants={"bn": str(path)})
    run = by_name(study_runs(study, {}))["bn_4img_seed1"]
    assert run.images == 12800 and run.settings["SOLVER.MAX_ITER"] == 3200
    assert run.settings["SOLVER.BASE_LR"] == pytest.approx(0.01)


def test_few_evaluations_do_not_make_few_checkpoints(make_study) -> None:
    """The config: one every 250 iterations of 8 images, so at least one every 2,000 images."""
    runs = by_name(study_runs(make_study(images=6400, evaluations=1), {}))
    for batch, period in ((1, 1600), (4, 400)):
        options = runs[f"bn_{batch}img_seed1"].settings
        assert options["TEST.EVAL_PERIOD"] == 6400 / batch
        assert options["SOLVER.CHECKPOINT_PERIOD"] == period


def test_overrides_are_at_the_reference_batch_and_the_variants_win(make_study) -> None:
    variant = {"config": "quickstart/mask_rcnn_R_18_FPN_fashion_gn_8img.yaml"}
    variant["overrides"] = {"SOLVER.BASE_LR": 0.16, "SOLVER.ACCUMULATE_STEPS": 1}
    study = make_study(
        variants={"gn": variant}, overrides={"SOLVER.BASE_LR": 0.08, "MODEL.WS.EPS": 1e-3}
    )
    run = by_name(study_runs(study, {}))["gn_4img_seed1"]
    assert run.settings["SOLVER.BASE_LR"] == pytest.approx(0.08)
    assert run.settings["MODEL.WS.EPS"] == 1e-3
    # the command line and the record agree
    said = trained(run)
    assert list(said["SOLVER.STEPS"]) == run.settings["SOLVER.STEPS"]
    assert said["SOLVER.BASE_LR"] == run.settings["SOLVER.BASE_LR"]


def test_images_that_make_no_whole_steps(make_study) -> None:
    with pytest.raises(ConfigError, match="bn_4img: 81 images .* steps of 4"):
        study_runs(make_study(images=81), {})


def test_what_cannot_run_is_found_before_anything_starts(make_study) -> None:
    check_runs(study_runs(make_study(), {}))
    with pytest.raises(ConfigError, match="run bn_4img_seed1: DATASETS.TEST names 'no_set'"):
        check_runs(study_runs(make_study(overrides={"DATASETS.TEST": ["no_set"]}), {}))
    with pytest.raises(ConfigError, match="bn_1img_seed1: SOLVER.ACCUMULATE_STEPS is 2"):
        check_runs(study_runs(make_study(overrides={"SOLVER.ACCUMULATE_STEPS": 2}), {}))


def test_search_has_the_same_runs_for_every_variant(make_study) -> None:
    study = make_study(search=SEARCH)
    runs = search_runs(study)
    assert len(runs) == 2 * 2 * 6
    for variant in ("bn", "gn"):
        for batch in (1, 4):
            mine = [run for run in runs if (run.variant, run.batch) == (variant, batch)]
            assert len({tuple(run.choice.values()) for run in mine}) == 6
            for run in mine:
                expected = run.choice["SOLVER.BASE_LR"] * batch / 8
                assert run.settings["SOLVER.BASE_LR"] == pytest.approx(expected)
                assert run.settings["SOLVER.WEIGHT_DECAY"] == run.choice["SOLVER.WEIGHT_DECAY"]
                assert (run.images, run.seed) == (40, 7)
                assert (
                    run.settings["TEST.EVAL_PERIOD"]
                    == run.settings["SOLVER.MAX_ITER"]
                    == 40 / batch
                )
    assert not set(by_name(runs)) & set(by_name(study_runs(study, {})))
    assert search_runs(make_study()) == []


def test_runs_of_a_search_keep_their_folders_when_its_grid_grows(make_study) -> None:
    search = {**SEARCH, "batches": [4]}
    before = by_name(search_runs(make_study(search=search)))
    assert "search_bn_4img_BASE_LR_0.08_WEIGHT_DECAY_0.001" in before
    grid = {
        "SOLVER.BASE_LR": [0.04, 0.08, 0.16],
        "SOLVER.WEIGHT_DECAY": [0.01, 0.001, 0.0001, 0.0],
    }
    after = by_name(search_runs(make_study(search={**search, "grid": grid})))
    assert len(after) == 2 * len(before)
    assert all(after[name].choice == run.choice for name, run in before.items())


def test_names_of_runs_of_a_search_are_unique(make_study) -> None:
    norms = {"MODEL.RESNETS.NORM": ["GN", "BN"], "MODEL.FPN.NORM": ["", "GN"]}
    names = by_name(search_runs(make_study(search={**SEARCH, "grid": norms})))
    assert "search_gn_1img_MODEL.RESNETS.NORM_BN_MODEL.FPN.NORM_GN" in names


def test_runs_take_what_the_search_found_at_the_nearest_batch(make_study) -> None:
    study = make_study(search=SEARCH, batches=[1, 2, 8])
    choices = {
        ("bn", 1): {"SOLVER.BASE_LR": 0.08},
        ("bn", 4): {"SOLVER.BASE_LR": 0.16},
        ("gn", 1): None,
        ("gn", 4): {"SOLVER.BASE_LR": 0.08},
    }
    runs = by_name(study_runs(study, choices))
    assert runs["bn_1img_seed1"].settings["SOLVER.BASE_LR"] == pytest.approx(0.01)
    assert runs["bn_8img_seed1"].settings["SOLVER.BASE_LR"] == pytest.approx(0.16)
    # 2 is as far from 1 as from 4; for gn nothing was found at 1
    assert runs["bn_2img_seed1"].choice == {"SOLVER.BASE_LR": 0.08}
    assert set(runs) & {"gn_1img_seed1", "gn_2img_seed1", "gn_8img_seed1"} == {"gn_8img_seed1"}


def test_nearest_is_by_ratio() -> None:
    assert [nearest(batch, [1, 8]) for batch in (1, 2, 3, 4, 16)] == [1, 1, 8, 8, 8]


def test_coco_study_is_the_configs_of_that_name_and_batch() -> None:
    study = read_study(STUDIES / "coco_8gpu.yaml")
    runs = study_runs(study, {})
    assert len(runs) == 4 * 3 * 3
    for run in runs:
        leaf = f"scratch_mask_rcnn_R_50_FPN_3x_{run.variant}_{run.batch}img.yaml"
        theirs = as_flat_dict(load_config(f"COCO-InstanceSegmentation/{leaf}"))
        ours = trained(run)
        differing = {key for key in theirs if theirs[key] != ours[key]}
        assert differing == {
            "SOLVER.REFERENCE_IMS_PER_BATCH",
            "SOLVER.REFERENCE_WORLD_SIZE",
            "SEED",
            "OUTPUT_DIR",
        }


def test_fashion_study_differs_in_norm_ws_batch_and_what_the_search_chooses() -> None:
    study = read_study(STUDIES / "fashion_scenes.yaml")
    runs = by_name(study_runs(study, {}))
    assert len(runs) == 4 * 4 * 3
    assert {run.images for run in runs.values()} == {3200}
    assert len(search_runs(study)) == 4 * 5
    norms = {f"MODEL.{node}.NORM" for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}
    flags = {f"MODEL.WS.{part}" for part in ("BACKBONE", "FPN", "BOX_HEAD", "MASK_HEAD")}
    builders = {f"MODEL.{node}.NAME" for node in ("BACKBONE", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}
    for batch in (1, 2, 4, 8):
        variants = {
            a: runs[f"{a}_{batch}img_seed1"].settings for a in ("bn", "gn", "bn_ws", "gn_ws")
        }
        for pair, allowed in (
            (("gn", "gn_ws"), flags),
            (("bn_ws", "gn_ws"), norms),
            (("bn", "bn_ws"), builders),
        ):
            first, second = (variants[variant] for variant in pair)
            differing = {key for key in first if first[key] != second[key]} - {"OUTPUT_DIR"}
            assert differing == allowed


def published(folder: Path) -> dict[str, StudyRun]:
    """The runs of the fashion study, by name, with the LR that its search found."""
    study = replace(read_study(STUDIES / "fashion_scenes.yaml"), output=folder)
    results = read_study_results(study, RECORDS)  # they fit the study file, or this raises
    return {r.run.name: r.run for r in results.runs if r.scores}


@pytest.mark.parametrize(
    "file, subject",
    [
        ("R50", {"MODEL.RESNETS.DEPTH", "MODEL.RESNETS.RES2_OUT_CHANNELS"}),
        ("long", {"SOLVER.MAX_ITER", "TEST.EVAL_PERIOD"}),
    ],
)
def test_later_studies_differ_from_the_first_in_their_subject(
    tmp_path: Path, file: str, subject: set[str]
) -> None:
    """PreciseBN acts on BN only; R-50 has the LR of the config, not that of the search."""
    theirs = by_name(study_runs(read_study(STUDIES / "fashion_scenes.yaml"), {}))
    theirs = published(tmp_path) if file == "long" else theirs
    ours = by_name(study_runs(read_study(STUDIES / f"fashion_scenes_{file}.yaml"), {}))
    assert set(ours) == {f"{a}_4img_seed{s}" for a in ("gn", "gn_ws") for s in (1, 2, 3)}
    precise_bn = {"TEST.PRECISE_BN.ENABLED", "TEST.PRECISE_BN.NUM_ITER"}
    for name, run in ours.items():
        differing = {k for k, v in run.settings.items() if v != theirs[name].settings[k]}
        assert differing == {*subject, *precise_bn, "OUTPUT_DIR"}
        longer = run.settings["SOLVER.MAX_ITER"] / theirs[name].settings["SOLVER.MAX_ITER"]
        assert longer == (4 if file == "long" else 1)


def test_decay_study_extends_the_published_records(tmp_path: Path) -> None:
    """Its variants without more decay are runs of the fashion study, with the LR found there."""
    theirs = published(tmp_path)
    ours = by_name(study_runs(read_study(STUDIES / "fashion_scenes_decay.yaml"), {}))
    variants = ("bn", "gn", "bn_ws", "gn_ws")
    for variant, seed in itertools.product(variants, (1, 2, 3)):
        plain, more = (ours[f"{name}_4img_seed{seed}"] for name in (variant, f"{variant}_decay"))
        expected = theirs[plain.name].settings
        assert {k for k, v in plain.settings.items() if v != expected[k]} == {"OUTPUT_DIR"}
        differing = {k for k, v in plain.settings.items() if v != more.settings[k]}
        assert differing == {"OUTPUT_DIR", "SOLVER.WEIGHT_DECAY"}
