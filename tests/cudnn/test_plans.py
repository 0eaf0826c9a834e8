"""cuDNN's plans without a GPU: building, refusals, what a variant pack holds, and plans as JSON.

JSON that was not written by cuDNN can end the process instead of raising. Whatever might is tried in processes of its
own: `children` forks one for each case from a small process that only has cuDNN in it.
"""

from __future__ import annotations

import collections
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from oracle_cases import CASES, Case

from convplan import ConvPlanError, EngineConfig, Plan, PlanRejected, Policy, Problem, SpecError, TensorSpec
from convplan._problem import OPS
from convplan.engines.base import Candidate
from convplan.engines.cudnn import plans
from convplan.engines.cudnn.descriptors import CudnnError, Descriptor, live_descriptors
from convplan.engines.cudnn.engine import COMPILED, CudnnEngine
from convplan.engines.cudnn.enums import Attribute, Status
from convplan.engines.cudnn.graph import UIDS, operation_graph
from convplan.engines.cudnn.library import Library
from convplan.engines.cudnn.plans import MOST_JSON_BYTES, MOST_PACKS, ExecutionPlan, build_plan, restore_plan
from convplan.engines.cudnn.target import Target

LETTERS = {"fprop": "xwy", "dgrad": "ywx", "wgrad": "xyw"}  # first input, second input, output
POLICY = Policy()


