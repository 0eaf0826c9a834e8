"""Keys: two lists, of what must change them and of what must not, with only one thing varied at a time.

Environments are made by the real probe from settings that a test patches one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from helpers.cases import DTYPE_PAIRS
from helpers.plans import HERE, run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from convplan import Epilogue, Policy, Problem, TensorSpec, _environment, _key
from convplan._environment import Environment
from convplan._key import KEY_LENGTH, choice_key, plan_key

POLICY = Policy(deterministic=False, allow_tf32=False)
EPILOGUES: list[dict[str, Any]] = [
    {"residual": True},
    {"residual": True, "alpha": 0.5},
    {"residual": True, "residual_alignment_bytes": 4},
    {"scale": True},
    {"activation": "relu"},
    {"activation": "leaky_relu"},
    {"activation": "leaky_relu", "parameters": (0.2,)},
    {"bias": True, "activation": "relu"},
    {"bias": True, "bias_alignment_bytes": 4, "activation": "relu"},
]
PROBLEM = Problem.dense("fprop", (2, 6, 9, 11), (4, 3, 3, 5), padding=(1, (0, 1)), stride=(2, 1), groups=2)


def key(problem: Problem = PROBLEM, policy: Policy = POLICY, environment: Environment = HERE) -> str:
    return plan_key(problem, policy, environment)


def aligned(spec: TensorSpec, alignment_bytes: int) -> TensorSpec:
    return msgspec.structs.replace(spec, alignment_bytes=alignment_bytes)


def restrided(spec: TensorSpec, layout: str) -> TensorSpec:
    return TensorSpec.dense(spec.dims, spec.dtype, layout)


def replaced(problem: Problem, **changes: Any) -> Problem:
    return msgspec.structs.replace(problem, **changes)


def retyped(x: str, w: str, y: str) -> dict[str, TensorSpec]:
    """The tensors of `PROBLEM` with other dtypes."""
    return {n: TensorSpec.dense(getattr(PROBLEM, n).dims, dtype) for n, dtype in zip("xwy", (x, w, y), strict=True)}


# What must change a key

OTHER_PROBLEMS = [
    pytest.param(replaced(PROBLEM, op="dgrad"), id="op-dgrad"),
    pytest.param(replaced(PROBLEM, op="wgrad"), id="op-wgrad"),
    *(
        pytest.param(
            replaced(PROBLEM, **{letter: restrided(getattr(PROBLEM, letter), "channels_last")}), id=f"{letter}-layout"
        )
        for letter in "xwy"
    ),
    *(
        pytest.param(replaced(PROBLEM, **{letter: aligned(getattr(PROBLEM, letter), 4)}), id=f"{letter}-alignment")
        for letter in "xwy"
    ),
    pytest.param(
        Problem.dense("fprop", (3, 6, 9, 11), (4, 3, 3, 5), padding=(1, (0, 1)), stride=(2, 1), groups=2), id="n"
    ),
    pytest.param(
        Problem.dense("fprop", (2, 6, 9, 12), (4, 3, 3, 5), padding=(1, (0, 1)), stride=(2, 1), groups=2), id="size"
    ),
    pytest.param(
        Problem.dense("fprop", (2, 6, 9, 11), (8, 3, 3, 5), padding=(1, (0, 1)), stride=(2, 1), groups=2), id="k"
    ),
    pytest.param(
        Problem.dense("fprop", (2, 6, 9, 11), (4, 3, 3, 4), padding=(1, (0, 1)), stride=(2, 1), groups=2), id="taps"
    ),
    pytest.param(
        Problem.dense("fprop", (2, 6, 9, 11), (4, 3, 3, 5), padding=((1, 1), (1, 0)), stride=(2, 1), groups=2),
        id="padding-side",
    ),
    pytest.param(
        Problem.dense("fprop", (2, 6, 9, 11), (4, 3, 3, 5), padding=(1, 1), stride=(2, 1), groups=2), id="padding"
    ),
    pytest.param(
        Problem.dense("fprop", (2, 6, 9, 11), (4, 3, 3, 5), padding=(1, (0, 1)), stride=(1, 1), groups=2), id="stride"
    ),
    pytest.param(
        Problem.dense(
            "fprop", (2, 6, 9, 11), (4, 3, 3, 5), padding=(1, (0, 1)), stride=(2, 1), dilation=(1, 2), groups=2
        ),
        id="dilation",
    ),
    pytest.param(Problem.dense("fprop", (2, 6, 9, 11), (4, 6, 3, 5), padding=(1, (0, 1)), stride=(2, 1)), id="groups"),
    pytest.param(replaced(PROBLEM, epilogue=Epilogue(bias=True)), id="bias"),
    *(
        pytest.param(replaced(PROBLEM, epilogue=Epilogue(**changes)), id=f"epilogue-{number}")
        for number, changes in enumerate(EPILOGUES)
    ),
    pytest.param(replaced(PROBLEM, device="cuda"), id="device"),
    *(
        pytest.param(
            replaced(PROBLEM, **retyped(dtype, dtype, output)),
            id=f"dtype-{dtype}" + (f"-to-{output}" if output != dtype else ""),
        )
        for dtype, output in DTYPE_PAIRS
        if dtype != "float32"
    ),
    *(
        pytest.param(replaced(PROBLEM, **retyped(*dtypes)), id="-".join(dtypes))
        for dtypes in (
            ("float8_e4m3fn", "float8_e5m2", "float32"),
            ("float8_e5m2", "float8_e4m3fn", "float32"),
            ("float8_e5m2", "float8_e4m3fn", "float8_e4m3fn"),
        )
    ),
]

# The same three tensors, since strides floor: only the window tells these apart.
SAME_SHAPES = tuple(
    Problem.dense("fprop", (1, 2, 10, 10), (2, 2, 3, 3), **{"stride": 5, **window})
    for window in (
        {},
        {"stride": 4},
        {"stride": (5, 4)},
        {"dilation": 2},
        {"dilation": (1, 2)},
        {"padding": 1},
        {"padding": ((0, 1), (0, 1))},
        {"padding": ((1, 0), (1, 0))},
    )
)

OTHER_POLICIES = [
    pytest.param({"deterministic": True}, id="deterministic"),
    pytest.param({"allow_tf32": True}, id="tf32"),
    pytest.param({"workspace_limit_bytes": 0}, id="no-workspace"),
    pytest.param({"workspace_limit_bytes": 1}, id="workspace-limit"),
    pytest.param({"engines": ("aten",)}, id="engines"),
    pytest.param({"engines": ("fft", "aten")}, id="engine-order"),
    pytest.param({"allow_notes": ("DOWN_CONVERT_INPUTS",)}, id="allow-notes"),
    pytest.param({"benchmark_limit": 3}, id="benchmark-limit"),
    pytest.param({"l2": "cold"}, id="l2"),
]


@pytest.mark.behaviour("B21")
@pytest.mark.parametrize("other", OTHER_PROBLEMS)
def test_every_part_of_the_problem_changes_the_key(other: Problem) -> None:
    assert other != PROBLEM
    assert key(other) != key()
    assert choice_key(other, POLICY) != choice_key(PROBLEM, POLICY)


@pytest.mark.behaviour("B21")
def test_no_two_of_the_other_problems_share_a_key() -> None:
    all_of_them = [PROBLEM, *SAME_SHAPES, *(param.values[0] for param in OTHER_PROBLEMS)]
    assert len({(one.x, one.w, one.y) for one in SAME_SHAPES}) == 1
    assert len({key(one) for one in all_of_them}) == len(all_of_them)


@pytest.mark.behaviour("B1")
def test_every_alignment_has_its_own_key() -> None:
    keys = {key(replaced(PROBLEM, x=aligned(PROBLEM.x, 2**power))) for power in range(6)}
    assert len(keys) == 6


@pytest.mark.behaviour("B21")
@pytest.mark.parametrize("changes", OTHER_POLICIES)
def test_what_is_allowed_changes_the_key(changes: dict[str, Any]) -> None:
    other = POLICY.replace(**changes)
    assert key(policy=other) != key()
    assert choice_key(PROBLEM, other) != choice_key(PROBLEM, POLICY)


def test_no_two_of_the_other_policies_share_a_key() -> None:
    policies = [POLICY, *(POLICY.replace(**param.values[0]) for param in OTHER_POLICIES)]
    assert len({key(policy=policy) for policy in policies}) == len(policies)


def test_no_field_is_forgotten() -> None:
    """A new field of a problem, a tensor or a policy must be put on one of the two sides."""
    labels = {label for label, _ in _key.problem_items(PROBLEM)}
    for name in Problem.__struct_fields__:
        assert any(label == name or label.startswith(f"{name}.") for label in labels), name
    for letter in "xwy":
        assert {f"{letter}.{name}" for name in TensorSpec.__struct_fields__} <= labels
    fused = {label for label, _ in _key.problem_items(replaced(PROBLEM, epilogue=Epilogue(activation="relu")))}
    alone = {"statistics", "gate"}  # with which nothing else comes
    for name in alone & set(Epilogue.__struct_fields__):
        op = "dgrad" if name == "gate" else "fprop"
        given = Problem.dense(op, (1, 4, 6, 6), (8, 4, 3, 3), dtype="float16", epilogue=Epilogue(**{name: True}))
        fused |= {label for label, _ in _key.problem_items(given)}
    assert {f"epilogue.{name}" for name in Epilogue.__struct_fields__} <= fused
    left_out = {"effort", "mode", "replay_miss", "capture_miss", "tuning_limit_s", "tune_after", "budget_s"}
    left_out |= {"nearest", "ranks", "search_s", "build_limit_s", "run_limit_s"}
    assert {label for label, _ in POLICY.key_items()} == set(Policy.__struct_fields__) - left_out


# Stored plans are found by these: should one change, KEY_SCHEMA must go up with it.
STORED = {
    "float64": "f4a3b335058c4b912fa59e6e97f31d4f",
    "float32": "7b10ad305ee73a476e3f32f5baaa5fb2",
    "bfloat16": "a79b2f24ef35d593851b7fd21ef6d79b",
    "float16": "213ab22f5352f3de13deb44ab06aefec",
}


@pytest.mark.parametrize("dtype", STORED)
def test_plans_of_key_schema_2_keep_their_keys(dtype: str) -> None:
    assert _key.KEY_SCHEMA == 2
    assert key(replaced(PROBLEM, **retyped(dtype, dtype, dtype))) == STORED[dtype]


# What must not

SAME_POLICIES = [
    pytest.param({"tune_after": 7}, id="tune-after"),
    pytest.param({"budget_s": 0.125}, id="budget"),
    pytest.param({"mode": "replay"}, id="mode"),
    pytest.param({"replay_miss": "instant"}, id="replay-miss"),
    pytest.param({"capture_miss": "error"}, id="capture-miss"),
    pytest.param({"tuning_limit_s": 5.0}, id="tuning-limit"),
    pytest.param({"effort": "instant"}, id="effort"),
    pytest.param({"nearest": False}, id="nearest"),
    pytest.param({"search_s": 5.0, "build_limit_s": 1.0, "run_limit_s": 1.0}, id="limits-of-the-search"),
    pytest.param({"engines": None, "allow_notes": []}, id="empty-notes"),
]


@pytest.mark.behaviour("B21")
@pytest.mark.parametrize("changes", SAME_POLICIES)
def test_when_and_how_long_to_search_does_not_change_the_key(changes: dict[str, Any]) -> None:
    assert key(policy=POLICY.replace(**changes)) == key()


@pytest.mark.parametrize(
    ("one", "same"),
    [
        pytest.param({"engines": ("ATEN", " fft")}, {"engines": ["aten", "fft"]}, id="engine-spelling"),
        pytest.param({"allow_notes": ("B", "A")}, {"allow_notes": ["a", "b"]}, id="note-order"),
    ],
)
def test_other_spellings_of_the_same_rule_have_the_same_key(one: dict[str, Any], same: dict[str, Any]) -> None:
    assert key(policy=POLICY.replace(**one)) == key(policy=POLICY.replace(**same))


@pytest.mark.behaviour("B2")
@pytest.mark.parametrize("strides", [(12, 12, 3, 1), (0, 0, 3, 1), (7, 99, 3, 1), (1, 1, 3, 1)])
def test_strides_of_size_one_dimensions_do_not_change_the_key(strides: tuple[int, ...]) -> None:
    plain = Problem.dense("fprop", (1, 1, 4, 3), (2, 1, 1, 1))
    other = replaced(
        plain, x=TensorSpec((1, 1, 4, 3), strides, "float32"), w=TensorSpec((2, 1, 1, 1), (1, 5, 9, 0), "float32")
    )
    assert key(other) == key(plain)


def test_sizes_straight_from_a_tensor_make_the_same_key() -> None:
    """`torch.Size` is a tuple that prints in another way."""
    x, w, y = torch.empty(2, 3, 8), torch.empty(4, 3, 3), torch.empty(2, 4, 6)
    specs = [TensorSpec(t.shape, t.stride(), "float32") for t in (x, w, y)]
    plain = Problem.dense("fprop", (2, 3, 8), (4, 3, 3))
    other = replaced(plain, x=specs[0], w=specs[1], y=specs[2])
    assert other == plain
    assert key(other) == key(plain)


def test_equal_problems_made_in_different_ways_share_a_key() -> None:
    again = msgspec.json.decode(msgspec.json.encode(PROBLEM), type=Problem)
    policy = msgspec.json.decode(msgspec.json.encode(POLICY), type=Policy)
    environment = msgspec.json.decode(msgspec.json.encode(HERE), type=Environment)
    assert plan_key(again, policy, environment) == key()


def test_the_environment_is_no_part_of_the_choice_key() -> None:
    assert key(environment=Environment("cpu", (("threads", "9"),))) != key()
    assert choice_key(PROBLEM, POLICY) == choice_key(PROBLEM, POLICY)
    assert choice_key(PROBLEM, POLICY) != key()


# The environment, with the probe patched

LIVE = (2, True, "highest", "none")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The key in the environment that the real probe makes of given settings."""

    def measured(live: tuple[int, bool, str, str] = LIVE, **patched: object) -> str:
        with monkeypatch.context() as patch:
            _environment._cpu_environment.cache_clear()
            patch.setattr(_environment, "live_state", lambda: live)
            patch.setattr(_environment, "cpu_model", lambda: patched.get("cpu", "cpu A"))
            patch.setattr(torch, "__version__", patched.get("torch", "2.13.0"))
            patch.setattr(_environment, "_onednn_version", lambda: patched.get("onednn", "3.7"))
            patch.setattr(torch.backends.cpu, "get_cpu_capability", patched.get("capability", lambda: "AVX512"))
            found = key(environment=_environment.current("cpu"))
        _environment._cpu_environment.cache_clear()
        return found

    return measured


