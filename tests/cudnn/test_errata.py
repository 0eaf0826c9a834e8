"""Errata: what each condition of a rule means, the shipped rules, users' files, and what a malformed file is told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from helpers.fresh import fresh_process
from helpers.plans import HERE

import convplan
from convplan import ErrataError, NoPlan, Policy, Problem
from convplan._planner import plan_problem
from convplan._policy import Effort
from convplan.engines.base import Candidate
from convplan.engines.cudnn import errata
from convplan.engines.cudnn.errata import (
    SCHEMA_PATH,
    SHIPPED_PATH,
    Errata,
    ErrataRule,
    GraphKind,
    errata_file_schema,
    parse_errata,
    read_errata,
    version_number,
)
from convplan.engines.fake import FakeCandidate, FakeEngine, VirtualClock

pytestmark = pytest.mark.behaviour("B11")

ROOT = Path(__file__).parents[2]
HEAD = {"id": "mine", "reason": "it crashes", "source": "https://example.org/1"}
PROBLEM = Problem.dense("fprop", (2, 8, 16, 16), (12, 4, 3, 3), dtype="float16", layout="channels_last", groups=2)
KNOBS = {"tile_size": 3, "split_k": 2}


def rule(**conditions: Any) -> ErrataRule:
    return msgspec.convert({**HEAD, **conditions}, ErrataRule)


def content(*rules: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"schema": 1, "rules": rules, **fields}).encode()


def ask(
    rules: Errata | ErrataRule,
    problem: Problem = PROBLEM,
    engine: int = 5,
    knobs: dict[str, int] = KNOBS,
    cudnn: int = 91900,
    gpu: str = "9.0",
    notes: tuple[str, ...] = (),
    graph: GraphKind = "convolution",
) -> str:
    asked = Errata([rules]) if isinstance(rules, ErrataRule) else rules
    return asked.verdict(problem, engine, knobs, cudnn_version=cudnn, compute_capability=gpu, notes=notes, graph=graph)


# ---- conditions: a value that the question above meets, and one that it does not

CONDITIONS = [
    ("operations", ["fprop", "wgrad"], ["dgrad", "wgrad"]),
    ("graphs", ["convolution"], ["specialised", "general", "statistics"]),
    ("engines", [1, 5], [1, 50]),
    ("knobs", {"split_k": 2}, {"split_k": 3}),
    ("knobs", {"split_k": 2, "tile_size": 3}, {"split_k": 2, "tile_size": 4}),
    ("knobs", {"tile_size": 3}, {"stages": 0}),
    ("knobs", {"tile_size": {"min": 3}, "split_k": {"min": 1, "max": 2}}, {"split_k": {"min": 3}}),
    ("knobs", {"tile_size": {"max": 3}}, {"stages": {"min": 0}}),
    ("notes", ["TENSOR_CORE"], ["TENSOR_CORE", "WINOGRAD"]),
    ("cudnn", {"since": "9.19.0"}, {"since": "9.19.1"}),
    ("cudnn", {"before": "9.19.1"}, {"before": "9.19"}),
    ("cudnn", {"since": "9.2", "before": "9.20"}, {"since": "9.20.0", "before": "10.0"}),
    ("compute_capability", {"min": "8.9", "max": "9.0"}, {"min": "10.0", "max": "12.0"}),
    ("compute_capability", {"max": "12.0"}, {"max": "8.9"}),
    ("dtypes", ["float16"], ["bfloat16", "float32"]),
    ("output_dtypes", ["float16"], ["float32"]),
    ("layouts", ["channels_last"], ["contiguous", "strided"]),
    ("spatial_rank", {"min": 2, "max": 2}, {"min": 3}),
    ("groups", {"min": 2}, {"max": 1}),
    ("channels", {"min": 8, "max": 8}, {"min": 9}),
    ("filters", {"min": 12, "max": 12}, {"max": 8}),
    ("depthwise", False, True),
    ("uneven_padding", False, True),
    ("filter_taps", {"min": 9}, {"max": 1}),
    ("elements", {"min": 4704, "max": 4704}, {"min": 4705}),
]


@pytest.mark.parametrize(("name", "met", "missed"), CONDITIONS, ids=lambda value: json.dumps(value))
def test_each_condition_drops_what_meets_it_and_nothing_else(name: str, met: Any, missed: Any) -> None:
    assert ask(rule(**{name: met}), notes=("TENSOR_CORE",)) == "errata rule mine: it crashes"
    assert ask(rule(**{name: missed}), notes=("TENSOR_CORE",)) == ""


def test_there_is_a_row_for_every_condition() -> None:
    fields = set(ErrataRule.__struct_fields__) - set(HEAD)
    assert {name for name, _, _ in CONDITIONS} == fields == set(errata._CONDITIONS)


@pytest.mark.parametrize(
    ("conditions", "dropped"),
    [
        ({"operations": ["fprop"]}, ["convolution", "specialised", "general", "statistics"]),
        ({"engines": [5]}, ["convolution"]),
        ({"engines": [5], "graphs": ["general"]}, ["general"]),
        ({"engines": [5], "graphs": ["statistics"]}, ["statistics"]),
        ({"graphs": ["specialised", "general"]}, ["specialised", "general"]),
    ],
    ids=["no-engine", "an-engine", "an-engine-of-one-kind", "an-engine-with-statistics", "kinds"],
)
def test_engines_are_counted_anew_for_each_kind_of_graph(conditions: dict[str, Any], dropped: list[str]) -> None:
    kinds: tuple[GraphKind, ...] = ("convolution", "specialised", "general", "statistics")
    assert [kind for kind in kinds if ask(rule(**conditions), graph=kind)] == dropped


def test_a_rule_drops_only_what_meets_all_its_conditions() -> None:
    both = rule(operations=["fprop"], engines=[5])
    assert ask(both)
    assert not ask(both, engine=6)
    assert not ask(both, problem=msgspec.structs.replace(PROBLEM, op="dgrad"))


def test_a_condition_on_dtype_and_layout_is_about_the_first_tensor_read() -> None:
    mixed = msgspec.structs.replace(PROBLEM, op="dgrad", x=convplan.TensorSpec.dense(PROBLEM.x.dims, "float16"))
    assert ask(rule(layouts=["channels_last"]), problem=mixed), "y is read, x is written"


def test_one_spatial_dimension_counts_as_two() -> None:
    line = Problem.dense("fprop", (2, 8, 16), (8, 8, 3))
    assert ask(rule(spatial_rank={"min": 2, "max": 2}), problem=line)


def test_a_single_channel_is_not_depthwise() -> None:
    assert not ask(rule(depthwise=True), problem=Problem.dense("fprop", (2, 1, 8, 8), (4, 1, 3, 3)))
    assert ask(rule(depthwise=True), problem=Problem.dense("fprop", (2, 4, 8, 8), (8, 1, 3, 3), groups=4))


@pytest.mark.parametrize(
    ("text", "number"), [("9.23.1", 92301), ("9.15", 91500), ("9.1.0", 90100), ("10.2.3", 100203), ("8.9.7", 8907)]
)
def test_versions_are_written_as_people_do_and_compared_as_cudnn_counts(text: str, number: int) -> None:
    assert version_number(text) == number


def test_the_first_rule_that_applies_gives_the_reason() -> None:
    rules = Errata([rule(id="a", engines=[1]), rule(id="b", engines=[5]), rule(id="c", engines=[5])])
    assert ask(rules).startswith("errata rule b: ")


def test_a_compute_capability_that_is_none_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"compute capability is 'sm_90', expected major.minor"):
        ask(rule(engines=[5]), gpu="sm_90")


# ---- the shipped rules

HALF_3D = Problem.dense("fprop", (1, 16, 4, 8, 8), (16, 16, 1, 3, 3), dtype="bfloat16")
SINGLE_3D = Problem.dense("wgrad", (1, 16, 4, 8, 8), (16, 16, 3, 3, 3))
HUGE = Problem.dense("fprop", (1, 2, 32800, 32801), (2, 2, 1, 1), dtype="float16")
HUGE_DEPTHWISE = Problem.dense("fprop", (1, 2, 32800, 32801), (2, 1, 1, 1), dtype="float16", groups=2)
TF32, REDUCED = ("TENSOR_CORE",), ("REDUCED_PRECISION_REDUCTION",)
HALF_DGRAD = Problem.dense("dgrad", (2, 8, 6, 6), (8, 8, 3, 3), dtype="float16")
HALF_WGRAD = Problem.dense("wgrad", (2, 8, 6, 6), (8, 8, 3, 3), dtype="float16")
INT8 = Problem.dense("fprop", (2, 32, 6, 6), (32, 32, 3, 3), dtype="int8")
UNEVEN = Problem.dense("wgrad", (2, 8, 6, 6), (8, 8, 3, 3), dtype="bfloat16", padding=((1, 2), (1, 1)))

CASES = [  # rule, what it drops, and each way out of it
    (
        "fprop-engine-5-varies-on-sm86",
        {"gpu": "8.6", "cudnn": 92301},
        [{"gpu": "8.9"}, {"cudnn": 92400}, {"engine": 4}],
    ),
    (
        "3d-16-bit-wrong-results",
        {"problem": HALF_3D, "cudnn": 91002},
        [
            {"cudnn": 90701},
            {"cudnn": 91500},
            {"problem": PROBLEM},
            {"problem": SINGLE_3D},
            {"problem": Problem.dense("fprop", (1, 16, 4, 8, 8), (16, 16, 1, 1, 1), dtype="bfloat16")},
        ],
    ),
    (
        "3d-tf32-broken-kernel",
        {"problem": SINGLE_3D, "notes": TF32, "cudnn": 91501},
        [{"notes": ()}, {"cudnn": 91001}, {"cudnn": 91600}],
    ),
    ("64-bit-indexing-unsupported", {"problem": HUGE, "cudnn": 90201}, [{"cudnn": 90300}, {"problem": PROBLEM}]),
    (
        "64-bit-depthwise-broken",
        {"problem": HUGE_DEPTHWISE, "cudnn": 91300},
        [{"cudnn": 91002}, {"cudnn": 91500}, {"problem": HUGE}],
    ),
    # seen by tests/gpu/test_every_plan.py
    (
        "dgrad-engine-25-sums-in-16-bits",
        {"problem": HALF_DGRAD, "engine": 25, "notes": REDUCED},
        [{"notes": ()}, {"engine": 26}, {"problem": PROBLEM}, {"cudnn": 92000}, {"gpu": "8.0"}],
    ),
    (
        "wgrad-engine-20-sums-in-16-bits",
        {"problem": HALF_WGRAD, "engine": 20, "notes": REDUCED},
        [{"notes": ()}, {"engine": 21}, {"problem": HALF_DGRAD}, {"cudnn": 92000}],
    ),
    (
        "wgrad-engine-47-split-sums-in-16-bits",
        {"problem": HALF_WGRAD, "engine": 47, "knobs": {"split_k": 2}},
        [{"knobs": {"split_k": 1}}, {"knobs": {}}, {"engine": 46}, {"cudnn": 92000}],
    ),
    (
        "dgrad-engine-2-sums-in-16-bits",
        {"problem": HALF_DGRAD, "engine": 2},
        [{"engine": 3}, {"problem": HALF_WGRAD}, {"cudnn": 92000}],
    ),
    (
        "fprop-int8-to-int32-garbage",
        {"problem": INT8.with_output_dtype("int32"), "engine": 28},
        [{"problem": INT8}, {"engine": 27}, {"cudnn": 92000}],
    ),
    (
        "wgrad-engine-1-uneven-padding",
        {"problem": UNEVEN, "engine": 1},
        [{"problem": HALF_WGRAD}, {"engine": 2}, {"cudnn": 92000}],
    ),
]


@pytest.mark.parametrize(("name", "dropped", "ways_out"), CASES, ids=[name for name, _, _ in CASES])
def test_a_shipped_rule_drops_what_its_source_describes(
    name: str, dropped: dict[str, Any], ways_out: list[dict[str, Any]]
) -> None:
    assert ask(Errata.load(), **dropped).startswith(f"errata rule {name}: ")
    for way_out in ways_out:
        assert ask(Errata.load(), **dropped | way_out) == "", way_out


def test_every_shipped_rule_has_a_case_and_a_source() -> None:
    rules = read_errata(SHIPPED_PATH)
    assert [rule.id for rule in rules] == [name for name, _, _ in CASES]
    for one in rules:
        public, own = one.source.startswith("https://github.com/"), (ROOT / one.source).is_file()
        assert public or own, f"{one.id}: {one.source} is neither a public thread nor a file here"
        assert one.cudnn is not None, f"{one.id} holds for all versions, so nobody would ever take it out again"


def test_the_version_that_tests_run_with_meets_no_rule_but_those_seen_with_it() -> None:
    for problem in (PROBLEM, HALF_3D, SINGLE_3D, HUGE, HUGE_DEPTHWISE):
        for engine in range(100):
            assert ask(Errata.load(), problem=problem, engine=engine, notes=TF32) == ""


# ---- users' files


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's file with one rule, named in the environment."""
    path = tmp_path / "mine.json"
    path.write_bytes(content({**HEAD, "engines": [5]}))
    monkeypatch.setenv("CONVPLAN_ERRATA", str(path))
    return path