def small(op: str = "fprop", **changes: Any) -> Problem:
    settings = {"dtype": "float16", "layout": "channels_last", "padding": 1, "device": "cuda", **changes}
    return Problem.dense(op, (2, 32, 12, 12), (32, 32 // settings.get("groups", 1), 3, 3), **settings)


def of_case(case: Case) -> Problem:
    spec = case.spec()
    tensors = {
        name: TensorSpec(tuple(dims), tuple(spec["strides"][name]), spec["dtypes"][name])
        for name, dims in spec["dims"].items()
    }
    window = {name: tuple(spec[name]) for name in ("padding", "stride", "dilation")}  # type: ignore[literal-required]
    return Problem(op=case.op, **tensors, **window, groups=case.groups, device="cuda")


def uids(problem: Problem) -> tuple[int, ...]:
    return tuple(UIDS[letter] for letter in LETTERS[problem.op])


def compiled(candidate: Candidate) -> bool:
    return COMPILED in candidate.notes.behavior


# ---- building


@pytest.mark.behaviour("C7")
@pytest.mark.behaviour("B12")
@pytest.mark.parametrize("case", [case for case in CASES if case.proposes], ids=lambda case: case.name)
def test_every_configuration_builds_with_the_workspace_that_was_told(case: Case, cudnn: CudnnEngine) -> None:
    """Those that are compiled at run time take up to a second each, so only the first of them is built."""
    problem = of_case(case)
    proposed = cudnn.configs(problem, "measure")
    first_compiled = next((one for one in proposed if compiled(one)), None)
    failed, sizes = {}, {}
    for candidate in proposed:
        if compiled(candidate) and candidate is not first_compiled:
            continue
        try:
            built = cudnn.build(problem, candidate.config, POLICY)
        except PlanRejected as exc:
            failed[str(candidate.config)] = exc.reason
            continue
        if candidate.workspace_bytes is not None:
            sizes[str(candidate.config)] = (built.workspace_bytes, candidate.workspace_bytes)
    assert failed == {}
    assert {config: size for config, size in sizes.items() if size[0] != size[1]} == {}
    assert sizes


@pytest.mark.usefixtures("target", "no_descriptor_left")
@pytest.mark.parametrize("op", OPS)
def test_nothing_is_left_of_what_was_enumerated_built_and_dropped(op: str, cudnn: CudnnEngine) -> None:
    problem = small(op)
    built = [cudnn.build(problem, one.config, POLICY) for one in cudnn.configs(problem, "measure") if not compiled(one)]
    assert len(built) > 10


@pytest.mark.behaviour("B36")
def test_several_threads_build_at_once(cudnn: CudnnEngine) -> None:
    problems = [small(op, dtype=dtype) for op in OPS for dtype in ("float16", "float32")]

    def work(problem: Problem) -> list[tuple[EngineConfig, int]]:
        found = [one for one in cudnn.configs(problem, "measure") if not compiled(one)]
        return [(one.config, cudnn.build(problem, one.config, POLICY).workspace_bytes) for one in found]

    alone = [work(problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        together = [*pool.map(work, problems * 4)]
    assert together == alone * 4


# ---- refusals


BASE = {"engine": 45, "kblock": 3, "stages": 6, "tile_size": 5}  # the heuristics' first choice for `small()`

REFUSED = [
    ("no-engine", {"tile_size": 2}, "the knob `engine`, cuDNN's index of an engine, is missing"),
    ("unknown-engine", {"engine": 9999}, r"cudnnBackendFinalize\(ENGINE\) returned NOT_SUPPORTED \(3000\)"),
    ("negative-engine", {"engine": -1}, r"cudnnBackendFinalize\(ENGINE\) returned NOT_SUPPORTED"),
    ("another-operations-engine", {"engine": 65}, r"cudnnBackendFinalize\(ENGINE\) returned NOT_SUPPORTED"),
    ("unknown-knob", {**BASE, "no_such": 2}, "unknown knob 'no_such', expected the name of a cudnnBackendKnobType_t"),
    ("unknown-number-of-a-knob", {**BASE, "knob_7777": 2}, r"cudnnBackendFinalize\(ENGINECFG\) returned NOT_SUPPORTED"),
    ("a-knob-that-the-engine-lacks", {**BASE, "ldga": 1}, r"cudnnBackendFinalize\(ENGINECFG\) returned"),
    ("value-out-of-range", {**BASE, "tile_size": 99999}, r"cudnnBackendFinalize\(ENGINECFG\) returned NOT_SUPPORTED"),
    ("negative-value", {**BASE, "tile_size": -5}, r"cudnnBackendFinalize\(ENGINECFG\) returned NOT_SUPPORTED"),
]


@pytest.mark.usefixtures("target", "no_descriptor_left")
@pytest.mark.behaviour("B18")
@pytest.mark.parametrize(("knobs", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cudnn_does_not_have_is_rejected_with_the_reason(
    knobs: dict[str, int], reason: str, cudnn: CudnnEngine
) -> None:
    config = EngineConfig.of("cudnn", **knobs)
    with pytest.raises(PlanRejected, match=reason) as caught:
        cudnn.build(small(), config, POLICY)
    assert (caught.value.engine, caught.value.config) == ("cudnn", str(config))
    assert cudnn.build(small(), EngineConfig.of("cudnn", **BASE), POLICY).workspace_bytes == 0


@pytest.mark.parametrize("knobs", [{"engine": 2**64}, {**BASE, "tile_size": 2**64 + 5}], ids=["engine", "knob"])
def test_a_number_that_does_not_fit_is_rejected_and_not_cut(knobs: dict[str, int], cudnn: CudnnEngine) -> None:
    with pytest.raises(PlanRejected):
        cudnn.build(small(), EngineConfig.of("cudnn", **knobs), POLICY)


@pytest.mark.behaviour("B18")
def test_a_reason_is_of_the_call_that_failed(cudnn: CudnnEngine) -> None:
    reasons = []
    for _ in range(2):
        with pytest.raises(PlanRejected) as caught:
            cudnn.build(small(), EngineConfig.of("cudnn", engine=9999), POLICY)
        reasons.append(caught.value.reason)
        cudnn.configs(small(), "measure")
    assert reasons[0] == reasons[1]


RUNTIME = "static int last = 77; int cudaGetLastError(void) { int was = last; last = 0; return was; }"
FAILED = """
import ctypes, pathlib, sys, warnings
warnings.simplefilter("ignore")
from convplan._errors import PlanRejected
from convplan._policy import Policy
from convplan._problem import Problem
from convplan.engines.base import EngineConfig
from convplan.engines.cudnn.descriptors import CudnnError
from convplan.engines.cudnn.device import Device
from convplan.engines.cudnn.engine import CudnnEngine
from convplan.engines.cudnn.library import clear_cuda_error
from convplan.engines.cudnn.target import Target
target = Target.absent(Device.from_properties(sys.argv[1]))
assert clear_cuda_error(target.library) == 0  # no runtime is loaded
runtime = ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
problem = Problem.dense("fprop", (2, 16, 8, 8), (16, 16, 3, 3), dtype="float16", layout="channels_last", device="cuda")
engine = CudnnEngine(target)
if sys.argv[3] == "build":
    try:
        engine.build(problem, EngineConfig.of("cudnn", engine=9999), Policy())
    except PlanRejected:
        print("rejected", runtime.cudaGetLastError())
else:
    plan = engine.build_execution_plan(problem, engine.configs(problem, "instant")[0].config)
    try:
        plan.failed(5000)
    except CudnnError as exc:
        print(exc.status_name, runtime.cudaGetLastError())
"""


@pytest.mark.behaviour("B18")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA runtime of its own")
@pytest.mark.parametrize(("how", "said"), [("build", "rejected 0"), ("execute", "EXECUTION_FAILED 0")])
def test_cudas_error_state_is_cleared_after_a_failure(how: str, said: str, tmp_path: Path, library: Library) -> None:
    soname = f"libcudart.so.{library.cuda_major}"
    compiler = next(name for name in ("cc", "gcc", "clang") if shutil.which(name))
    command = [compiler, "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(tmp_path / soname), "-"]
    subprocess.run(command, input=RUNTIME, text=True, check=True)
    done = subprocess.run(
        [sys.executable, "-c", FAILED, str(PROPERTIES), str(tmp_path / soname), how], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr


def test_a_configuration_of_another_problem_is_rejected(cudnn: CudnnEngine) -> None:
    config = cudnn.configs(small("wgrad"), "instant")[0].config
    with pytest.raises(PlanRejected, match="returned NOT_SUPPORTED"):
        cudnn.build(small("dgrad", dtype="float64"), config, POLICY)


# ---- a compilation that fails


class Failing:
    """Stands in for the call that finalizes a plan: the first `times` fail with a status, the others are real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, status: Status, times: int) -> None:
        self.calls, self._status, self._times, self._real = 0, status, times, plans._finalised
        monkeypatch.setattr(plans, "_finalised", self)

    def __call__(self, target: Target, config: Descriptor | None, serialized: bytes | None) -> Descriptor:
        self.calls += 1
        if self.calls <= self._times:
            raise CudnnError(self._status, "cudnnBackendFinalize", "EXECUTION_PLAN", "scripted")
        return self._real(target, config, serialized)


@pytest.mark.behaviour("B18")
def test_a_compilation_that_failed_is_tried_once_more(cudnn: CudnnEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(monkeypatch, Status.INTERNAL_ERROR_COMPILATION_FAILED, 1)
    assert cudnn.build(small(), EngineConfig.of("cudnn", **BASE), POLICY).workspace_bytes == 0
    assert failing.calls == 2


@pytest.mark.behaviour("B18")
@pytest.mark.parametrize(
    ("status", "calls"),
    [
        (Status.INTERNAL_ERROR_COMPILATION_FAILED, 2),
        (Status.INTERNAL_ERROR, 1),
        (Status.NOT_SUPPORTED, 1),
        (Status.INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, 1),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_keeps_failing_is_rejected_with_cudnns_words(
    status: Status, calls: int, cudnn: CudnnEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(monkeypatch, status, 9)
    with pytest.raises(PlanRejected, match=rf"returned {status.name} \({int(status)}\): scripted"):
        cudnn.build(small(), EngineConfig.of("cudnn", **BASE), POLICY)
    assert failing.calls == calls


# ---- the addresses that a run gets


@pytest.mark.behaviour("B27")
@pytest.mark.behaviour("B28")
@pytest.mark.parametrize("op", OPS)
def test_the_output_is_the_tensor_that_the_operation_writes(
    op: str, cudnn: CudnnEngine, packed: list[dict[Attribute, list[int]]]
) -> None:
    """Addresses come as first input, second input, output, workspace; the graph's identifiers say which is which."""
    problem = small(op)
    plan = cudnn.build_execution_plan(problem, cudnn.configs(problem, "instant")[0].config)
    plan.pack((0x1000, 0x2000, 0x3000, 0x4000))
    (given,) = packed
    letters = map(chr, given[Attribute.VARIANT_PACK_UNIQUE_IDS])
    by_letter = dict(zip(letters, given[Attribute.VARIANT_PACK_DATA_POINTERS], strict=True))
    first, second, output = LETTERS[op]
    assert by_letter == {first: 0x1000, second: 0x2000, output: 0x3000}
    assert given[Attribute.VARIANT_PACK_WORKSPACE] == [0x4000]
    (node,) = json.loads(plan.serialize())["operationGraph"]["nodes"]
    written = {"fprop": "Y", "dgrad": "dX", "wgrad": "dW"}[op]
    assert chr(int(node[written])) == output
    assert getattr(problem, output) == problem.output


@pytest.mark.usefixtures("target", "no_descriptor_left")
def test_packs_are_kept_by_their_addresses_and_not_without_end(cudnn: CudnnEngine) -> None:
    plan = cudnn.build_execution_plan(small(), EngineConfig.of("cudnn", **BASE))
    before = live_descriptors()
    for turn in range(3 * MOST_PACKS):
        addresses = (turn * 256, 16, 32, 0)
        assert plan.packs.get(addresses) is None
        assert plan.pack(addresses) is plan.packs[addresses]
        assert len(plan.packs) <= MOST_PACKS
    assert addresses in plan.packs
    assert (0, 16, 32, 0) not in plan.packs, "the oldest went"
    assert live_descriptors() == before + MOST_PACKS


@pytest.mark.usefixtures("target", "no_descriptor_left")
@pytest.mark.parametrize("place", range(3), ids=["create", "set", "finalize"])
def test_a_pack_that_cannot_be_made_says_why_and_leaves_nothing(
    place: int, cudnn: CudnnEngine, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = cudnn.build_execution_plan(small(), EngineConfig.of("cudnn", **BASE))
    calls = list(library.packing_unchecked)
    calls[place] = lambda *arguments: int(Status.INTERNAL_ERROR_HOST_ALLOCATION_FAILED)
    name = ("CreateDescriptor", "SetAttribute", "Finalize")[place]
    before = live_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(library, "packing_unchecked", tuple(calls))
        with pytest.raises(
            CudnnError, match=rf"cudnnBackend{name}\(VARIANT_PACK\) returned INTERNAL_ERROR_HOST"
        ) as why:
            plan.pack((16, 32, 48, 0))
    assert why.value.out_of_memory
    assert plan.packs == {}
    del why
    assert live_descriptors() == before
    assert plan.pack((16, 32, 48, 0)).value


def test_a_pack_of_too_few_addresses_is_refused(cudnn: CudnnEngine) -> None:
    plan = cudnn.build_execution_plan(small(), EngineConfig.of("cudnn", **BASE))
    for wrong in ((), (16, 32, 48), (16, 32, 48, 64, 0)):
        with pytest.raises(ValueError, match=f"found {len(wrong)} addresses, expected 3 and the workspace's"):
            plan.pack(wrong)


@pytest.mark.behaviour("B36")
def test_several_threads_make_packs_of_one_plan(cudnn: CudnnEngine) -> None:
    plan = cudnn.build_execution_plan(small(), EngineConfig.of("cudnn", **BASE))

    def work(first: int) -> None:
        for second in range(1, 20_000):
            plan.pack((first, second, 32, 0))

    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(work, first) for first in range(1, 5)]
    finally:
        sys.setswitchinterval(often)
    assert [str(one.exception()) for one in futures if one.exception()] == []
    assert len(plan.packs) <= MOST_PACKS


# ---- a GPU that is not there


def test_a_plan_for_an_absent_gpu_refuses_tensors_of_the_cpu(cudnn: CudnnEngine) -> None:
    problem, config = small(), EngineConfig.of("cudnn", **BASE)
    plan = Plan(problem, config, cudnn.build(problem, config, POLICY))
    x, w = (torch.empty_strided(spec.dims, spec.strides, dtype=torch.float16) for spec in problem.inputs)
    with pytest.raises(SpecError, match="first input is on cpu, expected device type 'cuda'"):
        plan.run(x, w)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("how", ["run", "bind"])
def test_running_where_there_is_no_gpu_says_so(how: str, cudnn: CudnnEngine) -> None:
    problem = small()
    built = cudnn.build(problem, EngineConfig.of("cudnn", **BASE), POLICY)
    assert built.bind is not None
    x, w = (torch.empty_strided(spec.dims, spec.strides, dtype=torch.float16) for spec in problem.inputs)
    with pytest.raises(ConvPlanError, match="GPU"):
        built.run(x, w, None, None) if how == "run" else built.bind()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_registered_engine_supports_nothing_and_says_why() -> None:
    engine = CudnnEngine()
    support = engine.supports(small())
    assert not support.ok
    assert "a GPU that torch can use" in support.reason
    assert engine.configs(small(), "measure") == ()


# ---- plans as JSON


@pytest.mark.behaviour("C1")
@pytest.mark.usefixtures("target", "no_descriptor_left")
@pytest.mark.parametrize(
    "problem",
    [
        *(small(op, dtype=dtype) for op in OPS for dtype in ("float16", "float32", "float64")),
        small(groups=32, dtype="bfloat16"),
        small("wgrad", groups=4, stride=2),
        small(padding=((2, 0), (0, 1)), dilation=2),
        Problem.dense("fprop", (2, 8, 50), (8, 4, 9), groups=2, padding=((8, 0),), device="cuda"),
        Problem.dense("dgrad", (1, 8, 6, 7, 8), (16, 8, 3, 3, 3), dtype="bfloat16", device="cuda"),
    ],
    ids=str,
)
def test_plans_come_back_from_their_json_as_they_were(problem: Problem, cudnn: CudnnEngine, target: Target) -> None:
    restored = 0
    for candidate in cudnn.configs(problem, "measure"):
        if compiled(candidate):
            continue
        built = cudnn.build_execution_plan(problem, candidate.config)
        data = built.serialize()
        again = restore_plan(target, data, uids(problem))
        assert again.workspace_bytes == built.workspace_bytes == candidate.workspace_bytes
        assert again.serialize() == data
        assert identity(data) == chosen(candidate.config)
        restored += 1
    assert restored


def identity(data: bytes) -> dict[str, int]:
    """The engine and the chosen knobs that a serialized plan names, as convplan writes them."""
    engine = json.loads(data)["engine"]
    knobs = {name.removeprefix("CUDNN_KNOB_TYPE_").lower(): value for name, value in engine["knobChoices"].items()}
    return {"engine": engine["engineId"], **{name: value for name, value in knobs.items() if value != -1}}


def chosen(config: EngineConfig) -> dict[str, int]:
    """A configuration without `dense`, which is convplan's own, and without -1, which leaves the choice to cuDNN."""
    return {name: value for name, value in config.knobs if value != -1 and name != "dense"}


@pytest.mark.behaviour("C1")
def test_a_compiled_plan_comes_back_with_its_kernel(cudnn: CudnnEngine, target: Target) -> None:
    problem = small()
    candidate = next(one for one in cudnn.configs(problem, "measure") if compiled(one))
    built = cudnn.build_execution_plan(problem, candidate.config)
    data = built.serialize()
    again = restore_plan(target, data, uids(problem))
    assert again.workspace_bytes == built.workspace_bytes
    assert kernels(again.serialize()) == kernels(data) != []


def kernels(data: bytes) -> list[str]:
    """The compiled code in a serialized plan."""
    return [kernel["cubin"] for kernel in json.loads(data)["engine"]["payload"]["kernels"]]


@pytest.mark.behaviour("C1")
def test_another_process_restores_without_compiling(cudnn: CudnnEngine, tmp_path: Path) -> None:
    """NVRTC is taken away from the other process, so it could not compile if it tried."""
    problem = small()
    candidate = next(one for one in cudnn.configs(problem, "measure") if compiled(one))
    built = cudnn.build_execution_plan(problem, candidate.config)
    (tmp_path / "plan.json").write_bytes(built.serialize())
    code = """
import pathlib, sys
from convplan.engines.cudnn import library
library._load_nvrtc = lambda major, folder: library.Part("libnvrtc.so", "", "hidden")
from convplan.engines.cudnn.device import Device
from convplan.engines.cudnn.library import Library
from convplan.engines.cudnn.plans import restore_plan
from convplan.engines.cudnn.target import Target
import warnings
warnings.simplefilter("ignore")
target = Target.absent(Device.from_properties(sys.argv[1]))
assert not target.library.can_compile
assert "nvrtc" not in pathlib.Path("/proc/self/maps").read_text()
print(restore_plan(target, pathlib.Path(sys.argv[2]).read_bytes(), tuple(map(ord, "xwy"))).workspace_bytes)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(PROPERTIES), str(tmp_path / "plan.json")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(built.workspace_bytes)), done.stderr


@pytest.mark.usefixtures("target", "no_descriptor_left")
def test_json_of_an_absurd_size_is_refused_unread(target: Target) -> None:
    before = live_descriptors()
    with pytest.raises(ValueError, match=rf"{MOST_JSON_BYTES + 1} bytes, expected at most {MOST_JSON_BYTES}"):
        restore_plan(target, b" " * (MOST_JSON_BYTES + 1), (1, 2, 3))
    assert live_descriptors() == before


# ---- JSON of strangers

PROPERTIES = Path(__file__).with_name("h200-cudnn-9.19.0.deviceprop.json")
CHILD = """
import ctypes, json, os, resource, sys, warnings
warnings.simplefilter("ignore")  # a fork is what is wanted here
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from convplan.engines.cudnn.descriptors import CudnnError
from convplan.engines.cudnn.device import Device
from convplan.engines.cudnn.library import Library
from convplan.engines.cudnn.plans import restore_plan
from convplan.engines.cudnn.target import Target
target = Target.absent(Device.from_properties(sys.argv[1]))
for line in sys.stdin:
    data = json.loads(line).encode("latin-1")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            told = f"restored {restore_plan(target, data, tuple(map(ord, 'xwy'))).workspace_bytes}"
        except Exception as exc:
            told = f"{type(exc).__name__}: {exc}"
        os.write(write, told.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        told = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(told if status == 0 else f"crashed with {status}"), flush=True)
"""

Restore = Callable[[bytes], str]


@pytest.fixture(scope="module")
def children() -> Iterator[Restore]:
    """Restores JSON in a process of its own: `restored BYTES`, the error's class and words, or `crashed with -11`."""
    started: list[subprocess.Popen[str]] = []

    def restore(data: bytes) -> str:
        if not started:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", CHILD, str(PROPERTIES)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # a process that uses a GPU cannot be forked
                )
            )
        (parent,) = started
        assert parent.stdin is not None
        assert parent.stdout is not None
        print(json.dumps(data.decode("latin-1")), file=parent.stdin, flush=True)
        answer = json.loads(parent.stdout.readline())
        assert isinstance(answer, str)
        return answer

    yield restore
    for parent in started:
        parent.communicate(timeout=30)
        assert parent.returncode == 0


@pytest.fixture
def written(cudnn: CudnnEngine) -> dict[str, Any]:
    """A plan that cuDNN wrote."""
    found = json.loads(cudnn.build_execution_plan(small(), EngineConfig.of("cudnn", **BASE)).serialize())
    assert isinstance(found, dict)
    return found


def changed(plan: dict[str, Any], path: tuple[str | int, ...], value: object) -> bytes:
    """The plan with one entry exchanged; `...` takes it out."""
    made = copy.deepcopy(plan)
    inner: Any = made
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(made).encode()


def paths(value: object, start: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in entries:
        yield (*start, step)
        yield from paths(inner, (*start, step))


def test_what_was_written_is_restored_there_too(children: Restore, written: dict[str, Any]) -> None:
    assert children(json.dumps(written).encode()) == "restored 0"


NO_JSON = {
    "empty": b"",
    "zero": b"\0",
    "text": b"a plan",
    "bytes": bytes(range(256)),
    "object": b"{}",
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "deep-lists": b"[" * 100_000,
    "deep-objects": b'{"a":' * 100_000,
    "long-text": b'"' + b"N" * 2**20 + b'"',
}


@pytest.mark.parametrize("name", NO_JSON)
def test_what_is_no_plan_is_cudnns_error(name: str, children: Restore) -> None:
    assert children(NO_JSON[name]).startswith("CudnnError: cudnnBackend")


def test_a_cut_plan_is_cudnns_error_wherever_it_was_cut(children: Restore, written: dict[str, Any]) -> None:
    data = json.dumps(written, separators=(",", ":")).encode()
    cuts = range(1, len(data), 41)
    found = {cut: children(data[:cut]) for cut in cuts}
    assert {cut: told for cut, told in found.items() if not told.startswith("CudnnError: cudnnBackend")} == {}
    assert len(found) > 30


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("cudnnVersion",), 91800, "SUBLIBRARY_VERSION_MISMATCH"),
        (("schemaVersion",), 5, "SERIALIZATION_VERSION_MISMATCH"),
        (("GPUProfile", "deviceVer"), 1000, "NOT_SUPPORTED_ARCH_MISMATCH"),
        (("GPUProfile", "deviceVer"), 800, "NOT_SUPPORTED_ARCH_MISMATCH"),
        (("engine", "engineId"), 9999, "NOT_SUPPORTED"),
        (("engine", "knobChoices", "CUDNN_KNOB_TYPE_TILE_SIZE"), 99999, "NOT_SUPPORTED"),
    ],
    ids=["older-cudnn", "newer-schema", "newer-gpu", "older-gpu", "engine", "knob"],
)
def test_a_plan_from_elsewhere_is_refused_with_the_reason(
    path: tuple[str, ...], value: int, reason: str, children: Restore, written: dict[str, Any]
) -> None:
    assert reason in children(changed(written, path, value))


# cuDNN 9.19 ends the process for these: it converts names to numbers, and looks into lists, unchecked.
LETHAL = {
    "tensors-are-text": (("operationGraph", "tensors"), "x"),
    "tensors-are-a-number": (("operationGraph", "tensors"), -1),
    "nodes-are-text": (("operationGraph", "nodes"), "x"),
    "nodes-are-a-number": (("operationGraph", "nodes"), 2**31),
    "a-tensors-name-is-no-number": (("operationGraph", "tensors", 0, "name"), "x"),
    "an-inputs-name-is-no-number": (("operationGraph", "nodes", 0, "X"), "x"),
    "an-outputs-name-is-long": (("operationGraph", "nodes", 0, "Y"), "N" * 300),
    "a-long-device-name": (("GPUProfile", "deviceName"), "N" * 300),
}


@pytest.mark.parametrize("name", LETHAL)
def test_json_that_cudnn_does_not_survive_is_refused_before(
    name: str, cudnn: CudnnEngine, written: dict[str, Any]
) -> None:
    config = EngineConfig.of("cudnn", **BASE)
    with pytest.raises(PlanRejected, match=f"plan's {LETHAL[name][0][0]} is not that of the problem"):
        cudnn.restore_execution_plan(small(), config, changed(written, *LETHAL[name]))


@pytest.mark.parametrize("name", NO_JSON)
def test_what_is_no_plan_is_refused_before(name: str, cudnn: CudnnEngine) -> None:
    with pytest.raises(PlanRejected, match="its serialized form: "):
        cudnn.restore_execution_plan(small(), EngineConfig.of("cudnn", **BASE), NO_JSON[name])


def test_a_plan_of_another_engine_is_not_restored_for_this_one(cudnn: CudnnEngine, written: dict[str, Any]) -> None:
    data = json.dumps(written).encode()
    with pytest.raises(PlanRejected, match=f"is of engine {BASE['engine']}, expected 1"):
        cudnn.restore_execution_plan(small(), EngineConfig.of("cudnn", engine=1), data)


@pytest.mark.behaviour("C1")
def test_a_plan_of_the_problem_is_restored(cudnn: CudnnEngine, written: dict[str, Any]) -> None:
    config = EngineConfig.of("cudnn", **BASE)
    moved = changed(written, ("GPUProfile", "pciDeviceId"), 99)  # the same kind of GPU in another slot
    assert cudnn.restore_execution_plan(small(), config, moved).workspace_bytes == 0
    assert identity(cudnn.restore_execution_plan(small(), config, json.dumps(written).encode()).serialize()) == BASE


@pytest.mark.parametrize("value", [..., None, "x", -1, 2**63, 1.5, [], {}], ids=repr)
def test_no_other_change_crashes(value: object, children: Restore, written: dict[str, Any]) -> None:
    known = [path for path, _ in LETHAL.values()]
    known += [("operationGraph", "tensors", 1, "name"), ("operationGraph", "tensors", 2, "name")]
    known += [("operationGraph", "nodes", 0, "W")]
    places = [path for path in paths(written) if path not in known]
    found = {path: children(changed(written, path, value)) for path in places}
    assert {path: told for path, told in found.items() if told.startswith("crashed")} == {}
    kinds = collections.Counter(told.split()[0] for told in found.values())
    assert set(kinds) <= {"CudnnError:", "restored"}
    assert kinds["CudnnError:"] > kinds["restored"]


# Each of these would read or write memory that is not the tensors', or compute something else.
FORGED = {
    "more-samples": {("tensors", 1, "dim", 0): 2000, ("tensors", 2, "dim", 0): 2000},
    "other-padding": {("nodes", 0, "pad"): ..., ("nodes", 0, "pad_lower"): [2, 1], ("nodes", 0, "pad_upper"): [0, 1]},
    "scaled": {("nodes", 0, "alpha"): 2.0},
    "wider-loads": {("tensors", 1, "ptrAlignment"): 2**31},
    "other-strides": {("tensors", 1, "stride"): [4608 * 1000, 1, 384, 32]},
}


@pytest.mark.parametrize("name", FORGED)
def test_a_plan_of_another_problem_is_not_restored_for_this_one(
    name: str, cudnn: CudnnEngine, written: dict[str, Any]
) -> None:
    for path, value in FORGED[name].items():
        written = json.loads(changed(written, ("operationGraph", *path), value))
    with pytest.raises(PlanRejected, match="operationGraph is not that of the problem"):
        cudnn.restore_execution_plan(small(), EngineConfig.of("cudnn", **BASE), json.dumps(written).encode())


# ---- what a plan is made of


def test_a_plan_is_built_from_the_numbers_that_are_given(target: Target) -> None:
    """Without the engine: knobs by name in any order, one plan."""
    graph = operation_graph(target, small())
    knobs = {name: value for name, value in BASE.items() if name != "engine"}
    built = [
        build_plan(graph, target, BASE["engine"], dict(order), uids(small()))
        for order in (knobs.items(), reversed(knobs.items()))
    ]
    assert all(isinstance(one, ExecutionPlan) for one in built)
    assert [identity(one.serialize()) for one in built] == [BASE, BASE]


def test_dense_copies_are_no_business_of_cudnns(cudnn: CudnnEngine) -> None:
    problem = small(layout="contiguous")
    spaced = msgspec.structs.replace(
        problem, x=msgspec.structs.replace(problem.x, strides=tuple(2 * step for step in problem.x.strides))
    )
    candidate = next(one for one in cudnn.configs(spaced, "measure") if one.config.knob("dense"))
    data = cudnn.build_execution_plan(spaced, candidate.config).serialize()
    assert identity(data) == chosen(candidate.config)
