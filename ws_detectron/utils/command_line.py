"""Helpers shared by the command-line tools."""

import argparse
from collections.abc import Collection
from typing import Any, Optional

from ws_detectron.errors import UserError


class _Separator(argparse.Action):
    """An option without a value: the arguments after it are positional again."""

    def __call__(self, *_: Any, **__: Any) -> None:
        pass


def add_overrides(
    parser: argparse.ArgumentParser, nargs: Optional[str] = argparse.REMAINDER
) -> None:
    """Adds config overrides, `args.opts`: KEY VALUE pairs at the end of the line or after --opts.

    Args:
        parser: gets the positional argument `opts` and the option --opts.
        nargs: of the positional argument; "*" for `parse_intermixed_args`, None where the parser
            has this argument already, as detectron2's `default_argument_parser`.
    """
    if nargs:
        parser.add_argument("opts", nargs=nargs, metavar="KEY VALUE", help="config overrides")
    parser.add_argument(
        "--opts",
        action=_Separator,
        nargs=0,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help="starts the overrides; needed after an option that takes several values",
    )


def refuse_options_without_effect(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    choice: str,
    allowed: Collection[str],
    where: str,
) -> None:
    """Refuses options that would be ignored.

    Args:
        parser: the parser that returned `args`.
        args: as parsed, before defaults are filled in.
        choice: name of the option that decides which others have an effect.
        allowed: names of the options that have one.
        where: ends the message, such as "with --all".

    Raises:
        UserError: an option that is not allowed differs from its default.
    """
    for name, value in vars(args).items():
        if name not in (choice, *allowed) and value not in (parser.get_default(name), []):
            names = ", ".join(map(_shown, allowed))
            raise UserError(f"{_shown(name)} has no effect {where}; allowed are {names}")


def _shown(name: str) -> str:
    return "KEY VALUE" if name == "opts" else f"--{name.replace('_', '-')}"
