"""Plans that come back from their JSON: what is vetted before cuDNN sees it, and what restoring leaves undone."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from convplan import EngineConfig, EngineUnavailable, PlanRejected, Policy, Problem, TensorSpec
from convplan._problem import OPS
from convplan.engines.base import Restoring
from convplan.engines.cudnn import plans, serialized
from convplan.engines.cudnn.descriptors import CudnnError, Descriptor
from convplan.engines.cudnn.device import Device
from convplan.engines.cudnn.engine import COMPILED, CudnnEngine
from convplan.engines.cudnn.enums import DescriptorType
from convplan.engines.cudnn.graph import UIDS, dense, operation_graph
from convplan.engines.cudnn.library import Library
from convplan.engines.cudnn.plans import MOST_JSON_BYTES, build_plan
from convplan.engines.cudnn.serialized import graph_json, pattern_of, vetted
from convplan.engines.cudnn.target import Target

POLICY = Policy()
H200 = Path(__file__).with_name("h200-cudnn-9.19.0.deviceprop.json")
BASE = {"engine": 45, "kblock": 3, "stages": 6, "tile_size": 5}
KNOBS = {name: value for name, value in BASE.items() if name != "engine"}
CONFIG = EngineConfig.of("cudnn", **BASE)
COMPILING = EngineConfig.of("cudnn", engine=71)


def small(op: str = "fprop", **changes: Any) -> Problem:
    settings = {"dtype": "float16", "layout": "channels_last", "padding": 1, "device": "cuda", **changes}
    return Problem.dense(op, (2, 32, 12, 12), (32, 32 // settings.get("groups", 1), 3, 3), **settings)


# ---- the graph as cuDNN writes it


GROUPS = {"one": (16, 16, 1), "some": (16, 8, 2), "depthwise": (16, 1, 16)}  # channels, those of a filter, groups
WINDOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "same": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "uneven": {"padding": ((2, 0), (0, 1), (1, 1))},
}


def matrix(op: str, dtype: str, rank: int) -> Iterator[Problem]:
    """Layouts, groups and windows, with alignments and batch sizes that differ from one to the next."""
    turns = itertools.cycle([(32, 2), (16, 1), (8, 3)])
    for layout, groups, window in itertools.product(("contiguous", "channels_last"), GROUPS, WINDOWS):
        (channels, seen, count), settings = GROUPS[groups], dict(WINDOWS[window])
        if isinstance(settings.get("padding"), tuple):
            settings["padding"] = settings["padding"][:rank]
        alignment_bytes, n = next(turns)
        made = Problem.dense(
            op, (n, channels, *(9, 8, 7)[:rank]), (16, seen, *(3, 1, 3)[:rank]),
            dtype=dtype, layout=layout, groups=count, device="cuda", **settings,
        )  # fmt: skip
        yield msgspec.structs.replace(
            made, x=TensorSpec(made.x.dims, made.x.strides, made.x.dtype, alignment_bytes if op != "dgrad" else 32)
        )


def written_by_cudnn(problem: Problem, target: Target, cudnn: CudnnEngine) -> bytes:
    """The JSON of some plan that is not compiled."""
    uids = tuple(UIDS[letter] for letter in "xwy")
    try:
        return build_plan(operation_graph(target, problem), target, 0, {}, uids).serialize()
    except CudnnError:
        found = (one for one in cudnn.configs(problem, "instant") if COMPILED not in one.notes.behavior)
        return cudnn.build_execution_plan(problem, next(found).config).serialize()


def part_of(data: bytes, name: str) -> str:
    return json.dumps(json.loads(data)[name])


@pytest.mark.behaviour("C1")
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("op", OPS)
def test_graphs_are_written_as_cudnn_writes_them(
    op: str, dtype: str, rank: int, target: Target, cudnn: CudnnEngine
) -> None:
    compared = 0
    for problem in matrix(op, dtype, rank):
        mine = json.dumps(json.loads(msgspec.json.encode(graph_json(problem))))
        assert mine == part_of(written_by_cudnn(problem, target, cudnn), "operationGraph"), problem
        compared += 1
    assert compared == 30


@pytest.mark.parametrize(
    "problem",
    [
        *(small(dtype="int8", output_dtype=out) for out in ("int8", "int32", "float32")),
        *(small(dtype="float8_e4m3fn", output_dtype=out) for out in ("float8_e4m3fn", "bfloat16", "float32")),
        small(dtype="float8_e5m2", output_dtype="float16"),
        Problem.dense("fprop", (8, 96, 28, 28), (96, 1, 3, 3), dtype="float16", groups=96, device="cuda"),
        Problem.dense("wgrad", (1, 1, 1, 1), (1, 1, 1, 1), device="cuda"),
    ],
    ids=str,
)
def test_narrow_types_and_sizes_of_one_are_written_as_cudnn_writes_them(problem: Problem, cudnn: CudnnEngine) -> None:
    data = cudnn.build_execution_plan(problem, cudnn.configs(problem, "instant")[0].config).serialize()
    assert json.dumps(json.loads(msgspec.json.encode(graph_json(problem)))) == part_of(data, "operationGraph")


# ---- restoring


def spaced() -> Problem:
    """Every other element of a longer tensor, which is copied into a dense one first."""
    problem = small(layout="contiguous")
    return msgspec.structs.replace(
        problem, x=msgspec.structs.replace(problem.x, strides=tuple(2 * step for step in problem.x.strides))
    )


@pytest.mark.behaviour("C1")
@pytest.mark.parametrize(
    "problem",
    [
        *(small(op, dtype=dtype) for op in OPS for dtype in ("float16", "bfloat16", "float32", "float64")),
        small("wgrad", groups=4, padding=((2, 0), (0, 1)), dilation=2),
        Problem.dense("fprop", (2, 8, 50), (8, 4, 9), groups=2, padding=((8, 0),), device="cuda"),
        Problem.dense("dgrad", (1, 8, 6, 7, 8), (16, 8, 3, 3, 3), dtype="bfloat16", device="cuda"),
        spaced(),
    ],
    ids=str,
)
@pytest.mark.usefixtures("target", "no_descriptor_left")
def test_what_was_built_is_restored_as_it_was(problem: Problem, cudnn: CudnnEngine) -> None:
    restored = 0
    for candidate in cudnn.configs(problem, "measure"):
        if COMPILED in candidate.notes.behavior:
            continue
        built = cudnn.build(problem, candidate.config, POLICY)
        assert built.serialize is not None
        again = cudnn.restore(problem, candidate.config, POLICY, built.serialize())
        assert again.workspace_bytes == built.workspace_bytes
        assert again.serialize is not None
        assert again.serialize() == built.serialize()
        restored += 1
    assert restored > 1


def test_the_engine_says_that_its_plans_survive_the_process(cudnn: CudnnEngine) -> None:
    assert isinstance(cudnn, Restoring)


def test_a_restored_plan_for_an_absent_gpu_does_not_run(cudnn: CudnnEngine) -> None:
    built = cudnn.build(small(), CONFIG, POLICY)
    assert built.serialize is not None
    restored = cudnn.restore(small(), CONFIG, POLICY, built.serialize())
    x, w = torch.zeros(2, 32, 12, 12).half(), torch.zeros(32, 32, 3, 3).half()
    with pytest.raises(EngineUnavailable, match="GPU"):
        restored.run(x, w, None, None)


@pytest.fixture(scope="module")
def compiled_plan() -> bytes:
    """Of `small()`, by an engine that compiles its kernel; 0.9 s."""
    return CudnnEngine(Target.absent(Device.from_properties(H200))).build_execution_plan(small(), COMPILING).serialize()


@pytest.mark.behaviour("C1")
def test_a_compiled_plan_is_restored_with_its_kernel(cudnn: CudnnEngine, compiled_plan: bytes) -> None:
    restored = cudnn.restore(small(), COMPILING, POLICY, compiled_plan)
    assert restored.serialize is not None
    assert restored.serialize() == compiled_plan
    assert json.loads(compiled_plan)["engine"]["payload"]["kernels"]


class Made:
    """Counts the descriptors that are made, by kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds: Counter[DescriptorType] = Counter()
        real = Descriptor.__init__

        def counted(descriptor: Descriptor, library: Any, kind: DescriptorType, *more: Any, **named: Any) -> None:
            self.kinds[kind] += 1
            real(descriptor, library, kind, *more, **named)

        monkeypatch.setattr(Descriptor, "__init__", counted)