def test_a_users_rules_come_after_the_shipped_ones(users: Path) -> None:
    assert [one.id for one in Errata.load().rules] == [*(name for name, _, _ in CASES), "mine"]
    assert ask(Errata.load()) == "errata rule mine: it crashes"


def test_without_the_variable_only_the_shipped_rules_hold(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVPLAN_ERRATA")
    assert ask(Errata.load()) == ""


def test_several_files_are_separated_as_in_path(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = users.with_name("other.json")
    other.write_bytes(content({**HEAD, "id": "theirs", "engines": [6]}))
    monkeypatch.setenv("CONVPLAN_ERRATA", os.pathsep.join([str(users), "", str(other)]))
    assert ask(Errata.load(), engine=5).startswith("errata rule mine: ")
    assert ask(Errata.load(), engine=6).startswith("errata rule theirs: ")


def test_a_file_is_read_once_and_again_when_it_changes(users: Path) -> None:
    first = Errata.load()
    assert Errata.load() is first
    users.write_bytes(content({**HEAD, "engines": [55]}))
    assert ask(Errata.load(), engine=55)
    assert not ask(Errata.load(), engine=5)


def test_an_id_that_two_files_use_is_an_error_that_names_both(users: Path) -> None:
    users.write_bytes(content({**HEAD, "id": "64-bit-depthwise-broken", "engines": [5]}))
    with pytest.raises(ErrataError, match=r"field id: found an id that .*errata\.json has as well") as caught:
        Errata.load()
    assert (caught.value.path, caught.value.rule) == (str(users), "64-bit-depthwise-broken")


def test_a_file_that_is_missing_or_none_is_an_error(users: Path, tmp_path: Path) -> None:
    users.unlink()
    with pytest.raises(ErrataError, match=r"mine\.json: cannot be read: No such file"):
        Errata.load()
    users.mkdir()
    with pytest.raises(ErrataError, match=r"mine\.json: is no file, expected .*CONVPLAN_ERRATA"):
        Errata.load()


# ---- what a malformed file is told: file, rule, field, found, expected

MALFORMED = [
    ({"engines": ["5"]}, "mine", "engines[0]", 'found "5", expected int'),
    ({"engines": [-1]}, "mine", "engines[0]", "found -1, expected int >= 0"),
    ({"engines": 5}, "mine", "engines", "found 5, expected array"),
    ({"operations": ["conv"]}, "mine", "operations[0]", 'found "conv", expected one of fprop, dgrad, wgrad'),
    ({"layouts": ["nhwc"]}, "mine", "layouts[0]", 'found "nhwc", expected one of contiguous, channels_last, strided'),
    ({"dtypes": ["half"]}, "mine", "dtypes", 'found ["half"], expected some of float64, float32'),
    ({"knobs": {"tile_size": 1.5}}, "mine", "knobs", 'found {"tile_size":1.5}, expected int'),
    ({"knobs": {"CUDNN_KNOB": 1}}, "mine", "knobs", "for a name in it"),
    ({"cudnn": {"since": "9"}}, "mine", "cudnn.since", 'found "9", expected str matching regex'),
    ({"cudnn": {"since": 90800}}, "mine", "cudnn.since", "found 90800, expected str"),
    ({"cudnn": {"since": "9.9", "before": "9.9.0"}}, "mine", "cudnn", "found since 9.9 and before 9.9.0, a range"),
    ({"cudnn": {}}, "mine", "cudnn", "found no end, expected since or before"),
    ({"cudnn": {"until": "9.9"}}, "mine", "cudnn.until", "found an unknown field, expected one of since, before"),
    (
        {"compute_capability": {"min": "sm_90"}},
        "mine",
        "compute_capability.min",
        'found "sm_90", expected str matching',
    ),
    ({"compute_capability": {"min": "12.0", "max": "9.0"}}, "mine", "compute_capability", "found min 12.0 and max 9.0"),
    ({"groups": {"min": 3, "max": 2}}, "mine", "groups", "found min 3 and max 2, a range that nothing is in"),
    ({"groups": 1}, "mine", "groups", "found 1, expected object"),
    ({"depthwise": "yes"}, "mine", "depthwise", 'found "yes", expected bool'),
    (
        {"engine": 5},
        "mine",
        "engine",
        "found an unknown field, expected one of id, reason, source, operations, engines",
    ),
    ({"engines": [5], "source": "a friend"}, "mine", "source", 'found "a friend", expected str matching regex'),
    ({"engines": [5], "reason": ""}, "mine", "reason", 'found "", expected str of length >= 1'),
    ({"engines": [5], "reason": None}, "mine", "reason", "found null, expected str"),
    ({"engines": [5], "id": "Mine !"}, "Mine !", "id", 'found "Mine !", expected str matching regex'),
    ({"engines": [5], "id": None}, "rules[1]", "id", "found null, expected str"),
    ({"engines": list(range(1000))}, "mine", "engines", "expected array of length <= 256"),
    ({}, "mine", "", "found no condition, expected at least one of operations, engines"),
]


@pytest.mark.parametrize(("changes", "name", "field", "said"), MALFORMED, ids=lambda value: json.dumps(value)[:40])
def test_a_malformed_rule_is_named_with_its_file_and_field(
    changes: dict[str, Any], name: str, field: str, said: str
) -> None:
    good = {**HEAD, "id": "good", "engines": [1]}
    with pytest.raises(ErrataError) as caught:
        parse_errata(content(good, {**HEAD, **changes}), source="their.json")
    error = caught.value
    assert (error.path, error.rule, error.field) == ("their.json", name, field)
    assert said in error.reason
    assert str(error).startswith(f"their.json: rule {name}")


@pytest.mark.parametrize("missing", list(HEAD))
def test_a_rule_must_say_its_id_reason_and_source(missing: str) -> None:
    one = {key: value for key, value in {**HEAD, "engines": [5]}.items() if key != missing}
    with pytest.raises(ErrataError, match=f"field {missing}: found nothing, expected it") as caught:
        parse_errata(content(one))
    assert caught.value.rule == ("rules[0]" if missing == "id" else "mine")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "malformed JSON"),
        (b"\xff\xfe", "malformed JSON"),
        (b"[" * 100_000, "found something else, expected object"),
        (b"[]", "expected object"),
        (b"{}", "found nothing, expected it"),
        (content(schema=2), "field schema: found 2, expected 1: written for another version"),
        (content(rule=[]), "field rule: found an unknown field, expected one of schema, rules, comment"),
        (json.dumps({"schema": 1, "rules": {}}).encode(), "field rules: found {}, expected array"),
        (content(comment="x" * 2**20), "found more than 1048576 bytes"),
        (b'{"schema": 1, "rules": [' + b"{}," * 10_000 + b"{}]}", "expected array of length <= 10000"),
        (b'{"schema": 1, "rules": [7]}', "rule rules[0]: found 7, expected object"),
        (b'{"schema": 1, "rules": [' + b"[" * 5_000 + b"]" * 5_000 + b"]}", "errata: "),
    ],
    ids=["cut", "bytes", "deep", "array", "empty", "schema", "field", "rules", "large", "many", "number", "nested"],
)
def test_what_is_no_file_of_errata_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ErrataError) as caught:
        parse_errata(data)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_is_data_and_nothing_in_it_is_evaluated() -> None:
    hostile = {**HEAD, "reason": "{problem.__class__} %s __import__('os')", "engines": [5]}
    (one,) = parse_errata(content(hostile))
    assert ask(one) == f"errata rule mine: {hostile['reason']}"


