"""Timing on a GPU: each candidate captured into a CUDA graph, replays timed by events. Knows nothing of convolutions.

A short kernel launched from the host drowns in the gaps between launches: eight repetitions of a choice among 44 plans
of one 39 us convolution picked four different ones by single launches, and the best one every time by graph replays
(measured on one H200, cuDNN 9.19). So as many launches as make a replay long go into one graph. What cannot be captured
is launched as often in a row instead, and says so.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable

import torch

from convplan._measure import Clock

log = logging.getLogger("convplan.measure")

REPLAY_US = 500.0  # work in one replay
MOST_LAUNCHES = 32
HOST_US = 25.0  # of one synchronized call that is no kernel's time


class GraphTimer:
    """Samples for a race on one GPU. Graphs share one pool of memory and go with this object.

    Args:
        device: which GPU; must be the current device while samples are taken.
        clock: nanoseconds on the host, for the race's budget.
    """

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter_ns) -> None:
        self.clock = clock
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Callable[[], object], torch.cuda.CUDAGraph | None] = {}
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def repeats(self, first_us: float) -> int:
        """How many launches make a sample, from one earlier call's time on the host."""
        return min(MOST_LAUNCHES, max(1, math.ceil(REPLAY_US / max(first_us - HOST_US, 5.0))))

    def sample_us(self, call: Callable[[], object], repeats: int) -> float:
        """Microseconds of one launch, as the mean of one replay. A call keeps its first sample's number of launches.

        Raises:
            RuntimeError: the call failed, and not only because it was being captured.
        """
        if call not in self._graphs:
            self._graphs[call] = self._captured(call, repeats)
            self._timed(call, repeats)  # a graph's first replay holds its upload
        return self._timed(call, repeats)

    def sampled(self, call: Callable[[], object]) -> bool:
        """Whether the call was sampled at all."""
        return call in self._graphs

    def is_captured(self, call: Callable[[], object]) -> bool:
        """Whether the call's samples were replays of a graph."""
        return self._graphs.get(call) is not None

    def _timed(self, call: Callable[[], object], repeats: int) -> float:
        graph = self._graphs[call]
        with torch.cuda.stream(self._side):
            self._begin.record(self._side)
            if graph is not None:
                graph.replay()
            else:
                for _ in range(repeats):
                    call()
            self._end.record(self._side)
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) * 1e3 / repeats

    def _captured(self, call: Callable[[], object], repeats: int) -> torch.cuda.CUDAGraph | None:
        """A graph of so many launches; None where the call cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # Not `torch.cuda.graph`, which collects garbage and empties torch's cache each time: longer than a whole race.
        with torch.cuda.stream(self._side):
            call()  # on this stream once, so that what is set up for a stream is there
            self._side.synchronize()
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                for _ in range(repeats):
                    call()
                graph.capture_end()
            except RuntimeError as exc:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                torch.cuda.synchronize(self._device)
                log.debug("timed without a graph: %s", exc)
                return None
        return graph
