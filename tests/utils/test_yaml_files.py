"""YAML files that would run code, loop, expand or hide a key: each is refused in one line."""

import os
import time
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.model_zoo import get_config_file

from ws_detectron.engine import load_config
from ws_detectron.errors import ConfigError, UserError
from ws_detectron.evaluation.runs import read_run
from ws_detectron.lab.study import read_study
from ws_detectron.model_zoo import get_config
from ws_detectron.utils.yaml_files import load_yaml_with_base, merge_config_file, read_yaml

RUNS = {
    "apply": '!!python/object/apply:os.system ["touch {proof}"]',
    "new": "!!python/object/new:os._wrap_close [!!python/object/apply:os.popen ['touch {proof}']]",
    "name": "!!python/name:os.system",
    "module": "!!python/module:antigravity",
    "eval": "!!python/object/apply:eval [\"open({proof!r}, 'w')\"]",
    "verbatim": '!<tag:yaml.org,2002:python/object/apply:os.system> ["touch {proof}"]',
}


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """Exists if code in a file has run."""
    return tmp_path / "code_was_run"


def refusal(path: Path, error: type = ConfigError) -> str:
    start = time.perf_counter()
    with pytest.raises(error) as caught:
        load_config(str(path))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert time.perf_counter() - start < 5  # otherwise it would take minutes or forever
    return message


@pytest.mark.parametrize("value", RUNS.values(), ids=list(RUNS))
@pytest.mark.parametrize("chain", ["itself", "base", "list", "base of base"])
def test_tag_that_runs_code(tmp_path: Path, proof: Path, value: str, chain: str) -> None:
    value = value.replace("{proof!r}", repr(str(proof))).replace("{proof}", str(proof))
    bad, path = tmp_path / "bad.yaml", tmp_path / "config.yaml"
    bad.write_text(f"SOLVER:\n  MAX_ITER: {value}\n")
    (tmp_path / "good.yaml").write_text("SOLVER: {BASE_LR: 0.1}\n")
    (tmp_path / "middle.yaml").write_text("_BASE_: bad.yaml\n")
    bases = {"base": "bad.yaml", "list": "[good.yaml, bad.yaml]", "base of base": "middle.yaml"}
    path.write_text(f"_BASE_: {bases.get(chain)}\n")
    message = refusal(bad if chain == "itself" else path)
    assert str(bad) in message and "line 2" in message and "!!python/" in message
    assert not proof.exists()


def test_tag_in_a_run_a_study_and_its_arm(tmp_path: Path, proof: Path) -> None:
    value = RUNS["apply"].format(proof=proof)
    (tmp_path / "config.yaml").write_text(f"SEED: {value}\n")
    run = read_run(tmp_path, "run")
    assert any("!!python/object/apply:os.system" in problem for problem in run.problems)
    with pytest.raises(ConfigError, match="study file .*line 1.*!!python/object/apply:os.system"):
        read_study(tmp_path / "config.yaml")
    assert not proof.exists()


