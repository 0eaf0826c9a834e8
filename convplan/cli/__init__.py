"""The command `convplan`. `main` is its entry point; everything else loads when it is called.

`app` declares the commands and their options, `arguments` turns what was typed into policies and callables, `output` is
the only place that writes to stdout and stderr, and `doctor`, `planning`, `gpus`, `stored` and `demo` do what a command
says, most of them by calling what the package exports. Importing this imports neither typer nor torch: `convplan
--help` answers at once, and `convplan doctor` also where torch cannot be imported.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the command's name. None: those of this process.

    Returns:
        The exit code: 0 done, 1 failed or the answer is no, 2 wrong usage.
    """
    from convplan.cli.app import app

    try:
        app(args=None if argv is None else list(argv), prog_name="convplan")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    return 0
