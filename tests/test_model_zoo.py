"""Finding the package's configs by name."""

from pathlib import Path

import pytest

from ws_detectron import model_zoo
from ws_detectron.errors import UserError

NAME = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn_ws_1img.yaml"


def test_finds_a_config_in_the_repository() -> None:
    path = Path(model_zoo.get_config_file(NAME))
    assert path == Path(__file__).parents[1] / "configs" / NAME
    assert path.is_file()


def test_wrong_name_shows_the_path_and_the_nearest_names() -> None:
    wrong = NAME.replace("_gn_ws_", "_gnws_")
    with pytest.raises(UserError) as caught:
        model_zoo.get_config_file(wrong)
    message = str(caught.value)
    assert repr(wrong) in message
    assert str(Path(__file__).parents[1] / "configs" / wrong) in message
    assert f"did you mean {NAME}" in message


def test_name_unlike_any_other_gets_no_suggestion() -> None:
    for name in ("zzz", "output/config.yaml"):
        with pytest.raises(UserError, match=f"no file /.*/{name} or .*configs/{name}$"):
            model_zoo.get_config_file(name)


def test_a_full_path_is_shown_once() -> None:
    with pytest.raises(UserError) as caught:
        model_zoo.get_config_file("/nowhere/a.yaml")
    assert str(caught.value) == "no config '/nowhere/a.yaml': there is no file /nowhere/a.yaml"


def test_names_are_those_of_all_files_and_lead_back_to_them() -> None:
    names = model_zoo.config_names()
    files = (Path(__file__).parents[1] / "configs").rglob("*.yaml")
    assert names == sorted(names)
    assert {Path(model_zoo.get_config_file(name)) for name in names} == set(files)


def test_config_has_the_defaults_and_the_file_merged() -> None:
    cfg = model_zoo.get_config(NAME)
    assert cfg.MODEL.WS.BACKBONE
    assert cfg.MODEL.BACKBONE.NAME == "build_ws_resnet_fpn_backbone"
    assert cfg.MODEL.RESNETS.NORM == "GN"
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 8


def test_configs_inside_the_package_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.yaml").write_text("VERSION: 2\n")
    monkeypatch.setattr(model_zoo, "_PACKAGED", tmp_path)
    assert model_zoo.config_names() == ["a/b.yaml"]
    assert model_zoo.get_config_file("a/b.yaml") == str(tmp_path / "a" / "b.yaml")