def test_tuple_and_unknown_tags_say_what_to_write(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("SOLVER: {STEPS: !!python/tuple [1, 2]}")
    assert "!!python/tuple is not allowed: remove it; a list" in refusal(path)
    path.write_text("SOLVER: {STEPS: !mine [1, 2]}")
    assert "the tag !mine is not allowed" in refusal(path)
    path.write_text("SOLVER: {STEPS: !!seq [1, 2], BASE_LR: !!float 1}")
    assert load_config(str(path)).SOLVER.STEPS == (1, 2)


def test_detectron2_s_own_retinanet_is_read(tmp_path: Path) -> None:
    zoo = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    path = tmp_path / "config.yaml"
    path.write_text(f"_BASE_: {zoo}\nSOLVER: {{BASE_LR: 0.5}}\n")
    expected = get_cfg()
    expected.merge_from_file(zoo)
    for file in (zoo, path):
        cfg = load_config(str(file))
        assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == expected.MODEL.ANCHOR_GENERATOR.SIZES
        assert type(cfg) is CfgNode and type(cfg.MODEL.RPN) is CfgNode
    assert cfg.SOLVER.BASE_LR == 0.5
    # neither a copy nor a link inside the zoo to another file is trusted
    base = Path(get_config_file("Base-RetinaNet.yaml"))
    (tmp_path / "copy.yaml").write_text(base.read_text())
    assert "!!python/object/apply:eval" in refusal(tmp_path / "copy.yaml")
    outside = tmp_path / "outside.yaml"
    outside.symlink_to(base)
    assert load_config(str(outside)).MODEL.RETINANET.IOU_LABELS == [0, -1, 1]


def test_link_in_the_zoo_to_a_file_outside(
    tmp_path: Path, proof: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = tmp_path / "detectron2" / "model_zoo" / "configs"
    zoo.mkdir(parents=True)
    monkeypatch.setattr("detectron2.__file__", str(tmp_path / "detectron2" / "__init__.py"))
    text = f"SEED: !!python/object/apply:os.system ['touch {proof}']"
    (tmp_path / "outside.yaml").write_text(text)
    (zoo / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    (zoo / "Base-RetinaNet.yaml").write_text("SEED: !!python/object/apply:eval ['3 * 7']")
    refusal(zoo / "link.yaml")
    refusal(zoo / ".." / "configs" / "link.yaml")
    assert not proof.exists()
    assert load_config(str(zoo / "Base-RetinaNet.yaml")).SEED == 21


@pytest.mark.parametrize(
    "bases, parts",
    [
        ({"a": "a.yaml"}, ["a.yaml is its own _BASE_"]),
        ({"a": "b.yaml", "b": "../{folder}/a.yaml"}, ["is its own _BASE_", "b.yaml -> "]),
        ({"a": "[c.yaml, b.yaml]", "b": "a.yaml"}, ["is its own _BASE_"]),
        ({"a": "none.yaml"}, ["cannot read config file", "none.yaml", "(_BASE_ of ", "a.yaml)"]),
        ({"a": "."}, ["directory"]),
        ({"a": "/dev/zero"}, ["/dev/zero", "device"]),
        ({"a": "5"}, ["_BASE_ is 5; allowed: a file, or a list"]),
        ({"a": "[b.yaml, 5]"}, ["_BASE_ is ['b.yaml', 5]; allowed"]),
        ({"a": "{{b: c}}"}, ["_BASE_ is {'b': 'c'}"]),
        ({"a": "b.yaml", "b": ""}, ["b.yaml (_BASE_ of", "is empty"]),
    ],
)
def test_bases(tmp_path: Path, bases: dict[str, str], parts: list[str]) -> None:
    for name, base in bases.items():
        text = f"_BASE_: {base.format(folder=tmp_path.name)}\n" if base else ""
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "c.yaml").write_text("SEED: 1\n")
    message = refusal(tmp_path / "a.yaml", UserError)
    assert all(part in message for part in parts), message


def test_bases_that_double_at_every_step(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.yaml").write_text(f"_BASE_: [{i + 1}.yaml, {i + 1}.yaml]\n")
    (tmp_path / "30.yaml").write_text("SEED: 1\n")
    assert "more than 200 _BASE_ files" in refusal(tmp_path / "0.yaml")


def laughs(first: str, template: str, steps: int = 40) -> str:
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} " + template.replace("*", f"*a{i - 1}") for i in range(1, steps)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text, part",
    [
        (laughs("[1, 2]", "[*, *]"), "aliases expand"),
        (laughs("{k: 1}", "{<<: [*, *], x: *}"), "aliases expand"),
        ("SEED: &a [*a]", "line 1: an alias refers to the value"),
        ("SEED: " + "[" * 100_000, "nested"),
        ("SEED: " + "[" * 900 + "]" * 900, "nested more than 50"),
        ("".join(" " * i + "a:\n" for i in range(500)), "nested"),
        ("SEED: 1\nSOLVER:\n  MAX_ITER: 1\nSEED: 2\n", "line 4: duplicate key SEED"),
        ("SOLVER: {MAX_ITER: 1, BASE_LR: 2, MAX_ITER: 1}", "duplicate key MAX_ITER"),
        ("- SEED\n- 1\n", "is a list; allowed: a YAML mapping"),
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("SOLVER:\n\tMAX_ITER: 1\n", "is not YAML: "),
        ("SEED: 1\n---\nSEED: 2\n", "is not YAML: "),
        (f"SOLVER: {{MAX_ITER: {10**300}}}", "SOLVER.MAX_ITER is an integer of 997 bits"),
        (f"SOLVER: {{MAX_ITER: '{10**300}'}}", "SOLVER.MAX_ITER is an integer of 997 bits"),
        (f"SEED: {'9' * 5000}", "a number of 5000 characters"),
        ("SEED: " + ":".join(["1"] * 300_000), "a number of"),
        ("SOLVER: {1: 2}", "the key 1 is not a string"),
        ("SOLVER: {STEPS: 2020-01-01}", "SOLVER.STEPS"),
        ("SEED: " + "'" + "-" * 200_000 + "1'", "a value cannot be evaluated"),
    ],
)
def test_text_that_is_no_sound_config(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    message = refusal(path, UserError)
    assert part in message and str(path) in message or "the config" in message, message


@pytest.mark.parametrize("content", [b"SEED: \xe9\n", "SEED: 1\n".encode("utf-16"), b"\xff" * 9])
def test_other_encodings(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert "UTF-8" in refusal(path, UserError)
    path.write_bytes(b"\xef\xbb\xbfSEED: 5\n")  # a byte order mark, as some editors write it
    assert load_config(str(path)).SEED == 5


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "config.yaml").write_text("_BASE_: pipe.yaml\n")
    assert "pipe.yaml" in refusal(tmp_path / "config.yaml", UserError)
    with pytest.raises(UserError, match="is a directory, device or pipe"):
        read_yaml(tmp_path / "pipe.yaml")


def test_same_result_as_fvcore(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("A: {x: 1, y: [1, 2]}\nB: &b {z: text}\nC: *b\n")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\nA: {y: null, w: {v: yes}}\nD: 1_000\n")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml]\nE: !!binary aGk=\n")
    found = load_yaml_with_base(tmp_path / "c.yaml")
    assert found == CfgNode.load_yaml_with_base(str(tmp_path / "c.yaml"), allow_unsafe=False)
    assert found["A"] == {"x": 1, "y": None, "w": {"v": True}} and found["E"] == b"hi"


def test_old_configs_are_upgraded_and_a_refused_one_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "v1.yaml"
    path.write_text("MODEL: {ROI_HEADS: {NUM_CLASSES: 5}}\nVERSION: 1\n")
    cfg, expected = get_cfg(), get_cfg()
    merge_config_file(cfg, path)
    expected.merge_from_file(str(path))
    assert cfg == expected
    path.write_text("SEED: 3\nNO_SUCH_KEY: 1\n")
    with pytest.raises(KeyError):
        merge_config_file(cfg, path)
    assert cfg == expected


def test_every_config_of_the_package_has_each_key_once() -> None:
    """Configs named through the model zoo follow the same rules."""
    name = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"
    assert get_config(name).MODEL.BACKBONE.NAME == "build_ws_resnet_fpn_backbone"
    for path in sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")):
        assert read_yaml(path) == yaml.safe_load(path.read_text())
