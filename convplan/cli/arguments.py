"""From what was typed to what the package takes: sizes, policies, and callables in files.

What is wrong here is wrong usage: it raises typer's `BadParameter`, which ends with exit code 2.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import typer

from convplan._errors import PolicyError
from convplan._policy import Policy
from convplan.cli.output import CommandError

if TYPE_CHECKING:
    from convplan._problem import Problem
    from convplan._problem_files import NamedProblem

_UNITS = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
}


def byte_count(text: str) -> int:
    """`0`, `1048576`, `64MiB`, `1.5 GB`: a number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS:
        raise typer.BadParameter(f"found {text!r}, expected a number of bytes such as 0, 1048576 or 64MiB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def make_policy(
    *,
    deterministic: bool | None,
    engines: str | None,
    budget_s: float | None,
    workspace_limit_bytes: int | None,
    effort: str | None = None,
    search_s: float | None = None,
) -> Policy:
    """The policy that the options describe; what was not given keeps its default."""
    chosen: dict[str, object] = {
        "deterministic": deterministic,
        "engines": None if engines is None else tuple(engines.split(",")),
        "budget_s": budget_s,
        "workspace_limit_bytes": workspace_limit_bytes,
        "effort": effort,
        "search_s": search_s,
    }
    try:
        policy = Policy().replace(**{name: value for name, value in chosen.items() if value is not None})
        if policy.engines is not None:
            from convplan.engines import registry

            registry.allowed(policy.engines)
    except PolicyError as exc:
        raise typer.BadParameter(str(exc)) from exc
    return policy


def one_problem(text: str) -> Problem:
    """The problem that a line of a log or an error describes."""
    from convplan._errors import SpecError
    from convplan._problem import Problem

    try:
        return Problem.parse(text)
    except SpecError as exc:
        raise typer.BadParameter(str(exc)) from exc


def load_problems(file: Path | None, lines: Sequence[str] | None) -> list[NamedProblem]:
    """The problems of `--problems FILE.json`, and then those of each `--problem LINE`, whose name is the line.

    Raises:
        BadParameter: neither was given, a line is none, or a problem was given twice.
    """
    from convplan._problem_files import read_problems, with_name

    problems = [one_problem(line) for line in lines or ()]
    named = [] if file is None else read_problems(file)
    for problem in problems:
        one = with_name(problem, len(named), str(problem))
        if one.name in [before.name for before in named]:
            raise typer.BadParameter(f"found --problem {one.name!r} twice, expected it once")
        named.append(one)
    if file is None and not named:
        raise typer.BadParameter('expected --problems FILE.json or --problem "…"')
    return named


def load_callable(target: str) -> Callable[[], object]:
    """The callable that `FILE.py:callable` names. The file is run as a module, with its directory importable.

    Raises:
        BadParameter: there is no such file, or no such callable in it.
        CommandError: running the file raised.
    """
    path_text, separator, name = target.rpartition(":")
    path = Path(path_text)
    if not (separator and path_text and name.isidentifier()):
        raise typer.BadParameter(f"found {target!r}, expected FILE.py:callable")
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path_text!r}")
    found = getattr(_run_file(path), name, None)
    if not callable(found):
        what = "nothing of that name" if found is None else f"{name} is {type(found).__name__}, expected a callable"
        raise typer.BadParameter(f"{path}: {what} ({target!r})")
    called = cast("Callable[[], object]", found)

    def run() -> object:
        try:
            return called()
        except Exception as exc:
            raise _failed(target, exc) from exc

    return run


def _run_file(path: Path) -> ModuleType:
    name = f"_convplan_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise typer.BadParameter(f"{path} is no Python file, expected FILE.py:callable")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        raise _failed(str(path), exc) from exc
    return module


def _failed(target: str, exc: BaseException) -> CommandError:
    """Names the exception and the innermost frame of its traceback."""
    frames = traceback.extract_tb(exc.__traceback__)
    if isinstance(exc, SyntaxError) and exc.filename:
        where = f" ({exc.filename}:{exc.lineno})"
    else:
        where = f" ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    kind = type(exc).__name__
    said = f": {exc}" if str(exc) else ""
    return CommandError(f"{target} raised {kind}{said}{where}", kind)
