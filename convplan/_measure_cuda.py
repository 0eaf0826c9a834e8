"""Timing on a GPU: each candidate captured into a CUDA graph, replays timed by events. Knows nothing of convolutions.

A short kernel launched from the host drowns in the gaps between launches: eight repetitions of a choice among 44 plans
of one 39 us convolution picked four different ones by single launches, and the best one every time by graph replays
(measured on one H200, cuDNN 9.19). So as many launches as make a replay long go into one graph. What cannot be captured
is launched as often in a row instead, and says so.

The replays of one round are queued without a pause in between, since a card that rests between samples runs at clocks
that it does not keep under load.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from convplan._measure import Clock

log = logging.getLogger("convplan.measure")

REPLAY_US = 500.0  # work in one replay
MOST_LAUNCHES = 32
HEAD_START_US = 100.0  # of idling on the device: what the host needs to queue a call behind it
LONGEST_HEAD_START_US = 20_000.0  # calls that take the host longer are doing one-time work
_CYCLES_PER_US = 2_000  # or fewer: idling may last longer than asked for

Call = Callable[[], object]
Result = TypeVar("Result")


class _Streams(threading.local):
    """The calling thread's stream for samples, one for each GPU. Torch keeps cuBLAS's workspace, 32 MiB on large GPUs,
    for every stream that it was ever used on."""

    def __init__(self) -> None:
        self._by_device: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._by_device:
            self._by_device[device] = torch.cuda.Stream(device)
        return self._by_device[device]


_streams = _Streams()


class GraphTimer:
    """Samples for a race on one GPU. Graphs share one pool of memory and go with this object.

    Args:
        device: which GPU; must be the current device while samples are taken.
        clock: nanoseconds on the host, for the race's budget.
        turns: calls work on so many sets of tensors, one after the other. A graph then holds a launch for each of them
            at least, and keeps as many outputs apart, so that a cache smaller than all of them holds none of the next.
    """

    drifts = True

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter_ns, *, turns: int = 1) -> None:
        self.clock = clock
        self._device = device
        self._turns = turns
        self._side = _streams.of(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Call, torch.cuda.CUDAGraph | None] = {}
        self._events: list[torch.cuda.Event] = []

    def repeats(self, first_us: float) -> int:
        """How many launches make a sample, from one earlier call's time on the device."""
        wanted = min(MOST_LAUNCHES, max(1, math.ceil(REPLAY_US / max(first_us, 1.0))))
        return math.ceil(wanted / self._turns) * self._turns

    def sample_us(self, call: Call, repeats: int) -> float:
        """Microseconds of one launch, as the mean of one replay. A call keeps its first sample's number of launches.

        Raises:
            RuntimeError: the call failed, and not only because it was being captured.
        """
        (found,) = self.round_us([(call, repeats)])
        if isinstance(found, Exception):
            raise found
        return found

    def round_us(self, calls: Sequence[tuple[Call, int]]) -> list[float | Exception]:
        """One sample of each, one straight after the other; in a call's place what it raised."""
        failed: dict[int, Exception] = {}
        for place, (call, repeats) in enumerate(calls):
            if call not in self._graphs:
                try:
                    self._prepare(call, repeats)
                except Exception as exc:  # one call's failure is not the others'
                    failed[place] = exc
        while len(self._events) <= len(calls):
            self._events.append(torch.cuda.Event(enable_timing=True))
        with torch.cuda.stream(self._side):
            torch.cuda._sleep(int(HEAD_START_US * _CYCLES_PER_US))
            self._events[0].record(self._side)
            for place, (call, repeats) in enumerate(calls):
                if place not in failed:
                    try:
                        self._launch(call, repeats)
                    except Exception as exc:  # as above
                        failed[place] = exc
                self._events[place + 1].record(self._side)
        self._events[len(calls)].synchronize()
        return [
            failed.get(place) or self._events[place].elapsed_time(self._events[place + 1]) * 1e3 / repeats
            for place, (_, repeats) in enumerate(calls)
        ]

    def sampled(self, call: Call) -> bool:
        """Whether the call was sampled at all."""
        return call in self._graphs

    def is_captured(self, call: Call) -> bool:
        """Whether the call's samples were replays of a graph."""
        return self._graphs.get(call) is not None

    def _prepare(self, call: Call, repeats: int) -> None:
        self._graphs[call] = self._captured(call, repeats)
        with torch.cuda.stream(self._side):
            self._launch(call, repeats)  # a graph's first replay holds its upload
        self._side.synchronize()

    def _launch(self, call: Call, repeats: int) -> None:
        graph = self._graphs[call]
        if graph is not None:
            graph.replay()
        else:
            self._repeat(call, repeats)

    def _repeat(self, call: Call, repeats: int) -> None:
        apart: deque[object] = deque(maxlen=self._turns - 1)
        for _ in range(repeats):
            apart.append(call())

    def _captured(self, call: Call, repeats: int) -> torch.cuda.CUDAGraph | None:
        """A graph of so many launches; None where the call cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # Not `torch.cuda.graph`, which collects garbage and empties torch's cache each time: longer than a whole race.
        with torch.cuda.stream(self._side):
            call()  # on this stream once, so that what is set up for a stream is there
            self._side.synchronize()
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                self._repeat(call, repeats)
                graph.capture_end()
            except RuntimeError as exc:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                torch.cuda.synchronize(self._device)
                log.debug("timed without a graph: %s", exc)
                return None
        return graph


def launch_us(call: Callable[[], Result]) -> tuple[Result, float]:
    """A call's result and the microseconds that the current device and stream took for it.

    The device idles a little before, so that the host's own time for the call disappears. A call for which that was not
    long enough is made once more.
    """
    result, time_us, host_us = _behind(call, HEAD_START_US)
    if HEAD_START_US < host_us < LONGEST_HEAD_START_US:
        del result  # its memory may be what the second one needs
        result, time_us, _ = _behind(call, 1.5 * host_us)
    return result, time_us


def _behind(call: Callable[[], Result], head_start_us: float) -> tuple[Result, float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(head_start_us * _CYCLES_PER_US))
    begin.record()
    host = time.perf_counter()
    result = call()
    host_us = (time.perf_counter() - host) * 1e6
    end.record()
    end.synchronize()
    return result, begin.elapsed_time(end) * 1e3, host_us
