"""What follows a convolution, in cuDNN's graph: which forms are offered for what, what is in them, and their plans.

The table of what cuDNN 9.19 offers on an H200, which `docs/fusion.md` tells in words, is `offered` below.
"""

from __future__ import annotations

import base64
import ctypes
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import oracle
import pytest
import torch

from convplan import EngineConfig, Epilogue, PlanRejected, Policy, Problem, TensorSpec
from convplan._ahead import AheadBuilder
from convplan._problem import READS, WRITES
from convplan.engines.cudnn import engine as engines
from convplan.engines.cudnn import running
from convplan.engines.cudnn.configs import heuristic_configurations
from convplan.engines.cudnn.device import Device
from convplan.engines.cudnn.engine import COMPILED, GENERAL, MOST_COMPILED, SPECIALISED, CudnnEngine
from convplan.engines.cudnn.enums import Attribute
from convplan.engines.cudnn.fusion import Fusion, Node, fusion_of, is_specialised, uid_of
from convplan.engines.cudnn.graph import operation_graph
from convplan.engines.cudnn.plans import build_plan
from convplan.engines.cudnn.running import Form
from convplan.engines.cudnn.serialized import graph_json
from convplan.engines.cudnn.target import Target

POLICY = Policy()
ACTIVATIONS: dict[str, tuple[str, tuple[float, ...]]] = {
    "none": ("none", ()),
    "relu": ("relu", ()),
    "leaky_relu": ("leaky_relu", (0.1,)),
    "relu6": ("clamp", (0.0, 6.0)),
    "clamp": ("clamp", (-0.3, 0.7)),
    "gelu": ("gelu", ()),
    "gelu_tanh": ("gelu_tanh", ()),
    "silu": ("silu", ()),
    "sigmoid": ("sigmoid", ()),
    "tanh": ("tanh", ()),
    "hardswish": ("hardswish", ()),
    "elu": ("elu", (0.1,)),
    "softplus": ("softplus", (0.7, 20.0)),
}
PARTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "bias": {"bias": True},
    "residual": {"residual": True, "alpha": 0.1},
    "residual-bias": {"residual": True, "bias": True},
    "all": {"scale": True, "residual": True, "alpha": 0.1, "bias": True},
}
FUSED = [
    Epilogue(**parts, activation=name, parameters=parameters)
    for parts in PARTS.values()
    for name, parameters in ACTIVATIONS.values()
    if not Epilogue(**parts, activation=name).is_plain
]
PARTLY = [Epilogue(**PARTS["all"], activation=name, parameters=values) for name, values in ACTIVATIONS.values()]


