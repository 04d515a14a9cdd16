"""What the command-line tools share."""

import argparse
from collections.abc import Collection

from ws_detectron.errors import UserError


def refuse_options_without_effect(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    choice: str,
    taken: Collection[str],
    where: str,
) -> None:
    """An option that would be ignored was hardly meant so.

    Args:
        parser: which gave `args`.
        args: as parsed, nothing filled in.
        choice: name of the option that says what is done.
        taken: names of the others that have an effect.
        where: such as "with --all".

    Raises:
        UserError: another option is not at its default.
    """
    for name, value in vars(args).items():
        if name not in (choice, *taken) and value not in (parser.get_default(name), []):
            allowed = ", ".join(_shown(option) for option in taken)
            raise UserError(f"{_shown(name)} has no effect {where}; allowed are {allowed}")


def _shown(name: str) -> str:
    return "KEY VALUE" if name == "opts" else f"--{name.replace('_', '-')}"