# ---- the published schema


def test_the_published_schema_is_current() -> None:
    assert SCHEMA_PATH.read_text(encoding="utf-8") == errata_file_schema(), "run scripts/write_errata_schema.py"


def test_the_published_schema_accepts_and_refuses_what_reading_does() -> None:
    check = jsonschema.Draft202012Validator(json.loads(errata_file_schema()))
    assert list(check.iter_errors(json.loads(SHIPPED_PATH.read_bytes()))) == []
    for name, met, missed in CONDITIONS:
        for value in (met, missed):
            assert list(check.iter_errors(json.loads(content({**HEAD, name: value})))) == []
    own = {
        "dtypes",
        "cudnn",
        "compute_capability",
        "groups",
    }  # what relates fields to each other is no schema's business
    for changes, _, field, _ in MALFORMED:
        if changes and field not in ("", *own):
            assert list(check.iter_errors(json.loads(content({**HEAD, **changes})))) != [], changes


# ---- the filter


class Refusing(FakeEngine):
    """A scripted engine that refuses its candidates, in the words given."""

    reasons: tuple[str, ...] = ()

    def configs(self, problem: Problem, effort: Effort) -> list[Candidate]:
        proposed = super().configs(problem, effort)
        return [msgspec.structs.replace(one, refused=why) for one, why in zip(proposed, self.reasons, strict=True)]