def small(op: str = "fprop", epilogue: Epilogue | None = None, **changes: Any) -> Problem:
    settings = {"dtype": "float16", "layout": "channels_last", "padding": 1, "device": "cuda", **changes}
    return Problem.dense(
        op, (2, 32, 12, 12), (32, 32 // settings.get("groups", 1), 3, 3), epilogue=epilogue or Epilogue(), **settings
    )


def fused(op: str = "fprop", output_dtype: str | None = None, dtype: str = "float16", **epilogue: Any) -> Problem:
    return small(op, Epilogue(**epilogue), dtype=dtype, output_dtype=output_dtype)


def form_of(config: EngineConfig) -> int:
    return config.knob("fused")


def offered(problem: Problem) -> set[int]:
    """The forms that cuDNN 9.19 has engines for on an H200, for the problems here."""
    general = {GENERAL} if problem.output.layout == "channels_last" else set()
    if problem.dtype in ("float16", "bfloat16", "float32"):
        return general | ({SPECIALISED} if is_specialised(problem) else set())
    return general if problem.op == "fprop" and problem.dtype != "float64" else set()


# ---- what is offered


def check_offer(problem: Problem, cudnn: CudnnEngine) -> None:
    found = cudnn.configs(problem, "instant")
    assert {form_of(one.config) for one in found} == offered(problem), problem
    assert all(COMPILED in one.notes.behavior for one in found if form_of(one.config) == GENERAL), problem


@pytest.mark.behaviour("B30")
@pytest.mark.parametrize("op", ["fprop", "dgrad"])
@pytest.mark.parametrize("parts", PARTS)
def test_every_epilogue_is_offered_in_its_forms(op: str, parts: str, cudnn: CudnnEngine) -> None:
    for name, parameters in ACTIVATIONS.values():
        epilogue = Epilogue(**PARTS[parts], activation=name, parameters=parameters)
        if not epilogue.is_plain:
            check_offer(small(op, epilogue), cudnn)
            check_offer(small(op, epilogue, layout="contiguous"), cudnn)


@pytest.mark.parametrize("op", ["fprop", "dgrad"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_other_types_are_offered_the_same(op: str, dtype: str, cudnn: CudnnEngine) -> None:
    for epilogue in (*PARTLY[:: 1 if op == "fprop" else 3], Epilogue(bias=True, activation="relu")):
        check_offer(small(op, epilogue, dtype=dtype), cudnn)
        check_offer(small(op, epilogue, dtype=dtype, layout="contiguous"), cudnn)


@pytest.mark.parametrize(
    ("dtype", "output"),
    [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        *(("int8", output) for output in ("int8", "int32", "float32")),
        *(("float8_e4m3fn", output) for output in ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32")),
    ],
)
def test_other_types_may_be_written_than_read(dtype: str, output: str, cudnn: CudnnEngine) -> None:
    for op, parts in itertools.product(("fprop", "dgrad"), ("nothing", "all")):
        check_offer(small(op, Epilogue(**PARTS[parts], activation="relu"), dtype=dtype, output_dtype=output), cudnn)


@pytest.mark.parametrize("groups", [4, 32], ids=["grouped", "depthwise"])
@pytest.mark.parametrize("op", ["fprop", "dgrad"])
def test_groups_are_offered_too(op: str, groups: int, cudnn: CudnnEngine) -> None:
    check_offer(small(op, Epilogue(bias=True, activation="relu"), groups=groups), cudnn)


@pytest.mark.parametrize("x", [(4, 32, 40), (2, 32, 6, 8, 8)], ids=["1d", "3d"])
@pytest.mark.parametrize("op", ["fprop", "dgrad"])
def test_other_ranks_are_offered_too(op: str, x: tuple[int, ...], cudnn: CudnnEngine) -> None:
    w = (32, 32, *[3] * (len(x) - 2))
    for layout in ("channels_last", "contiguous"):
        epilogue = Epilogue(bias=True, residual=True, activation="relu")
        settings = {"dtype": "float16", "layout": layout, "padding": 1, "device": "cuda"}
        check_offer(Problem.dense(op, x, w, epilogue=epilogue, **settings), cudnn)


def strided_output() -> Problem:
    problem = fused(bias=True, activation="relu")
    spaced = tuple(2 * step for step in problem.y.strides)
    return msgspec.structs.replace(problem, y=msgspec.structs.replace(problem.y, strides=spaced))


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (fused(dtype="float64", bias=True, activation="relu"), r"the epilogue is bias\+relu of float64, supported"),
        (strided_output(), r"the output has strides \(.*\), supported with an epilogue: a dense layout"),
        (fused(activation="softplus", parameters=(1.0, 5.0)), "softplus's threshold is 5, supported: 17 and more"),
    ],
    ids=["float64", "strided-output", "softplus"],
)
def test_what_cudnn_does_not_fuse_is_refused_with_the_reason(problem: Problem, reason: str, cudnn: CudnnEngine) -> None:
    support = cudnn.supports(problem)
    assert not support.ok
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(support.reason)
    assert cudnn.configs(problem, "measure") == ()
    assert cudnn.supports(problem.core).ok


# ---- what is in a graph


def evaluate(fusion: Fusion, given: dict[str, torch.Tensor], result: torch.Tensor, output: str) -> torch.Tensor:
    """The nodes as their modes are documented, in float64."""
    values = {**given, **{name: torch.tensor(value).double() for name, value in fusion.constants.items()}}
    values[fusion.result] = result
    for node in fusion.nodes:
        values[node.y] = _computed(node, values[node.x], values[node.b] * node.alpha2 if node.b else None)
    return values[output]


def _computed(node: Node, x: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    settings = {attribute.name.removeprefix("POINTWISE_"): value for attribute, value in node.settings}
    low, high = settings.get("RELU_LOWER_CLIP", 0.0), settings.get("RELU_UPPER_CLIP", torch.inf)
    slope, beta = settings.get("RELU_LOWER_CLIP_SLOPE", 0.0), settings.get("SOFTPLUS_BETA", 1.0)
    computed: dict[str, Callable[[], torch.Tensor]] = {
        "ADD": lambda: x + b,
        "MUL": lambda: x * b,
        "IDENTITY": lambda: x,
        "RELU_FWD": lambda: torch.where(x > low, x, low + slope * (x - low)).clamp(max=high),
        "GELU_FWD": lambda: x * (1 + torch.erf(x / 2**0.5)) / 2,
        "GELU_APPROX_TANH_FWD": lambda: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
        "SWISH_FWD": lambda: x / (1 + torch.exp(-x * settings["SWISH_BETA"])),
        "SIGMOID_FWD": lambda: 1 / (1 + torch.exp(-x)),
        "TANH_FWD": lambda: torch.tanh(x),
        "ELU_FWD": lambda: torch.where(x > 0, x, settings["ELU_ALPHA"] * torch.expm1(x)),
        "SOFTPLUS_FWD": lambda: torch.log1p(torch.exp(beta * x)) / beta,
    }
    return computed[node.mode.name]()


@pytest.mark.behaviour("B30")
@pytest.mark.parametrize("epilogue", FUSED, ids=str)
def test_the_nodes_compute_the_epilogue(epilogue: Epilogue) -> None:
    """By their documented meaning, in both forms, against torch's own modules."""
    problem = small(epilogue=epilogue)
    generator = torch.Generator().manual_seed(7)
    result, z = (torch.randn(problem.y.dims, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    b, s = (torch.randn(1, 32, 1, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    before = (s if epilogue.scale else 1) * result + (epilogue.alpha * z if epilogue.residual else 0)
    before = before + (b if epilogue.bias else 0)
    modules: dict[str, Callable[..., torch.Tensor]] = {
        "none": lambda x: x,
        "clamp": torch.clamp,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    right = modules.get(epilogue.activation) or getattr(torch.nn.functional, epilogue.activation)
    expected = right(before, *epilogue.parameters)
    for specialised in (False, True)[: 1 + is_specialised(problem)]:
        fusion = fusion_of(problem, specialised)
        given = {"z": z, "b": b if epilogue.bias else torch.zeros_like(b), "s": s}
        torch.testing.assert_close(evaluate(fusion, given, result, "y"), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.behaviour("B24")
@pytest.mark.behaviour("B27")
@pytest.mark.parametrize("op", ["fprop", "dgrad"])
def test_tensors_have_their_letters_and_alignments(op: str) -> None:
    """Read from what cuDNN writes, which `test_graphs_are_written_as_cudnn_writes_them` here compares."""
    aligned = {"bias_alignment_bytes": 4, "residual_alignment_bytes": 32}
    written = graph_json(fused(op, **PARTS["all"], **aligned, activation="hardswish"))["tensors"]
    by_name = {chr(number) if (number := int(one["name"])) < 128 else number: one for one in written}
    letters = {name for name in by_name if isinstance(name, str)}
    assert letters == {"x", "y", "w", "z", "b", "s"}
    # Runs copy what is added and has less than 16.
    assert (by_name["b"]["ptrAlignment"], by_name["z"]["ptrAlignment"], by_name["s"]["ptrAlignment"]) == (32, 32, 4)
    virtual = [one for one in written if one["isVirtual"]]
    assert {one["dataType"] for one in virtual} == {"CUDNN_DATA_FLOAT"}
    assert {tuple(one["dim"]) for one in virtual} == {(2, 32, 12, 12)}
    assert {int(one["name"]) < 128 for one in written if one["isVirtual"] or one["isByValue"]} == {False}
    assert len({one["name"] for one in written}) == len(written)


def test_the_order_of_a_specialised_graph_is_that_of_the_ready_made_engines() -> None:
    nodes = graph_json(fused(bias=True, residual=True, alpha=0.5, activation="relu"), True)["nodes"]
    assert [one.get("pointwiseMode", "").removeprefix("CUDNN_POINTWISE_") for one in nodes] == [
        "", "ADD", "ADD", "RELU_FWD",
    ]  # fmt: skip
    assert [one["B"] for one in nodes[1:3]] == [str(ord("z")), str(ord("b"))]
    assert [one["alpha2"] for one in nodes[1:3]] == [0.5, 1.0]


def written_by_cudnn(problem: Problem, specialised: bool, target: Target) -> bytes:
    """Some plan as JSON; only of a specialised graph one that is not compiled."""
    graph = operation_graph(target, problem, specialised=specialised)
    found = [one for source in ("mode_a", "fallback") for one in heuristic_configurations(graph, target, source)]
    ready = [one for one in found if COMPILED not in one.notes.behavior]
    chosen = (ready or found)[0]
    return build_plan(graph, target, chosen.engine, dict(chosen.knobs), (1,)).serialize()


def cases_written() -> Iterator[tuple[Problem, bool]]:
    for epilogue in FUSED:
        if is_specialised(small(epilogue=epilogue)):
            yield small(epilogue=epilogue), True
    yield fused("fprop", **PARTS["all"], activation="hardswish"), False
    yield fused("fprop", bias=True, activation="relu"), False
    yield fused("dgrad", **PARTS["residual"], activation="softplus", parameters=(0.7, 20.0)), False
    yield fused("fprop", "int8", "int8", **PARTS["all"], activation="leaky_relu", parameters=(0.1,)), False
    yield fused("fprop", "float16", "float8_e4m3fn", **PARTS["bias"], activation="elu", parameters=(0.1,)), False


@pytest.mark.behaviour("C1")
def test_graphs_are_written_as_cudnn_writes_them(target: Target) -> None:
    compared: Counter[bool] = Counter()
    for problem, specialised in cases_written():
        mine = json.dumps(json.loads(msgspec.json.encode(graph_json(problem, specialised))))
        theirs = json.loads(written_by_cudnn(problem, specialised, target))["operationGraph"]
        assert mine == json.dumps(theirs), problem
        compared[specialised] += 1
    assert compared == {True: sum(is_specialised(small(epilogue=one)) for one in FUSED), False: 5}


# ---- the official front end's answer


def front_end_configs(problem: Problem, mode: oracle.Mode) -> oracle.Configs:
    """What NVIDIA's front end is told by the heuristics of the same library, for convolution, add, add, activation."""
    cudnn = oracle.frontend()
    half = cudnn.data_type.HALF
    properties = oracle.PROPERTIES.read_text(encoding="utf-8")
    graph = cudnn.pygraph(
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        device_property=oracle._device(properties),
    )
    tensors = {
        name: graph.tensor(name=name, dim=list(spec.dims), stride=list(spec.strides), data_type=half)
        for name, spec in (("x", problem.x), ("w", problem.w), ("z", problem.y))
    }
    tensors["b"] = graph.tensor(name="b", dim=[1, 32, 1, 1], stride=[32, 1, 32, 32], data_type=half)
    one, pair = [1, 1], [list(side) for side in zip(*problem.padding, strict=True)]
    last = graph.conv_fprop(
        image=tensors["x"], weight=tensors["w"], pre_padding=pair[0], post_padding=pair[1], stride=one, dilation=one
    )
    for letter in "zb" if problem.epilogue.residual else "b":
        last = graph.add(a=last, b=tensors[letter])
    last = {"relu": graph.relu, "gelu": graph.gelu}[problem.epilogue.activation](input=last)
    last.set_output(True).set_dim(list(problem.y.dims)).set_stride(list(problem.y.strides)).set_data_type(half)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([getattr(cudnn.heur_mode, mode)])
    return [oracle.parse_name(graph.get_plan_name_at_index(place)) for place in range(graph.get_execution_plan_count())]


@pytest.mark.behaviour("B13")
@pytest.mark.behaviour("B30")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("residual", [False, True], ids=["bias", "residual-bias"])
def test_each_list_equals_the_front_ends(residual: bool, activation: str, target: Target) -> None:
    aligned = {f"{name}_alignment_bytes": oracle.ALIGNMENT_BYTES for name in ("bias", "residual")}
    problem = fused(bias=True, residual=residual, activation=activation, **(aligned if residual else {}))
    if not residual:
        problem = msgspec.structs.replace(
            problem, epilogue=msgspec.structs.replace(problem.epilogue, bias_alignment_bytes=oracle.ALIGNMENT_BYTES)
        )
    tensors = {
        letter: TensorSpec(spec.dims, spec.strides, spec.dtype, oracle.ALIGNMENT_BYTES)
        for letter, spec in (("x", problem.x), ("w", problem.w), ("y", problem.y))
    }
    problem = msgspec.structs.replace(problem, **tensors)
    graph = operation_graph(target, problem, specialised=is_specialised(problem))
    sources: dict[oracle.Mode, str] = {"A": "mode_a", "B": "mode_b", "FALLBACK": "fallback"}
    for mode, source in sources.items():
        found = [(one.engine, dict(one.knobs)) for one in heuristic_configurations(graph, target, source)]
        assert found == front_end_configs(problem, mode)
        assert found


# ---- configurations


def test_both_families_are_listed_and_the_ready_made_one_first(cudnn: CudnnEngine) -> None:
    found = cudnn.configs(fused(bias=True, residual=True, activation="relu"), "measure")
    forms = [form_of(one.config) for one in found]
    assert forms == sorted(forms, reverse=True)
    ready = [one for one in found if COMPILED not in one.notes.behavior]
    assert len(ready) > 20
    assert {form_of(one.config) for one in ready} == {SPECIALISED}
    assert len({one.config for one in found}) == len(found)


def test_few_of_what_is_compiled_is_built_unless_all_is_asked_for(cudnn: CudnnEngine) -> None:
    problem = fused("dgrad", bias=True, activation="relu")
    found, everything = cudnn.configs(problem, "measure"), cudnn.configs(problem, "exhaustive")
    assert [one.config for one in found] == [one.config for one in everything]
    assert not any(one.refused for one in everything)
    assert len(everything) > MOST_COMPILED, "the case does not show it"
    refused = [bool(one.refused) for one in found]
    assert refused == [False] * MOST_COMPILED + [True] * (len(found) - MOST_COMPILED)
    assert "effort 'exhaustive' builds more" in found[-1].refused


def test_the_search_space_holds_every_proposal(cudnn: CudnnEngine) -> None:
    problem = fused(bias=True, residual=True, activation="relu")
    spaces = {(dict(one.fixed)["fused"], dict(one.fixed)["engine"]): dict(one.free) for one in cudnn.spaces(problem)}
    for candidate in cudnn.configs(problem, "exhaustive"):
        knobs = dict(candidate.config.knobs)
        free = spaces[knobs.pop("fused"), knobs.pop("engine")]
        assert all(value in free[name] for name, value in knobs.items())


@pytest.mark.parametrize(
    ("problem", "form"),
    [
        (small(), GENERAL),
        (fused(bias=True, activation="relu"), 0),
        (fused(bias=True, activation="gelu"), SPECIALISED),
        (fused(bias=True, scale=True), SPECIALISED),
        (fused("dgrad", bias=True, activation="relu"), SPECIALISED),
        (fused(bias=True, activation="relu"), 3),
    ],
    ids=["plain", "no-form", "no-such-activation", "scale", "dgrad", "unknown"],
)
def test_a_form_that_the_problem_does_not_have_is_rejected(problem: Problem, form: int, cudnn: CudnnEngine) -> None:
    """A specialised graph would leave out what it has no place for."""
    config = EngineConfig.of("cudnn", engine=0, **({"fused": form} if form else {}))
    for ask in (cudnn.candidate, lambda *given: cudnn.build(*given, POLICY)):
        with pytest.raises(PlanRejected, match=f"there is no variant of this problem with fused={form}"):
            ask(problem, config)


# ---- plans


RESTORED = [
    (fused(bias=True, residual=True, alpha=0.5, activation="relu"), SPECIALISED),
    (fused(activation="relu"), SPECIALISED),
    (fused(**PARTS["all"], activation="hardswish"), GENERAL),
    (fused("fprop", "int8", "int8", scale=True, bias=True, activation="relu"), GENERAL),
]


@pytest.mark.behaviour("C1")
@pytest.mark.parametrize(("problem", "form"), RESTORED, ids=[f"{one}" for one, _ in RESTORED])
def test_what_was_built_is_restored_as_it_was(problem: Problem, form: int, cudnn: CudnnEngine) -> None:
    config = next(one.config for one in cudnn.configs(problem, "measure") if form_of(one.config) == form)
    data = cudnn.build_execution_plan(problem, config).serialize()
    restored = cudnn.restore_execution_plan(problem, config, data)
    assert restored.serialize() == data
    for other in (problem.core, fused(problem.op, **PARTS["bias"], activation="tanh")):
        forms = {name: value for name, value in config.knobs if name != "fused" or not other.epilogue.is_plain}
        with pytest.raises(PlanRejected, match=r"operationGraph is not that of the problem|fused=2"):
            cudnn.restore_execution_plan(other, EngineConfig.of("cudnn", **forms), data)


@pytest.fixture(scope="module")
def hardswish() -> dict[str, Any]:
    """Filled once with a compiled plan that has constants, by the tests that need it."""
    return {}


CHANGES: dict[str, tuple[str, Any, str]] = {
    "another-tensors-number": ("uid", uid_of("c9"), "wants the address of tensor 2009"),
    "a-number-as-a-tensor": ("uid", ord("x"), "wants the address of tensor 120"),
    "more-bytes": ("size", 64, "writes 64 bytes as value"),
    "no-bytes": ("size", None, "writes None bytes as value"),
    "beyond-the-end": ("value", 10**6, "an offset of 1000000"),
}


@pytest.mark.parametrize(("field", "value", "reason"), CHANGES.values(), ids=CHANGES)
def test_constants_are_written_where_they_belong(
    field: str, value: Any, reason: str, cudnn: CudnnEngine, hardswish: dict[str, Any]
) -> None:
    problem = fused(**PARTS["bias"], activation="hardswish")
    config = cudnn.configs(problem, "instant")[0].config
    if not hardswish:
        hardswish |= json.loads(cudnn.build_execution_plan(problem, config).serialize())
    changed = json.loads(json.dumps(hardswish))
    offsets = [
        one
        for kernel in changed["engine"]["payload"]["kernels"]
        for one in kernel["kernelParams"]["offsets"]
        if one.get("update_as") == "value"
    ]
    assert {one["uid"] for one in offsets} == {uid_of("c1"), uid_of("c2")}
    offsets[0] |= {field: value}
    if value is None:
        del offsets[0][field]
    with pytest.raises(PlanRejected, match=reason):
        cudnn.restore_execution_plan(problem, config, json.dumps(changed).encode())
    assert base64.b64decode(hardswish["engine"]["payload"]["kernels"][0]["cubin"])[:4] == b"\x7fELF"


@pytest.mark.behaviour("C1")
@pytest.mark.behaviour("C7")
def test_plans_are_built_ahead_and_restored(h200: Device, cudnn: CudnnEngine) -> None:
    for problem in (fused(bias=True, residual=True, activation="relu"), fused(scale=True, activation="silu")):
        ahead = AheadBuilder(h200).build(problem, Policy(effort="instant"), leading=1)
        ((config, data),) = ahead.serialized.items()
        assert ahead.record.ranking[0].config == config
        assert cudnn.restore(problem, config, POLICY, data).workspace_bytes == ahead.record.ranking[0].workspace_bytes


# ---- the addresses that a run gives


class Tensor:
    """Stands in for a tensor on a GPU, of which a run needs the address."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


@pytest.mark.behaviour("B27")
@pytest.mark.parametrize("op", ["fprop", "dgrad"])
@pytest.mark.parametrize("epilogue", [one for one in FUSED if one.activation in ("none", "relu", "hardswish")], ids=str)
def test_each_address_goes_to_its_tensor(op: str, epilogue: Epilogue) -> None:
    problem = small(op, epilogue)
    for specialised in (False, True)[: 1 + is_specialised(problem)]:
        form = Form.of(problem, problem, specialised)
        assert form.epilogue is not None
        assert form.epilogue.lacks_bias == (specialised and not epilogue.bias)
        read = form.epilogue.addresses(Tensor(ord("z")), Tensor(ord("b")), Tensor(ord("s")), None)
        addresses = dict(zip(form.uids, (*map(ord, READS[op] + WRITES[op]), *read), strict=True))
        fusion = fusion_of(problem, specialised)
        for name in ("x", "w", "y", *fusion.given):
            assert addresses.pop(ord(name)) == ord(name)
        values = {uid_of(name): value for name, value in fusion.constants.items()}
        assert {uid: ctypes.c_float.from_address(at).value for uid, at in addresses.items()} == pytest.approx(values)


def test_every_set_of_tensors_has_a_reader() -> None:
    found = {
        "".join(fusion_of(small(epilogue=epilogue), specialised).given)
        for epilogue in (*FUSED, *(Epilogue(scale=True, bias=b, residual=r) for b in (0, 1) for r in (0, 1)))
        for specialised in (False, True)[: 1 + is_specialised(small(epilogue=epilogue))]
    }
    assert found | {"mq", "g"} == set(running._READERS)  # test_statistics_graphs, test_gate_graphs


def test_a_pack_of_a_fused_plan_has_every_tensor_and_constant(
    cudnn: CudnnEngine, packed: list[dict[Attribute, list[int]]]
) -> None:
    problem = fused(bias=True, residual=True, activation="relu")
    plan = cudnn.build_execution_plan(problem, cudnn.configs(problem, "measure")[0].config)
    plan.pack((0x100, 0x200, 0x300, 0x400, 0x500, 0x600))
    (given,) = packed
    assert "".join(map(chr, given[Attribute.VARIANT_PACK_UNIQUE_IDS])) == "xwyzb"
    assert given[Attribute.VARIANT_PACK_DATA_POINTERS] == [0x100, 0x200, 0x300, 0x400, 0x500]
    assert given[Attribute.VARIANT_PACK_WORKSPACE] == [0x600]


def test_strided_inputs_are_copied_in_each_form(cudnn: CudnnEngine) -> None:
    problem = fused(bias=True, residual=True, activation="relu")
    strided = msgspec.structs.replace(
        problem, x=msgspec.structs.replace(problem.x, strides=tuple(2 * step for step in problem.x.strides))
    )
    found = Counter((one.config.knob("dense"), form_of(one.config)) for one in cudnn.configs(strided, "measure"))
    assert {(1, SPECIALISED), (1, GENERAL)} <= set(found)
    assert engines.OURS == ("dense", "fused")


@pytest.mark.parametrize("parts", ["bias", "residual-bias"])
def test_ready_made_engines_that_make_nan_of_tanh_are_not_asked(parts: str, cudnn: CudnnEngine) -> None:
    """Neither in their own form, nor because the general one happens to be the same graph."""
    found = cudnn.configs(fused(**PARTS[parts], activation="tanh"), "measure")
    assert found
    assert all(form_of(one.config) == GENERAL and COMPILED in one.notes.behavior for one in found)


# ---- a bias alone


@pytest.mark.behaviour("B30")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_bias_alone_is_added_by_what_is_ready_made(dtype: str, layout: str, cudnn: CudnnEngine) -> None:
    problem = small(epilogue=Epilogue(bias=True), dtype=dtype, layout=layout)
    adding = [one for one in cudnn.configs(problem, "measure") if form_of(one.config) == SPECIALISED]
    allowed = [one for one in adding if not one.refused]
    assert allowed
    assert all(COMPILED not in one.notes.behavior for one in allowed)
    plan = cudnn.build_execution_plan(problem, allowed[0].config)
    data = plan.serialize()
    assert cudnn.restore_execution_plan(problem, allowed[0].config, data).serialize() == data
    bias = fusion_of(problem, specialised=True).given["b"]
    assert bias.alignment_bytes == 16, "ready-made engines take that for granted, so runs see to it"


@pytest.mark.parametrize(
    "changes", [{"op": "dgrad"}, {"dtype": "float64"}, {"epilogue": Epilogue()}], ids=["dgrad", "float64", "no-bias"]
)
def test_what_has_no_such_engine_keeps_the_convolution_alone(changes: dict[str, Any], cudnn: CudnnEngine) -> None:
    problem = small(**{"epilogue": Epilogue(bias=True), **changes})
    assert {form_of(one.config) for one in cudnn.configs(problem, "measure")} == {0}
    config = EngineConfig.of("cudnn", engine=0, fused=SPECIALISED)
    with pytest.raises(PlanRejected, match="fused=2"):
        cudnn.build(problem, config, Policy())
