import argparse
import importlib.util
import os
import subprocess
import sys

import pytest
from detectron2.engine import default_argument_parser

from ws_detectron.errors import UserError
from ws_detectron.utils.command_line import add_overrides, refuse_options_without_effect


@pytest.mark.parametrize(
    "arguments",
    [
        ["--eval-only", "KEY", "-1", "--other", "x"],
        ["--opts", "KEY", "-1", "--other", "x"],
        ["--input", "a", "b", "--eval-only", "--opts", "KEY", "-1", "--other", "x"],
        ["--input", "a", "b", "--opts", "KEY", "-1", "--other", "x"],
    ],
)
def test_overrides_end_the_line_or_follow_opts(arguments: list[str]) -> None:
    own, detectron2s = argparse.ArgumentParser(), default_argument_parser()
    own.add_argument("--eval-only", action="store_true")
    for parser, nargs in ((own, argparse.REMAINDER), (detectron2s, None)):
        parser.add_argument("--input", nargs="+", default=[])
        add_overrides(parser, nargs)
        args = parser.parse_args(arguments)
        assert args.opts == ["KEY", "-1", "--other", "x"]
        assert args.input == (["a", "b"] if "--input" in arguments else [])
        assert args.eval_only == ("--eval-only" in arguments)


def test_no_overrides() -> None:
    parser = argparse.ArgumentParser()
    add_overrides(parser)
    assert parser.parse_args([]).opts == parser.parse_args(["--opts"]).opts == []


def test_overrides_beside_other_positionals() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("--batches", nargs="+")
    add_overrides(parser, nargs="*")
    args = parser.parse_intermixed_args(["step", "--batches", "1", "2", "--opts", "KEY", "1"])
    assert vars(args) == {"what": "step", "batches": ["1", "2"], "opts": ["KEY", "1"]}


def refuse(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--depth", type=int)
    parser.add_argument("opts", nargs="*")
    args = parser.parse_args(arguments)
    refuse_options_without_effect(parser, args, "what", ["batch_size"], f"with {args.what}")


def test_options_with_an_effect_and_defaults_pass() -> None:
    refuse("step", "--batch-size", "4")
    refuse("step")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "50"], "^--depth has no effect with step; allowed are --batch-size$"),
        (["KEY", "1"], "^KEY VALUE has no effect with step"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        refuse("step", *arguments)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "Qt4Agg"])
def test_a_backend_that_cannot_be_loaded_gives_way(backend: str) -> None:
    """As a notebook leaves it to the programs that it starts, or an old version of matplotlib."""
    script = (
        "import ws_detectron.evaluation.curves as curves, io, os\n"
        "figure = curves.draw_learning_curves([])\n"
        "figure.savefig(io.BytesIO(), format='png')\n"
        "print(os.environ['MPLBACKEND'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MPLBACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    usable = "inline" in backend and importlib.util.find_spec("matplotlib_inline") is not None
    assert done.stdout == (f"{backend}\n" if usable else "Agg\n")


def test_a_backend_that_works_stays() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import ws_detectron, os; print(os.environ['MPLBACKEND'])"],
        env={**os.environ, "MPLBACKEND": "svg"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "svg\n"), done.stderr