def _fails() -> str:
    raise RuntimeError("no such instruction")


OTHER_ENVIRONMENTS = [
    pytest.param({"live": (4, True, "highest", "none")}, id="threads"),
    pytest.param({"live": (2, False, "highest", "none")}, id="onednn-off"),
    pytest.param({"live": (2, True, "medium", "none")}, id="matmul-precision"),
    pytest.param({"live": (2, True, "highest", "bf16")}, id="conv-precision"),
    pytest.param({"cpu": "cpu B"}, id="cpu-model"),
    pytest.param({"torch": "2.13.1"}, id="torch-version"),
    pytest.param({"torch": "2.13.0+cpu"}, id="torch-build"),
    pytest.param({"onednn": "3.8"}, id="onednn-version"),
    pytest.param({"capability": lambda: "AVX2"}, id="instruction-set"),
    pytest.param({"capability": _fails}, id="probe-fails"),
]


@pytest.mark.behaviour("B21")
@pytest.mark.parametrize("changes", OTHER_ENVIRONMENTS)
def test_every_part_of_the_environment_changes_the_key(probe: Callable[..., str], changes: dict[str, Any]) -> None:
    assert probe(**changes) != probe()


def test_no_two_environments_share_a_key_and_the_same_one_keeps_it(probe: Callable[..., str]) -> None:
    keys = [probe(), *(probe(**param.values[0]) for param in OTHER_ENVIRONMENTS)]
    assert len(set(keys)) == len(keys)
    assert [probe(), *(probe(**param.values[0]) for param in OTHER_ENVIRONMENTS)] == keys


