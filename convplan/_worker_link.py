"""The searching process's end of a worker: starts it, waits no longer than it must, starts another when it is lost.

A candidate that takes its worker along, or does not come back, costs that candidate alone. What is worth trying, and
what to make of the answers, is `_search`'s.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import msgspec

from convplan._child import Child, ChildDied, ChildLate
from convplan._worker_messages import (
    Answer,
    Began,
    Broken,
    Ended,
    Race,
    Raced,
    Ready,
    Request,
    Setup,
    Stage,
    Tried,
    Try,
)
from convplan.engines.base import EngineConfig

log = logging.getLogger("convplan.search")

START_LIMIT_S = 180.0  # importing torch, a CUDA context, and the reference of a large problem
GRACE_S = 0.5  # between the two processes, on a busy machine
ENDING_S = 30.0  # a killed process may have to wait for its GPU
IDLE_S = 20.0  # a host is kept for the next problem
MOST_STARTS = 3  # in a row that come to nothing
SAID_CHARACTERS = 300
# Sent by others, such as an operator or a system short of memory: one of these proves nothing against a candidate.
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class NoWorker(Exception):
    """There is no worker process, and there will be none: why."""


class Lost(Exception):
    """The worker is gone, while it was at a candidate.

    Attributes:
        stage: `crash` or `stall`, as in a rejection.
        reason: what was seen.
        config: whose turn it was in a race, None where that is not known or goes without saying.
        from_outside: what ended it may have come from somebody else.
    """

    def __init__(
        self, stage: str, reason: str, *, config: EngineConfig | None = None, from_outside: bool = False
    ) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage, self.reason, self.config, self.from_outside = stage, reason, config, from_outside


class WorkerLink:
    """A worker process for one problem, replaced by a new one when it is lost.

    Workers are forked by a host, a process that has everything imported; so the second one is there in no time. The
    host of one problem is kept for the next.

    Attributes:
        missing: engines that the worker cannot have, with the reason; known after `start`.
        starts: how many workers there were.
        pid: the worker's process number; None while there is none.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._host: Child | None = None
        self.pid: int | None = None
        self.missing: dict[str, str] = {}
        self.starts = 0

    def start(self) -> None:
        """Have a worker that is ready.

        Raises:
            NoWorker: it cannot be started `MOST_STARTS` times in a row, or says itself that it is no good.
        """
        failures: list[str] = []
        while self.pid is None:
            if len(failures) == MOST_STARTS:
                raise NoWorker(failures[-1])
            try:
                self._start_once()
            except Lost as exc:
                failures.append(f"the worker process did not start: {exc.reason}")
                log.info("%s", failures[-1])

    def _start_once(self) -> None:
        if self._host is None:
            try:
                self._host = hosts.take()
            except (OSError, ValueError) as exc:
                raise NoWorker(f"no worker process can be started: {exc}") from exc
        self.starts += 1
        answer = self._asked(self._setup, START_LIMIT_S)
        if isinstance(answer, Broken):
            self._end()
            raise NoWorker(answer.reason)
        if not isinstance(answer, Ready):
            self._misunderstood(answer)
        self.missing = answer.missing

    def tried(self, request: Try) -> Tried:
        """One candidate's answer; a worker that is unfit after it is replaced at the next request.

        Raises:
            Lost: the candidate took the worker along, or did not come back.
            NoWorker: there is none to ask.
        """
        self.start()
        answer = self._asked(request, self._setup.policy.build_limit_s)
        if not isinstance(answer, Tried):
            self._misunderstood(answer)
        if answer.unfit:
            self._end()
        return answer

    def raced(self, request: Race) -> Raced:
        """The same for a race."""
        self.start()
        answer = self._asked(request, self._setup.policy.build_limit_s)
        if not isinstance(answer, Raced):
            self._misunderstood(answer)
        if answer.unfit:
            self._end()
        return answer

    def _asked(self, request: Request, limit_s: float) -> Answer:
        """The answer to a request; what the worker says on the way sets how long it may take."""
        host, stage = self._host, Stage("starting", limit_s)
        assert host is not None
        try:
            host.send(msgspec.json.encode(request))
            while True:
                answer = _decoded(host.receive(stage.limit_s + GRACE_S))
                if isinstance(answer, Stage):
                    stage = answer
                elif isinstance(answer, Began):
                    self.pid = answer.pid
                elif isinstance(answer, Ended):
                    self.pid = None
                    raise self._crash(ChildDied(answer.status, host.said()), stage)
                else:
                    return answer
        except ChildLate as exc:
            self._end()
            reason = f"did not come back from {stage.doing} within {stage.limit_s:g} s"
            raise Lost("stall", reason, config=stage.config) from exc
        except ChildDied as exc:  # the host, and with it the worker
            self._give_up()
            raise self._crash(exc, stage) from exc
        except msgspec.MsgspecError as exc:
            self._give_up()
            reason = f"the worker process answered what is no answer, while {stage.doing}: {exc}"
            raise Lost("crash", reason, config=stage.config) from exc

    def _crash(self, died: ChildDied, stage: Stage) -> Lost:
        said = " ".join(died.said.split())
        said = f"; it said: {said[:SAID_CHARACTERS]}" if said else ""
        reason = f"the worker process ended while {stage.doing}: {died.how}{said}"
        return Lost("crash", reason, config=stage.config, from_outside=-died.status in FROM_OUTSIDE)

    def _misunderstood(self, answer: Answer) -> NoReturn:
        self._give_up()
        raise Lost("crash", f"the worker process answered something else than it was asked: {type(answer).__name__}")

    def _end(self) -> None:
        """End the worker at once, and keep its host where that says that it is gone."""
        host, pid, self.pid = self._host, self.pid, None
        if host is None or pid is None:
            return
        try:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            while not isinstance(_decoded(host.receive(ENDING_S)), Ended):
                pass
            host.said()
        except (ChildLate, ChildDied, msgspec.MsgspecError):
            self._give_up()

    def _give_up(self) -> None:
        """End the host, and with it the worker."""
        host, self._host, self.pid = self._host, None, None
        if host is not None:
            host.kill()
            host.close()

    def __enter__(self) -> WorkerLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
        host, self._host = self._host, None
        if host is not None:
            hosts.give_back(host)


def _decoded(message: bytes) -> Answer:
    answer: Answer = msgspec.json.decode(message, type=Answer)
    return answer


class _Hosts:
    """Keeps one idle host for a while, since problems are seldom searched alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[Child, tuple[object, ...], threading.Timer] | None = None

    def take(self) -> Child:
        """A host that lives in the same circumstances as this process.

        Raises:
            OSError, ValueError: none can be started.
        """
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None:
            host, circumstances, timer = kept
            timer.cancel()
            if circumstances == _circumstances() and host.alive:
                return host
            host.close()
        return Child("convplan._worker")

    def give_back(self, host: Child) -> None:
        """Keep it for `IDLE_S` seconds."""
        timer = threading.Timer(IDLE_S, self.close)
        timer.daemon = True
        with self._lock:
            if self._kept is None and host.alive:
                self._kept = (host, _circumstances(), timer)
                timer.start()
                return
        host.close()

    def close(self) -> None:
        """End the host that is kept, if any."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None:
            kept[2].cancel()
            kept[0].close()


def _circumstances() -> tuple[object, ...]:
    """What a process takes from the one that starts it."""
    return dict(os.environ), tuple(sys.path), Path.cwd(), os.getpid()


hosts = _Hosts()
atexit.register(hosts.close)