def plan(reasons: tuple[str, ...], effort: Effort, **rules: Any) -> convplan.PlanRecord:
    clock = VirtualClock()
    with fresh_process():
        engine = Refusing([FakeCandidate(time_us=50.0 + 30 * place) for place in range(len(reasons))], clock=clock)
        engine.reasons = reasons
        convplan.register_engine(engine, replace=True)
        policy = Policy(deterministic=False, allow_tf32=False, engines=("fake",), **rules)
        problem = Problem.dense("fprop", (1, 2, 5, 5), (2, 2, 3, 3))
        try:
            return plan_problem(problem, policy, HERE, effort=effort, clock=clock)
        finally:
            assert [count for count, why in zip(engine.builds, reasons, strict=True) if why and count] == []


@pytest.mark.parametrize("effort", ["measure", "instant"])
def test_what_the_engine_refuses_is_dropped_unbuilt_with_its_reason(effort: Effort) -> None:
    record = plan((ask(rule(engines=[5])), "", "errata rule other: hangs"), effort)
    assert [one.config.knob("index") for one in record.ranking] == [1]
    assert [(one.config.knob("index"), one.rejected, one.reason) for one in record.rejected] == [
        (0, "filter", "errata rule mine: it crashes"),
        (2, "filter", "errata rule other: hangs"),
    ]


def test_a_problem_whose_every_candidate_is_refused_says_so() -> None:
    with pytest.raises(NoPlan) as caught:
        plan(("errata rule a: crashes",), "measure")
    assert caught.value.rejections == (("fake[index=0]", "filter: errata rule a: crashes"),)