def test_a_failed_probe_is_no_working_probes_answer(probe: Callable[..., str]) -> None:
    assert probe(capability=_fails) == probe(capability=_fails)
    assert probe(capability=_fails) != probe(capability=lambda: "")


def test_the_live_environment_follows_torch() -> None:
    threads = torch.get_num_threads()
    before = key(environment=_environment.current("cpu"))
    torch.set_num_threads(threads + 1)
    try:
        changed = key(environment=_environment.current("cpu"))
    finally:
        torch.set_num_threads(threads)
    assert changed != before
    assert key(environment=_environment.current("cpu")) == before
    torch._C._set_mkldnn_enabled(False)  # the context manager of torch.backends sets more, and warns of it
    try:
        assert key(environment=_environment.current("cpu")) != before
    finally:
        torch._C._set_mkldnn_enabled(True)


CPUINFO = (
    "processor : 0\ncpu family : 6\nmodel : {model}\nmodel name : Cloud CPU\nstepping : {stepping}\n\nprocessor : 1\n"
)


def test_processors_of_one_name_are_told_apart_by_model_and_stepping(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "cpuinfo"
    names = []
    for model, stepping, isa in [(106, 6, ""), (143, 6, ""), (143, 8, ""), (143, 8, "AVX2")]:
        info.write_text(CPUINFO.format(model=model, stepping=stepping))
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        with monkeypatch.context() as patch:
            patch.setattr(_environment, "Path", lambda _: info)
            _environment.cpu_model.cache_clear()
            names.append(_environment.cpu_model())
    _environment.cpu_model.cache_clear()
    assert len(set(names)) == 4
    assert all(name.startswith("Cloud CPU") for name in names)


def test_differences_between_environments_name_both_values() -> None:
    other = Environment("cpu", (("cpu", "test cpu"), ("threads", "4"), ("new", "1")))
    assert HERE.differences(other) == "threads 2 -> 4, torch 2.13.0 -> absent, new absent -> 1"
    assert HERE.differences(HERE) == ""


# Form

CHILD = """
from helpers.plans import HERE
from convplan import Policy, Problem
from convplan._key import choice_key, plan_key
problem = Problem.dense("fprop", (2, 6, 9, 11), (4, 3, 3, 5), padding=(1, (0, 1)), stride=(2, 1), groups=2)
policy = Policy(deterministic=False, allow_tf32=False, engines=("aten",), allow_notes=("B", "A"))
print(plan_key(problem, policy, HERE), choice_key(problem, policy))
"""


@pytest.mark.parametrize("seed", ["0", "1", "12345"])
def test_keys_are_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch, seed: str) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", seed)
    policy = POLICY.replace(engines=("aten",), allow_notes=("A", "B"))
    assert run_python(CHILD).split() == [key(policy=policy), choice_key(PROBLEM, policy)]


