"""What the command writes: results on stdout, everything else on stderr, and the exit code.

A command is a function that returns a `Result`, and `command` makes it one that typer can run. So printing, JSON, error
lines and exit codes are decided here once, and no command prints on its own.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple, ParamSpec, TextIO

import msgspec
import typer

from convplan._errors import ConvPlanError, ConvPlanWarning
from convplan.report import one_line

Parameters = ParamSpec("Parameters")


class Result(NamedTuple):
    """What a command found out.

    Args:
        text: for people.
        data: for `--json`, an object or a list of them; its keys are part of the command's interface.
        ok: False when the command failed, or when the answer to its question is no.
    """

    text: str
    data: Mapping[str, object] | Sequence[object]
    ok: bool = True


class CommandError(Exception):
    """A command failed for a reason outside convplan: the user's own callable raised, or a package is missing.

    Attributes:
        kind: the exception type's name to report.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def command(function: Callable[Parameters, Result]) -> Callable[Parameters, None]:
    """Make a function that returns a `Result` into one that prints it and ends with its exit code.

    The function's keyword argument `as_json` chooses the form. A `ConvPlanError` or `CommandError` becomes an error
    line, and `{"error": …}` where JSON was asked for; anything else that is raised is a bug, and keeps its traceback.
    """

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            with _warnings_as_lines():
                result = function(*args, **kwargs)
        except (ConvPlanError, CommandError) as exc:
            complain("error", str(exc))
            kind = exc.kind if isinstance(exc, CommandError) else type(exc).__name__
            if as_json:
                typer.echo(_json({"error": {"type": kind, "message": str(exc)}}))
            raise typer.Exit(1) from exc
        typer.echo(_json(result.data) if as_json else result.text)
        raise typer.Exit(0 if result.ok else 1)

    return run


def complain(what: str, message: str) -> None:
    """One line on stderr; a message of several lines keeps them, without what could move a terminal's cursor."""
    lines = message.splitlines() or [""]
    typer.echo("\n".join([f"{what}: {one_line(lines[0])}", *(f"  {one_line(line)}" for line in lines[1:])]), err=True)


def _json(data: Mapping[str, object] | Sequence[object]) -> str:
    return msgspec.json.format(msgspec.json.encode(data), indent=2).decode()


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show convplan's warnings as lines like its errors, others as Python does."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, ConvPlanWarning):
                complain("warning", str(message))
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


class Progress:
    """Progress on stderr: a bar on a terminal, and one line for each step where stderr goes to a file."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn(what, markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)
        self._done = 0

    def step(self, done: int, total: int, text: str) -> None:
        """`done` of `total` are finished; `text` says which one was last, or which one is being worked on now."""
        shown = one_line(text)
        self._bar.update(self._task, completed=done, total=total, description=shown)
        if self._bar.disable and done > self._done:
            typer.echo(f"[{done}/{total}] {shown}", err=True)
        self._done = done

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
