"""Argparse stand-in for the few names of typer that the command line uses.

`pip install .` brings no typer, and most commands need nothing else. One description of the
commands, in `cli/`, is read by either: typer adds colours and completion, and nothing more.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from grace_fast.codebook import printable

PROGRAM = "grace-fast"
EPILOG = "For colours and completion: pip install 'grace_fast[cli]'"
_MISSING = Parameter.empty


class Exit(Exception):
    """Ends a command with a code."""

    def __init__(self, code: int = 0) -> None:
        super().__init__(code)
        self.exit_code = code


@dataclass(frozen=True)
class _Told:
    """What an option is told by, or an argument, which has its place."""

    is_option: bool
    flag: str | None = None  # a truth with one of its own has no opposite
    help: str = ""
    metavar: str | None = None
    min: int | None = None


Option, Argument = partial(_Told, True), partial(_Told, False)


def echo(text: str, err: bool = False) -> None:
    """Print a line, to standard error where it is about one."""
    print(text, file=sys.stderr if err else sys.stdout)


class _Parser(argparse.ArgumentParser):
    """A parser that spells out what it was given: its error quotes arguments as they are."""

    def error(self, message: str) -> NoReturn:
        super().error(printable.fit(message, sys.stderr))


class Typer:
    """Commands, each a function whose annotated parameters are its options and arguments."""

    def __init__(
        self, help: str = "", no_args_is_help: bool = False, pretty_exceptions_enable: bool = True
    ) -> None:
        self._help = help
        self._first: Callable[..., Any] = lambda: None
        self._commands: dict[str, Callable[..., Any]] = {}

    def callback(
        self, invoke_without_command: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Take a function for what comes before every command, or without one."""

        def take(function: Callable[..., Any]) -> Callable[..., Any]:
            self._first = function
            return function

        return take

    def command(
        self, name: str | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Take a function for a command, by its own name or another."""

        def take(function: Callable[..., Any]) -> Callable[..., Any]:
            self._commands[name or function.__name__.replace("_", "-")] = function
            return function

        return take

    def __call__(self, given: Sequence[str] | None = None) -> None:
        """Run the command that is given, by default by the process's arguments, and end."""
        parser = self._parser()
        found = vars(parser.parse_args(given))
        name = found.pop("")
        at_first = {one: found.pop(one) for one in signature(self._first).parameters}
        try:
            self._first(**at_first)
            if name is None:
                parser.print_help()
                raise Exit(2)
            self._commands[name](**found)
        except Exit as end:
            sys.exit(end.exit_code)
        sys.exit(0)

    def _parser(self) -> argparse.ArgumentParser:
        parser = _Parser(PROGRAM, description=self._help, epilog=EPILOG)
        _describe(parser, self._first)
        commands = parser.add_subparsers(dest="", metavar="COMMAND", title="commands")
        for name, function in self._commands.items():
            words = (function.__doc__ or "").strip()
            first = words.splitlines()[0].replace("%", "%%") if words else ""
            one = commands.add_parser(
                name,
                help=first,
                description=words.replace("%", "%%"),
                epilog=EPILOG,
                allow_abbrev=False,
            )
            _describe(one, function)
        return parser


def _describe(parser: argparse.ArgumentParser, function: Callable[..., Any]) -> None:
    """Add a function's parameters to a parser."""
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in signature(function).parameters.items():
        kind, told = get_args(hints[name])[:2]
        assert isinstance(told, _Told), "every parameter of a command is annotated"
        plain, is_list = _plain(kind)
        default = None if parameter.default is _MISSING else parameter.default
        how: dict[str, Any] = {"help": told.help.replace("%", "%%")}
        if not told.is_option:
            how |= {"type": _reader(plain, None), "metavar": told.metavar or name.upper()}
            if is_list:
                how["nargs"] = "+"
            elif parameter.default is not _MISSING:
                how |= {"nargs": "?", "default": default}
            parser.add_argument(name, **how)
            continue
        flag = told.flag or f"--{name.replace('_', '-')}"
        how |= {"dest": name, "default": default}
        if plain is bool:
            how["action"] = "store_true" if told.flag else argparse.BooleanOptionalAction
        else:
            how |= {"type": _reader(plain, told.min), "metavar": plain.__name__.upper()}
            how["required"] = parameter.default is _MISSING
            if is_list:
                how["action"] = "append"
            if default not in (None, ""):
                how["help"] += f" By default {default}.".replace("%", "%%")
        parser.add_argument(flag, **how)


def _plain(kind: Any) -> tuple[type, bool]:
    """Return what one value is, and whether there may be several; None beside it says nothing."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = [one for one in get_args(kind) if one is not type(None)]
    if get_origin(kind) is list:
        return get_args(kind)[0], True
    return kind, False


def _reader(kind: type, least: int | None) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value

    read.__name__ = "number" if kind in (int, float) else "path" if kind is Path else kind.__name__
    return read
