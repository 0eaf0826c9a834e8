"""Exhaustive search on a GPU: real faults of real kernels cost their candidate alone, and the user's context lives.

The faulty engine's kernels are compiled by NVRTC and launched through the CUDA driver, so that nothing of torch stands
between a fault and the GPU. `remake` gives the worker process the same engine. An endless kernel is ended with its
process, which the driver then clears away.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import convplan
from convplan import (
    Candidate,
    EngineConfig,
    Evidence,
    PlanRecord,
    Policy,
    Problem,
    Support,
    _environment,
    _runtime,
    _search,
    _sqlite,
    _worker_link,
)
from convplan._child import in_child
from convplan._planner import plan_problem
from convplan.engines.base import Built, Space

PROBLEM = Problem.dense(
    "fprop", (4, 32, 28, 28), (32, 32, 3, 3), dtype="float16", padding=1, layout="channels_last", device="cuda"
)
POLICY = Policy(
    deterministic=False, allow_tf32=False, engines=("faulty",), effort="exhaustive", budget_s=0.2, run_limit_s=3.0
)

pytestmark = pytest.mark.behaviour("C4")

SOURCE = b"""
extern "C" __global__ void illegal(char *p) { *(volatile int *)0x10 = 1; }
extern "C" __global__ void endless(char *p) { while (*(volatile char *)p != 77 || true) { } }
extern "C" __global__ void beyond(char *p) { p[threadIdx.x] = 0; }
extern "C" __global__ void slow(char *p) {
    long long begin = clock64();
    while (clock64() - begin < 400000000LL) { }
}
"""
FAULTS = ("", "segfaults", "illegal", "endless", "beyond", "slow", "leaks", "leaks_outside", "wrong", "slower")


@functools.cache
def _module() -> tuple[ctypes.CDLL, dict[str, ctypes.c_void_p]]:
    """The kernels, in the current context."""
    driver, nvrtc = ctypes.CDLL("libcuda.so.1"), _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _ok(nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE, b"faults.cu", 0, None, None))
    major, minor = torch.cuda.get_device_capability()
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture=sm_{major}{minor}".encode())
    _ok(nvrtc.nvrtcCompileProgram(program, 1, options))
    # Not PTX: that of a newer NVRTC than the driver is refused.
    _ok(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    image = ctypes.create_string_buffer(size.value)
    _ok(nvrtc.nvrtcGetCUBIN(program, image))
    module, functions = ctypes.c_void_p(), {}
    _ok(driver.cuModuleLoadData(ctypes.byref(module), image))
    for name in ("illegal", "endless", "beyond", "slow"):
        functions[name] = ctypes.c_void_p()
        _ok(driver.cuModuleGetFunction(ctypes.byref(functions[name]), module, name.encode()))
    return driver, functions


def _nvrtc() -> ctypes.CDLL:
    """The NVRTC that torch came with, whatever its version."""
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libnvrtc.so" in line}
    beside = [path for folder in sys.path for path in Path(folder, "nvidia").glob("**/libnvrtc.so*")]
    for name in [*sorted(loaded), *map(str, sorted(beside)), "libnvrtc.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError("no NVRTC to compile the faulty kernels with")


def _ok(status: int) -> None:
    if status:
        raise RuntimeError(f"the driver or NVRTC answered {status}")


def _launch(name: str, address: int, threads: int = 1) -> None:
    driver, functions = _module()
    argument = ctypes.c_void_p(address)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    _ok(driver.cuLaunchKernel(functions[name], 1, 1, 1, threads, 1, 1, 0, stream, arguments, None))


_kept: list[torch.Tensor] = []


class Faulty:
    """Stock torch's convolution, with a fault beside it. Knob `index` says which of `faults`."""

    name = "faulty"
    by_default = False

    def __init__(self, faults: Sequence[str], proposed: int | None = None) -> None:
        self.faults = tuple(faults)
        self.proposed = len(self.faults) if proposed is None else proposed

    def supports(self, problem: Problem) -> Support:
        return Support(True)

    def configs(self, problem: Problem, effort: Any) -> list[Candidate]:
        return [Candidate(EngineConfig.of(self.name, index=index), workspace_bytes=0) for index in range(self.proposed)]

    def spaces(self, problem: Problem) -> list[Space]:
        return [Space(free=(("index", tuple(range(len(self.faults)))),))]

    def candidate(self, problem: Problem, config: EngineConfig) -> Candidate:
        return Candidate(config, workspace_bytes=0)

    def remake(self) -> tuple[str, bytes]:
        return f"{Path(__file__).stem}:remade", json.dumps([self.faults, self.proposed]).encode()

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        fault = self.faults[config.knob("index")]

        def run(x: torch.Tensor, w: torch.Tensor, bias: Any, out: torch.Tensor | None) -> torch.Tensor:
            if fault not in ("", "wrong", "slower") and not in_child():
                raise RuntimeError("only in a worker process")
            y = F.conv2d(x, w, padding=1).contiguous(memory_format=torch.channels_last)
            if fault == "segfaults":
                ctypes.string_at(0)
            if fault == "slower":  # and not so much slower that it is cut off
                y = F.conv2d(x, w, padding=1).contiguous(memory_format=torch.channels_last)
            if fault == "wrong":
                y = y * 1.5
            result = y if out is None else out.copy_(y)
            if fault in ("illegal", "endless", "slow"):
                _launch(fault, result.data_ptr())
            if fault == "beyond" and out is not None:
                _launch(fault, result.data_ptr() + result.numel() * result.itemsize, threads=64)
            if fault == "leaks":
                _kept.append(torch.empty(2**18, dtype=torch.uint8, device=x.device))
            if fault == "leaks_outside":
                taken = ctypes.c_void_p()
                _ok(_module()[0].cuMemAlloc_v2(ctypes.byref(taken), ctypes.c_size_t(2**22)))
            return result

        return Built(run, workspace_bytes=0)


