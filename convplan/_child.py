"""A Python process of our own that answers messages, each with a deadline. Knows nothing of convolutions.

What must not happen in the user's process (a candidate that may crash, stall or overwrite memory; stock torch in a
process that nothing else has touched) happens in a child. Messages are bytes, JSON by agreement of the two sides;
nothing is pickled. A child ends with its parent, however that ends, and takes along what it started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import IO

PARENT_VARIABLE = "_PARENT_OF_CHILD"  # between the two sides only
SHOWN_STDERR_BYTES = 2_000
CLOSING_S = 2.0  # a child told to end may take that long
KILLING_S = 30.0  # the kernel may wait for a GPU before it takes a killed process down
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ChildLate(Exception):
    """The child did not answer in time. It is still running; `kill` it."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(f"no answer within {deadline_s:g} s")
        self.deadline_s = deadline_s


class ChildDied(Exception):
    """The child ended without an answer.

    Attributes:
        status: its exit status; below 0 the number of the signal that ended it.
        said: the end of what it wrote to its error output.
    """

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"the process ended: {status_text(status)}" + (f"; it said: {said}" if said else ""))
        self.status = status
        self.said = said

    @property
    def how(self) -> str:
        """The exit status in words, such as `SIGSEGV`."""
        return status_text(self.status)


class Child:
    """One child process.

    Args:
        module: run as `python -m MODULE` by this process's interpreter; it calls `connection_to_parent` first.
        arguments: after the module's name.
        environ: variables to set for it, on top of this process's own.

    Raises:
        OSError: it cannot be started.
        ValueError: this system has no such processes.
    """

    def __init__(self, module: str, arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> None:
        ours, theirs = _pipe()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        # What can be imported here can be there, and nothing else: `python -m` would put its directory in front.
        paths = [str(Path(__file__).parent.parent), *(path or str(Path.cwd()) for path in sys.path)]
        variables = {
            **os.environ,
            **(environ or {}),
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
            "PYTHONSAFEPATH": "1",  # Python 3.10 does not know it
            PARENT_VARIABLE: f"{theirs.fileno()} {os.getpid()}",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._connection = ours
        self._said_from = 0

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """It has not ended yet."""
        return self._process.poll() is None

    def send(self, message: bytes) -> None:
        """Hand over one message.

        Raises:
            ChildDied: there is nobody to take it.
        """
        try:
            self._connection.send_bytes(message)
        except OSError as exc:
            raise self._died() from exc

    def receive(self, deadline_s: float) -> bytes:
        """The child's next message.

        Raises:
            ChildLate: there is none in time. ChildDied: there will be none.
        """
        try:
            if not self._connection.poll(deadline_s):
                raise ChildLate(deadline_s)
            return self._connection.recv_bytes()
        except (EOFError, OSError) as exc:
            raise self._died() from exc

    def _died(self) -> ChildDied:
        try:
            status = self._process.wait(CLOSING_S)
        except subprocess.TimeoutExpired:  # it closed its end and lives on
            self.kill()
            status = self._process.poll() or -signal.SIGKILL
        return ChildDied(status, self.said())

    def said(self) -> str:
        """The end of what it wrote to its outputs since this was asked last."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(self._said_from, size - SHOWN_STDERR_BYTES))
        self._said_from = size
        return self._stderr.read().decode(errors="replace").strip()

    def kill(self) -> None:
        """End it now, with everything that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it answers nobody any more, and that is what matters
            self._process.wait(KILLING_S)

    def close(self) -> None:
        """Let it end by itself, and end it when it does not."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSING_S)
        self.kill()
        self._stderr.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


_this_is_a_child = False


def in_child() -> bool:
    """Whether this process is one that `Child` started, and may be lost without anybody minding."""
    return _this_is_a_child


def connection_to_parent() -> Connection:
    """The child's end: `recv_bytes` and `send_bytes`. From here on the process ends when its parent does.

    Raises:
        SystemExit: this process was not started by `Child`.
    """
    number, _, parent = os.environ.pop(PARENT_VARIABLE, "").partition(" ")
    if not number.isdigit() or not parent.isdigit():
        raise SystemExit("this module is started by convplan itself and has no use on a command line")
    end_with_parent(int(parent))
    global _this_is_a_child
    _this_is_a_child = True
    return Connection(int(number))


def end_with_parent(parent: int) -> None:
    """Have the system end this process when its parent ends, which has that number. A fork does not inherit this.

    Raises:
        SystemExit: it is gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            raise SystemExit(1)


def _pipe() -> tuple[Connection, Connection]:
    import multiprocessing

    return multiprocessing.Pipe()


def status_text(status: int) -> str:
    """An exit status in words: `SIGSEGV` for -11."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
