"""Registration of commands, and what they share: options, exit codes, refusals in one line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast, get_type_hints

import grace_fast as gf
from grace_fast import errors
from grace_fast.tools.terminal import say, say_json

try:
    import rich  # noqa: F401  (typer imports it only when it has something to draw)
    import typer as typer
except ImportError:
    from grace_fast.tools import arguments as typer  # type: ignore[no-redef]

app = typer.Typer(
    help="GRACE: lifelong edits of a language model, found again exactly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
FAILED = 1
CANNOT_BEGIN = 2
LOST = 3  # it was repaired, and not all of it is there any more
INTERRUPTED = 130  # by Control-C, as shells count it

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Do nothing where a line is wrong, or cannot be edited.")
]
Replacement = Annotated[str, typer.Option(help="replace_prompt, replace_last or replace_all.")]
Saved = Annotated[Path, typer.Argument(help="A saved codebook.")]
Editable = Annotated[Path, typer.Argument(help="A codebook that attach(path=) edits.")]
KeyFile = Annotated[
    Path | None, typer.Option(help="A file with the key that the directory is signed with.")
]


def command(
    name: str | None = None, also: tuple[type[Exception], ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Take a function for a command, whose refusals are told in one line, with their exit code.

    The command's options are its parameters, or the fields of the one dataclass that it takes. A
    refusal is an OSError, a ValueError or one of `also`, or a module that is not installed.
    """
    refusals: tuple[type[Exception], ...] = (OSError, ValueError, *also)

    def take(function: Callable[..., None]) -> Callable[..., None]:
        called, call = name or function.__name__, _by_option(function)

        @functools.wraps(call)
        def guarded(*given: Any, **named: Any) -> None:
            try:
                call(*given, **named)
            except BrokenPipeError:  # who read the output has seen enough
                raise
            except ImportError as error:
                fail(errors.told(f"grace-fast {called}", error), CANNOT_BEGIN)
            except refusals as error:
                fail(str(error))

        app.command(name)(guarded)
        return function

    return take


def _by_option(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command as a function of its options, where it takes them in one dataclass."""
    names = list(signature(function).parameters)
    kind: Any = get_type_hints(function)[names[0]] if len(names) == 1 else None
    if not is_dataclass(kind):
        return function
    hints, made = get_type_hints(kind, include_extras=True), cast(Callable[..., Any], kind)

    @functools.wraps(function)
    def call(**options: Any) -> None:
        function(made(**options))

    parameters = [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """GRACE: lifelong edits of a language model, found again exactly."""
    if show:
        say(gf.__version__)
        raise typer.Exit


def fail(message: str, code: int = FAILED) -> NoReturn:
    """End the command with an error."""
    say(f"error: {message}", err=True)
    raise typer.Exit(code)


def answer(figures: Mapping[str, Any], said: str, as_json: bool) -> None:
    """Print what was done."""
    if as_json:
        say_json(figures)
    else:
        say(said)


def read_key(file: Path | None) -> bytes | None:
    """Return what a file of a key holds."""
    try:
        return None if file is None else file.read_bytes()
    except OSError as error:
        fail(f"cannot read the key: {error}")
