"""The searching process's end of a worker: starts it, waits no longer than it must, starts another when it is lost.

A candidate that takes its worker along, or does not come back, costs that candidate alone. What is worth trying, and
what to make of the answers, is `_search`'s.
"""

from __future__ import annotations

import logging
import signal
from types import TracebackType
from typing import NoReturn

import msgspec

from convplan._child import Child, ChildDied, ChildLate
from convplan._worker_messages import Answer, Broken, Race, Raced, Ready, Request, Setup, Stage, Tried, Try
from convplan.engines.base import EngineConfig

log = logging.getLogger("convplan.search")

START_LIMIT_S = 180.0  # importing torch, a CUDA context, and the reference of a large problem
GRACE_S = 0.5  # between the two processes, on a busy machine
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

    Attributes:
        missing: engines that the worker cannot have, with the reason; known after `start`.
        starts: how many processes there were.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._child: Child | None = None
        self.missing: dict[str, str] = {}
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """The worker process's number; None while there is none."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Have a worker that is ready.

        Raises:
            NoWorker: it cannot be started, or says itself that it is no good, `MOST_STARTS` times in a row.
        """
        failures: list[str] = []
        while self._child is None:
            if len(failures) == MOST_STARTS:
                raise NoWorker(failures[-1])
            try:
                self._start_once()
            except Lost as exc:
                failures.append(f"the worker process did not start: {exc.reason}")
                log.info("%s", failures[-1])

    def _start_once(self) -> None:
        try:
            self._child = Child("convplan._worker")
        except (OSError, ValueError) as exc:
            raise NoWorker(f"no worker process can be started: {exc}") from exc
        self.starts += 1
        answer = self._asked(self._setup, START_LIMIT_S)
        if isinstance(answer, Broken):
            self.close()
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
        child, stage = self._child, Stage("starting", limit_s)
        assert child is not None
        try:
            child.send(msgspec.json.encode(request))
            while True:
                answer = msgspec.json.decode(child.receive(stage.limit_s + GRACE_S), type=Answer)
                if not isinstance(answer, Stage):
                    return answer
                stage = answer
        except ChildLate as exc:
            self._end()
            reason = f"did not come back from {stage.doing} within {stage.limit_s:g} s"
            raise Lost("stall", reason, config=stage.config) from exc
        except ChildDied as exc:
            self._end()
            said = " ".join(exc.said.split())[:SAID_CHARACTERS]
            reason = f"the worker process ended while {stage.doing}: {exc.how}" + (f"; it said: {said}" if said else "")
            outside = -exc.status in FROM_OUTSIDE
            raise Lost("crash", reason, config=stage.config, from_outside=outside) from exc
        except msgspec.MsgspecError as exc:
            self._end()
            reason = f"the worker process answered what is no answer, while {stage.doing}: {exc}"
            raise Lost("crash", reason, config=stage.config) from exc

    def _misunderstood(self, answer: Answer) -> NoReturn:
        self._end()
        raise Lost("crash", f"the worker process answered something else than it was asked: {type(answer).__name__}")

    def _end(self) -> None:
        """At once: what it is at is not worth waiting for."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.close()

    def close(self) -> None:
        """End the worker; the next request starts another."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def __enter__(self) -> WorkerLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