@pytest.mark.behaviour("C1")
@pytest.mark.parametrize("op", OPS)
def test_restoring_asks_no_heuristics_and_configures_no_engine(
    op: str, cudnn: CudnnEngine, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = small(op)
    config = cudnn.configs(problem, "instant")[0].config
    data = cudnn.build_execution_plan(problem, config).serialize()
    made = Made(monkeypatch)
    pattern_of(target)
    assert (made.kinds[DescriptorType.ENGINEHEUR], made.kinds[DescriptorType.ENGINECFG]) == (0, 1), "the pattern"
    made.kinds.clear()
    kept = [cudnn.restore(problem, config, POLICY, data) for _ in range(3)]
    assert made.kinds == {DescriptorType.EXECUTION_PLAN: 3} == {DescriptorType.EXECUTION_PLAN: len(kept)}


ELSEWHERE = """
import base64, ctypes, json, sys, warnings
from collections import Counter
import msgspec
warnings.simplefilter("ignore")
ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)  # whoever asks for NVRTC gets this one, which fails
from convplan import EngineConfig, PlanRejected, Policy, Problem
from convplan.engines.cudnn.descriptors import Descriptor
from convplan.engines.cudnn.device import Device
from convplan.engines.cudnn.engine import CudnnEngine
from convplan.engines.cudnn.target import Target
made, real = Counter(), Descriptor.__init__
def counted(descriptor, library, kind, *more, **named):
    made[kind.name] += 1
    real(descriptor, library, kind, *more, **named)
Descriptor.__init__ = counted
engine = CudnnEngine(Target.absent(Device.from_properties(sys.argv[1])))
answers = []
for problem, config, data in json.load(sys.stdin):
    problem, config = msgspec.convert(problem, Problem), msgspec.convert(config, EngineConfig)
    built = engine.restore(problem, config, Policy(), base64.b64decode(data))
    answers.append([built.workspace_bytes, base64.b64encode(built.serialize()).decode()])
counted = dict(made)
try:
    engine.build(problem, config, Policy())
except PlanRejected as exc:
    print(json.dumps([answers, counted, exc.reason]))
"""


NVRTC = ("CreateProgram", "CompileProgram", "DestroyProgram", "GetCUBIN", "GetCUBINSize", "GetProgramLog",
         "GetProgramLogSize", "GetPTX", "GetPTXSize")  # fmt: skip
FAILING_NVRTC = "\n".join(
    [
        *(f"int nvrtc{name}(void) {{ return 11; }}" for name in NVRTC),
        "int __nvrtcCPEx(void) { return 11; }",
        "int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }",
        'const char *nvrtcGetErrorString(int error) { return "no compiler in this test"; }',
    ]
)


@pytest.fixture
def no_nvrtc(tmp_path: Path, library: Library) -> Path:
    """A library that takes the place of NVRTC and cannot compile."""
    path = tmp_path / f"libnvrtc.so.{library.cuda_major}"
    compiler = next(name for name in ("cc", "gcc", "clang") if shutil.which(name))
    command = [compiler, "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", str(path), "-"]
    subprocess.run(command, input=FAILING_NVRTC.replace("13", str(library.cuda_major)), text=True, check=True)
    return path


@pytest.mark.behaviour("C1")
def test_another_process_restores_everything_and_compiles_nothing(
    cudnn: CudnnEngine, compiled_plan: bytes, no_nvrtc: Path
) -> None:
    """It could not compile if it tried, which it is made to in the end."""
    sent, expected = [], []
    for problem in (small(op, dtype=dtype) for op in OPS for dtype in ("float16", "float32")):
        config = cudnn.configs(problem, "instant")[0].config
        plan = cudnn.build_execution_plan(problem, config)
        sent.append((problem, config, plan.serialize()))
        expected.append(plan.workspace_bytes)
    sent.append((small(), COMPILING, compiled_plan))
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(H200), str(no_nvrtc)],
        input=json.dumps(msgspec.to_builtins(sent)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers, made, reason = json.loads(done.stdout)
    assert [base64.b64decode(data) for _, data in answers] == [data for _, _, data in sent]
    assert [workspace for workspace, _ in answers][:-1] == expected
    assert "ENGINEHEUR" not in made
    assert made["ENGINECFG"] == 1, "the pattern's"
    assert made["EXECUTION_PLAN"] == len(sent) + 1
    assert "cudnnBackendFinalize" in reason, "built, it would have been compiled"


# ---- vetting


@pytest.fixture
def written(cudnn: CudnnEngine) -> dict[str, Any]:
    """A plan that cuDNN wrote."""
    found = json.loads(cudnn.build_execution_plan(small(), CONFIG).serialize())
    assert isinstance(found, dict)
    return found


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Whatever JSON cuDNN is given to read, which goes no further."""
    seen: list[bytes] = []
    real = plans._finalised

    def look(target: Target, config: Descriptor | None, data: bytes | None) -> Descriptor:
        if data is not None:
            seen.append(data)
            raise CudnnError(3000, "cudnnBackendFinalize", "EXECUTION_PLAN", "not in this test")
        return real(target, config, data)

    monkeypatch.setattr(plans, "_finalised", look)
    return seen


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


def refusal_of(cudnn: CudnnEngine, data: bytes, config: EngineConfig = CONFIG, problem: Problem | None = None) -> str:
    with pytest.raises(PlanRejected, match="its serialized form: ") as caught:
        cudnn.restore(problem or small(), config, POLICY, data)
    return caught.value.reason.removeprefix("its serialized form: ")


MERE_PLACES = {("GPUProfile", name) for name in serialized._PLACES}
DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "value", [..., None, "x", -1, 2**63, 1.5, True, [], {}, DEEP], ids=lambda value: repr(value)[:9]
)
def test_no_change_reaches_cudnn(
    value: object, cudnn: CudnnEngine, written: dict[str, Any], handed_on: list[bytes]
) -> None:
    """Not even which slot the GPU was in, where that may differ: cuDNN is told of the one that is here."""
    passed = set()
    for path in paths(written):
        data = changed(written, path, value)
        if json.loads(data) == written:
            continue
        if "not in this test" in refusal_of(cudnn, data):
            passed.add(path)
    is_number = type(value) is int
    own = {("engine", "smVersion")} if value == -1 else set()  # the engine's part, which cuDNN looks at itself
    assert passed == (MERE_PLACES if is_number else set()) | own
    known = [json.loads(data) for data in handed_on]
    assert all({**one, "engine": written["engine"]} == written for one in known)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("extra",), 1),
        (("operationGraph", "extra"), 1),
        (("operationGraph", "tensors", 0, "extra"), []),
        (("operationGraph", "nodes", 0, "groupCount"), 1),
        (("GPUProfile", "extra"), 1),
        (("engine", "extra"), 1),
        (("engine", "payload"), {}),
        (("engine", "payload"), {"kernels": [], "extra": 1}),
        (("engine", "payload"), {"kernels": [{"kernelName": "k"}]}),
        (("engine", "knobChoices", "CUDNN_KNOB_TYPE_TILEK"), 1),
        (("engine", "knobChoices", "CUDNN_KNOB_TYPE_STAGES"), 5),
        (("engine", "knobChoices", "CUDNN_KNOB_TYPE_STAGES"), -1),
    ],
    ids=lambda value: repr(value) if not isinstance(value, tuple) else ".".join(map(str, value)),
)
def test_nothing_is_added_and_no_knob_is_another(
    path: tuple[str | int, ...], value: object, cudnn: CudnnEngine, written: dict[str, Any], handed_on: list[bytes]
) -> None:
    assert "serialized plan" in refusal_of(cudnn, changed(written, path, value))
    assert handed_on == []


def test_a_part_that_comes_twice_is_cudnns_once(
    cudnn: CudnnEngine, written: dict[str, Any], handed_on: list[bytes]
) -> None:
    """Readers differ in which of two equal names they take, so cuDNN is given the text that was vetted."""
    forged = copy.deepcopy(written["operationGraph"])
    forged["tensors"][1]["dim"][0] = 2000
    twice = f'{{"operationGraph": {json.dumps(forged)}, {json.dumps(written)[1:]}'.encode()
    assert "not in this test" in refusal_of(cudnn, twice)
    assert [json.loads(data) for data in handed_on] == [written]
    assert handed_on[0].count(b"operationGraph") == 1


@pytest.mark.parametrize(
    "problem",
    [
        small("dgrad"),
        small(dtype="bfloat16"),
        small(padding=((1, 1), (1, 0))),
        small(layout="contiguous"),
        Problem.dense("fprop", (3, 32, 12, 12), (32, 32, 3, 3), dtype="float16", padding=1, device="cuda"),
    ],
    ids=str,
)
def test_a_plan_of_another_problem_is_refused(
    problem: Problem, cudnn: CudnnEngine, written: dict[str, Any], handed_on: list[bytes]
) -> None:
    assert "operationGraph is not that" in refusal_of(cudnn, json.dumps(written).encode(), problem=problem)
    assert handed_on == []


def test_a_plan_for_another_gpu_is_refused(written: dict[str, Any], handed_on: list[bytes]) -> None:
    other = {**json.loads(H200.read_bytes()), "multiProcessorCount": 114, "deviceName": "NVIDIA H100 PCIe"}
    cudnn = CudnnEngine(Target.absent(Device(other)))
    assert "GPUProfile is not that" in refusal_of(cudnn, json.dumps(written).encode())
    assert handed_on == []


def test_a_plan_of_other_knobs_says_which(cudnn: CudnnEngine, written: dict[str, Any]) -> None:
    config = EngineConfig.of("cudnn", **{**BASE, "stages": 5})
    assert "'stages': 6" in refusal_of(cudnn, json.dumps(written).encode(), config)
    assert "is of engine 45, expected 1" in refusal_of(
        cudnn, json.dumps(written).encode(), EngineConfig.of("cudnn", engine=1)
    )


def test_a_configuration_without_an_engine_is_refused(cudnn: CudnnEngine, written: dict[str, Any]) -> None:
    with pytest.raises(PlanRejected, match="the knob `engine`"):
        cudnn.restore(small(), EngineConfig.of("cudnn"), POLICY, json.dumps(written).encode())


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"a plan", bytes(range(256)), b"{}", b"[]", b"null", b"7", b"[" * 100_000, b'{"a":' * 100_000,
     b" " * (MOST_JSON_BYTES + 1), b'{"cudnnVersion": ' + b"9" * 5000 + b"}"],
    ids=["empty", "zero", "text", "bytes", "object", "list", "null", "number", "deep-lists", "deep-objects", "huge",
         "long-number"],
)  # fmt: skip
def test_what_is_no_plan_is_refused(data: bytes, cudnn: CudnnEngine, handed_on: list[bytes]) -> None:
    assert refusal_of(cudnn, data)
    assert handed_on == []


KERNEL = ("engine", "payload", "kernels", 0)
PARAMETERS = (*KERNEL, "kernelParams")
FORGED: dict[str, tuple[tuple[str | int, ...], object, str]] = {
    "an address behind the parameters": ((*PARAMETERS, "offsets", 7, "value"), 10_000, "an offset of 10000 into"),
    "an address before the parameters": ((*PARAMETERS, "offsets", 7, "value"), -8, "an offset of -8 into"),
    "a huge offset": ((*PARAMETERS, "offsets", 0, "value"), 2**40, "engine: Expected `int`"),
    "no such tensor": ((*PARAMETERS, "offsets", 7, "uid"), 7, "address of tensor 7"),
    "another kind of update": ((*PARAMETERS, "offsets", 7, "update_as"), "scalar", "Invalid enum value 'scalar'"),
    "no kind of update": (
        (*PARAMETERS, "offsets", 7, "update_as"),
        ...,
        "address of tensor 120, expected one of (None,)",
    ),
    "a tensor as workspace": ((*PARAMETERS, "offsets", 7, "update_as"), "workspace", "expected one of (0, 1, 2"),
    "cut parameters": ((*PARAMETERS, "rawData"), "AAAA", "into 3 bytes"),
    "parameters in another base": ((*PARAMETERS, "rawData"), "A!AA", "rawData is not in base 64"),
    "code in another base": ((*KERNEL, "cubin"), "é", "cubin is not in base 64"),
    "no code": ((*KERNEL, "cubin"), base64.b64encode(b"MZ" * 100).decode(), "is no compiled code"),
    "code left out": ((*KERNEL, "cubin"), ..., "is no compiled code"),
    "a long name": ((*KERNEL, "kernelName"), "N" * 5000, "length <= 1024"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_kernels_parameters_stay_within_their_bounds(
    name: str, cudnn: CudnnEngine, compiled_plan: bytes, handed_on: list[bytes]
) -> None:
    path, value, reason = FORGED[name]
    assert reason in refusal_of(cudnn, changed(json.loads(compiled_plan), path, value), COMPILING)
    assert handed_on == []


def test_an_address_may_end_where_the_parameters_do(
    cudnn: CudnnEngine, compiled_plan: bytes, handed_on: list[bytes]
) -> None:
    plan = json.loads(compiled_plan)
    room = len(base64.b64decode(plan["engine"]["payload"]["kernels"][0]["kernelParams"]["rawData"]))
    place = (*PARAMETERS, "offsets", 7, "value")
    assert "not in this test" in refusal_of(cudnn, changed(plan, place, room - 8), COMPILING)
    assert f"{room - 7} into {room} bytes" in refusal_of(cudnn, changed(plan, place, room - 7), COMPILING)
    assert len(handed_on) == 1


def test_vetting_gives_back_cudnns_own_text(target: Target, written: dict[str, Any], compiled_plan: bytes) -> None:
    plain = json.dumps(written, separators=(",", ":")).encode()
    shuffled = json.dumps(dict(reversed(written.items())), indent=1).encode()
    for data in (plain, shuffled):
        assert vetted(data, small(), pattern_of(target), BASE["engine"], KNOBS) == plain
    assert vetted(compiled_plan, small(), pattern_of(target), 71, {}) == compiled_plan


# ---- the pattern


def test_the_pattern_is_made_once_for_each_gpu(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(monkeypatch)
    first = pattern_of(target)
    assert made.kinds[DescriptorType.EXECUTION_PLAN] == 1
    assert pattern_of(target) is first
    assert made.kinds[DescriptorType.EXECUTION_PLAN] == 1
    assert first.profile == json.loads(H200.read_bytes())
    assert first.cudnn_version == target.library.version


def test_plans_of_a_cudnn_that_writes_them_differently_are_not_restored(
    cudnn: CudnnEngine, written: dict[str, Any], monkeypatch: pytest.MonkeyPatch, handed_on: list[bytes]
) -> None:
    real = serialized.graph_json
    monkeypatch.setattr(serialized, "graph_json", lambda problem: {**real(problem), "newer": 1})
    assert "in a form that convplan cannot vet" in refusal_of(cudnn, json.dumps(written).encode())
    assert handed_on == []


def test_dense_copies_are_vetted_as_the_dense_problem(cudnn: CudnnEngine, target: Target) -> None:
    candidate = next(one for one in cudnn.configs(spaced(), "measure") if one.config.knob("dense"))
    data = cudnn.build_execution_plan(spaced(), candidate.config).serialize()
    assert json.loads(data)["operationGraph"] == json.loads(msgspec.json.encode(graph_json(dense(spaced()))))
    without = EngineConfig.of("cudnn", **{name: value for name, value in candidate.config.knobs if name != "dense"})
    assert "operationGraph is not that" in refusal_of(cudnn, data, without, spaced())