def test_a_key_is_128_bits_in_hexadecimal() -> None:
    assert re.fullmatch(rf"[0-9a-f]{{{KEY_LENGTH}}}", key())
    assert KEY_LENGTH * 4 == 128


def test_the_schema_number_is_part_of_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(), choice_key(PROBLEM, POLICY)
    monkeypatch.setattr(_key, "KEY_SCHEMA", _key.KEY_SCHEMA + 1)
    assert key() != before[0]
    assert choice_key(PROBLEM, POLICY) != before[1]


text = st.text(alphabet="ab='\x00", max_size=3)
parts = st.lists(st.tuples(text, text), max_size=4)


@given(one=parts, other=parts)
@settings(deadline=None)
def test_no_two_lists_of_parts_run_together(one: list[tuple[str, str]], other: list[tuple[str, str]]) -> None:
    # Labels are fixed names without "=", so a part's text says which label and value it has.
    one, other = ([(label.replace("=", "."), value) for label, value in items] for items in (one, other))
    assert (_key._bytes(one) == _key._bytes(other)) == (one == other)


def test_a_part_cannot_pass_for_two() -> None:
    assert _key._bytes([("a", "b"), ("c", "d")]) != _key._bytes([("a='b'c", "d")])  # their texts run together
    lists = [[("a", "b"), ("c", "d")], [("a", "b'c='d")], [("a", "b"), ("c", "d"), ("", "")], [("ab", ""), ("c", "d")]]
    assert len({_key._bytes(items) for items in lists}) == len(lists)
    environments = [
        Environment("cpu", items) for items in ((("a", "1"), ("b", "2")), (("b", "2"), ("a", "1")), (("a", "12"),))
    ]
    assert len({key(environment=one) for one in environments}) == 3


@pytest.mark.parametrize("open_field", ["deterministic", "allow_tf32"])
def test_an_unresolved_policy_is_our_bug(open_field: str) -> None:
    with pytest.raises(AssertionError, match="convplan bug: a key needs a resolved policy"):
        key(policy=POLICY.replace(**{open_field: None}))