def remade(payload: bytes) -> Faulty:
    faults, proposed = json.loads(payload)
    return Faulty(faults, proposed)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from convplan.engines import registry

    # The worker imports this file by its bare name, as pytest does.
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    Faulty.__module__ = Path(__file__).stem
    # Pytest names the test in a variable: no reason to import everything anew.
    monkeypatch.setattr(_worker_link, "_circumstances", os.getpid)
    yield
    if "faulty" in registry.names():
        registry.unregister("faulty")
    torch.cuda.synchronize()  # this process's own context is as good as before
    assert float(torch.ones(8, device="cuda").sum()) == 8.0


@pytest.fixture(scope="module", autouse=True)
def _no_host_left() -> Iterator[None]:
    yield
    _worker_link.hosts.close()


def search(*faults: str, proposed: int | None = None, **rules: Any) -> PlanRecord:
    convplan.register_engine(Faulty(faults, proposed), replace=True)
    return plan_problem(PROBLEM, POLICY.replace(**rules), _environment.current("cuda"))


def index(evidence: Evidence) -> int:
    return evidence.config.knob("index", -1)


STAGES = {
    "segfaults": "crash",
    "illegal": "crash",
    "endless": "stall",
    "beyond": "corrupt",
    "slow": "measure",
    "leaks": "leak",
    "leaks_outside": "leak",
    "wrong": "verify",
}


@pytest.mark.parametrize("fault", STAGES)
def test_a_fault_costs_its_candidate_alone(fault: str) -> None:
    record = search("slower", fault, "")
    told = {index(evidence): (evidence.rejected, evidence.reason) for evidence in record.rejected}
    assert record.effort == "exhaustive"
    assert told[1][0] == STAGES[fault], told
    assert index(record.ranking[0]) == 2
    assert {index(evidence) for evidence in record.ranking} == {0, 2}, told
    plan = record.build()
    x = torch.randn(4, 32, 28, 28, device="cuda").half().to(memory_format=torch.channels_last)
    w = torch.randn(32, 32, 3, 3, device="cuda").half().to(memory_format=torch.channels_last)
    torch.testing.assert_close(plan.run(x, w), F.conv2d(x, w, padding=1), rtol=4e-3, atol=4e-2)


