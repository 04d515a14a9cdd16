"""--help of every tool: what it does, what each option does, its default, and an example."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ws_detectron.utils.command_line import ToolParser

TOOLS = sorted(path.name for path in Path(__file__).parents[2].joinpath("tools").glob("*.py"))
EXTRAS = (
    *("markdown", "onnx", "onnxruntime", "faster_coco_eval", "pandas", "psutil", "scipy"),
    *("submitit", "timm", "mmdet", "mmcv", "safetensors", "tensorboard"),
)
ALL = """
import contextlib, io, runpy, sys
sys.path[:0] = [sys.argv[1]]
sys.modules.update(dict.fromkeys(sys.argv[2].split(",")))  # importing one is an error
for tool in sys.argv[3:]:
    sys.argv = [tool, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(f"{sys.path[0]}/{tool}", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, tool
    except ImportError as error:
        print(tool, error)
"""


def test_no_help_needs_an_optional_package() -> None:
    tools = str(Path(__file__).parents[2] / "tools")
    done = subprocess.run(
        [sys.executable, "-c", ALL, tools, ",".join(EXTRAS), *TOOLS],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            yield action


@pytest.mark.parametrize("tool", TOOLS)
def test_help_says_what_and_shows_how(
    tool: str, call_tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsers: list[argparse.ArgumentParser] = []
    print_help = argparse.ArgumentParser.print_help

    def kept(self: argparse.ArgumentParser, file: object = None) -> None:
        parsers.append(self)
        print_help(self)

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", kept)
    status, text, _ = call_tool(tool, "--help")
    assert status == 0
    (parser,) = parsers
    assert parser.description and parser.description.strip()[0].isupper()
    assert f"python tools/{tool}" in text
    missing = [action.dest for action in actions(parser) if not action.help]
    assert missing == []
    if isinstance(parser, ToolParser):  # the others are detectron2's, and one without packages
        silent = [
            action.dest
            for action in actions(parser)
            if action.default not in (None, False, [], argparse.SUPPRESS)
            and action.nargs != 0
            and "default" not in str(action.help)
        ]
        assert silent == []


OF_MODELS, OF_FILES = ("--config-file", "--output", "--device", "--opts"), ("--input", "--output")


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        *((tool, OF_MODELS) for tool in ("evaluate_coco.py", "train_net.py", "visualize.py")),
        *((tool, OF_FILES) for tool in ("check_dataset.py", "compare_runs.py", "visualize.py")),
        ("run_study.py", ("--input", "--device")),
    ],
)
def test_names_of_detectron2_are_options(tool: str, options: tuple[str, ...], call_tool) -> None:
    status, text, _ = call_tool(tool, "--help")
    assert status == 0 and set(options) <= set(re.findall(r"--[\w-]+", text))