@pytest.mark.parametrize("moment", ["starting", "waiting", "working"])
def test_a_worker_killed_from_outside_costs_nobody(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """While it makes its context, before it is asked anything, or in the middle of its work."""
    links: list[_worker_link.WorkerLink] = []
    killed: list[int] = []

    class Watched(_worker_link.WorkerLink):
        asked = 0

        def tried(self, request: Any) -> Any:
            self.start()
            self.asked += 1
            if moment == "waiting" and self.asked == 1:
                kill(self)
            if moment == "working" and self.asked == 4:
                threading.Timer(0.002, kill, (self,)).start()
            return super().tried(request)

    def remember(setup: Any) -> _worker_link.WorkerLink:
        links.append(Watched(setup))
        return links[-1]

    def kill(link: _worker_link.WorkerLink) -> None:
        assert link.pid is not None
        killed.append(link.pid)
        os.kill(link.pid, signal.SIGKILL)

    def kill_at_once() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not killed:
            if links and links[0].pid is not None:
                kill(links[0])

    monkeypatch.setattr(_search, "WorkerLink", remember)
    killer = threading.Thread(target=kill_at_once if moment == "starting" else int)
    killer.start()
    try:
        record = search(*["slower"] * 8, "", search_s=20.0)
    finally:
        killer.join()
    assert killed
    assert 2 <= links[0].starts <= 3
    assert index(record.ranking[0]) == 8
    assert "crash" not in {evidence.rejected for evidence in record.rejected}


def test_a_disk_that_fills_while_a_tuned_plan_is_written_costs_only_its_keeping(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "plans.sqlite"
    monkeypatch.setenv("CONVPLAN_STORE", str(path))
    policy = Policy(tune_after=1, budget_s=0.05)
    convplan.stats(reset=True)
    x = torch.randn(4, 32, 28, 28, device="cuda").half().to(memory_format=torch.channels_last)
    weights = [torch.randn(32, 32, taps, taps, device="cuda").half() for taps in (1, 3)]
    right = [F.conv2d(x, w) for w in weights]
    with convplan.enabled(policy):
        torch.testing.assert_close(F.conv2d(x, weights[0]), right[0], rtol=4e-3, atol=4e-2)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
        monkeypatch.setitem(_sqlite.PRAGMAS, "max_page_count", pages)
        _runtime.forget()
        with pytest.warns(convplan.ConvPlanWarning, match="cannot be written: the disk or quota is full"):
            torch.testing.assert_close(F.conv2d(x, weights[1]), right[1], rtol=4e-3, atol=4e-2)
        before = convplan.stats()
        torch.testing.assert_close(F.conv2d(x, weights[1]), right[1], rtol=4e-3, atol=4e-2)
    after = convplan.stats()
    assert after["tuned"] == before["tuned"] == 2
    assert after["fell_back"] == after["failed"] == 0
    report = convplan.check_plans()
    assert report.ok, report


def test_all_faults_together() -> None:
    record = search(*STAGES, "")
    assert [index(evidence) for evidence in record.ranking] == [len(STAGES)]
    told = {index(evidence): evidence.rejected for evidence in record.rejected}
    assert [told[place] for place in range(len(STAGES))] == list(STAGES.values())


def test_faults_that_nobody_proposed_are_met_on_the_way_to_what_is_better() -> None:
    record = search("slower", "illegal", "wrong", "", proposed=1)
    assert index(record.ranking[0]) == 3
    assert record.ranking[0].source == "search"


def test_an_illegal_access_is_told_in_cudas_words_and_not_pinned_on_the_next() -> None:
    record = search("illegal", "", "slower")
    faulty, *others = sorted(record.rejected, key=index)
    assert index(faulty) == 0
    assert "illegal memory access" in faulty.reason
    assert [other.rejected for other in others] in ([], ["measure"])  # what is slower may be left out of the race


def test_cudnns_knobs_are_walked_and_the_choice_is_right(findings: dict[str, object]) -> None:
    policy = Policy(
        deterministic=False,
        allow_tf32=False,
        engines=("cudnn",),
        effort="exhaustive",
        search_s=20.0,
        budget_s=0.5,
        run_limit_s=2.0,
    )
    record = plan_problem(PROBLEM, policy, _environment.current("cuda"))
    walked = [one for one in (*record.ranking, *record.rejected) if one.source == "search"]
    findings["exhaustive"] = {
        "choice": str(record.config),
        "source": record.ranking[0].source,
        "curve": record.curve,
        "walked": len(walked),
        "stages": sorted({one.rejected for one in walked}),
    }
    assert record.effort == "exhaustive"
    assert walked
    assert record.ranking[0].verified in ("full", "sample")
    raced = [one for one in record.ranking if one.median_us is not None]
    assert record.ranking[0] in raced
    assert any(one.source != "search" for one in raced), "what is proposed races against what was walked to"
