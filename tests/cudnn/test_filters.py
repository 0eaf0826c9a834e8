"""What may run: the planner's filters, on what cuDNN really proposes for a GPU that is not there.

Up to building, planning needs no GPU. The engine for the absent H200 takes the place of the registered one, and the
workspace limit is always given, for its default is what the allocator of a real GPU can provide.
"""

from __future__ import annotations

import collections
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from helpers.fresh import fresh_process
from helpers.plans import HERE

import convplan
from convplan import ErrataError, Evidence, NoPlan, Notes, PlanRecord, Policy, Problem
from convplan._build import build_candidates
from convplan._candidates import enumerate_candidates
from convplan._filter import filter_candidates
from convplan._memory import cache_emptied, fit_workspace
from convplan._planner import plan_problem
from convplan._policy import Effort
from convplan.engines.base import Candidate
from convplan.engines.cudnn.configs import heuristic_configurations
from convplan.engines.cudnn.engine import COMPILED, CudnnEngine
from convplan.engines.cudnn.graph import operation_graph
from convplan.engines.cudnn.target import Target

NO_LIMIT = 2**40
ANYTHING = Policy(deterministic=False, allow_tf32=True, workspace_limit_bytes=NO_LIMIT, engines=("cudnn",))


@pytest.fixture(autouse=True)
def _registered(cudnn: CudnnEngine) -> Iterator[None]:
    with fresh_process():
        convplan.register_engine(cudnn, replace=True)
        yield


def problem(op: str = "fprop", **changes: Any) -> Problem:
    settings = {"dtype": "float16", "layout": "channels_last", "padding": 1, "device": "cuda", **changes}
    return Problem.dense(op, (8, 64, 28, 28), (64, 64 // settings.get("groups", 1), 3, 3), **settings)


WGRAD32 = problem("wgrad", dtype="float32", layout="contiguous")  # notes and workspaces of all kinds


class Filtered:
    """What enumerating and filtering a problem leaves, and what is dropped with which reason."""

    def __init__(self, asked: Problem, effort: Effort = "measure", **rules: Any) -> None:
        policy = ANYTHING.replace(**rules)
        proposed, refused = enumerate_candidates(asked, policy, effort)
        assert refused == []
        live, self.rejected = filter_candidates(proposed, asked, policy)
        self.proposed = [item.candidate for item in proposed]
        self.live = [item.candidate for item in live]
        assert len(self.live) + len(self.rejected) == len(self.proposed)

    def dropped(self, why: str) -> list[Evidence]:
        """Those dropped for a reason with these words in it."""
        return [evidence for evidence in self.rejected if why in evidence.reason]


def carries(one: Candidate | Evidence, note: str) -> bool:
    return note in one.notes.numerical


def numbers(candidates: Sequence[Candidate]) -> list[int]:
    return [candidate.config.knob("engine") for candidate in candidates]


# ---- notes


@pytest.mark.behaviour("B8")
@pytest.mark.parametrize("effort", ["instant", "measure"])
@pytest.mark.parametrize("asked", [WGRAD32, problem("dgrad"), problem("wgrad", groups=4)], ids=str)
def test_deterministic_drops_what_carries_nondeterministic(asked: Problem, effort: Effort) -> None:
    free, strict = Filtered(asked, effort), Filtered(asked, effort, deterministic=True)
    assert [one for one in free.rejected if carries(one, "NONDETERMINISTIC") and "policy" in one.reason] == []
    assert any(carries(one, "NONDETERMINISTIC") for one in free.proposed), "else this shows nothing"
    assert strict.live == [one for one in free.live if not carries(one, "NONDETERMINISTIC")] != []
    for one in strict.dropped("deterministic"):
        assert one.rejected == "filter"
        assert one.reason == "carries NONDETERMINISTIC and the policy asks for deterministic"


@pytest.mark.behaviour("B10")
@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float32_without_tf32_drops_what_carries_tensor_core(op: str, layout: str) -> None:
    asked = problem(op, dtype="float32", layout=layout)
    free, strict = Filtered(asked), Filtered(asked, allow_tf32=False)
    assert any(carries(one, "TENSOR_CORE") for one in free.live)
    assert strict.live == [one for one in free.live if not carries(one, "TENSOR_CORE")] != []
    assert {one.reason for one in strict.dropped("TF32")} == {"carries TENSOR_CORE and the policy does not allow TF32"}


@pytest.mark.behaviour("B10")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_keep_their_tensor_cores_without_tf32(dtype: str) -> None:
    assert Filtered(problem(dtype=dtype), allow_tf32=False).live == Filtered(problem(dtype=dtype)).live


class DownConverting(CudnnEngine):
    """The real engine; its second candidate says that it rounds its inputs. No engine of cuDNN 9.19 says so here."""

    def configs(self, problem: Problem, effort: Effort) -> list[Candidate]:
        first, second, *rest = super().configs(problem, effort)
        notes = Notes((*second.notes.numerical, "DOWN_CONVERT_INPUTS"), second.notes.behavior)
        return [first, msgspec.structs.replace(second, notes=notes), *rest]


@pytest.mark.behaviour("B9")
@pytest.mark.parametrize("effort", ["instant", "measure"])
def test_what_rounds_its_inputs_is_dropped_unless_named(effort: Effort, target: Target) -> None:
    convplan.register_engine(DownConverting(target), replace=True)
    strict, named = Filtered(problem(), effort), Filtered(problem(), effort, allow_notes=("down_convert_inputs",))
    marked = strict.proposed[1]
    assert carries(marked, "DOWN_CONVERT_INPUTS")
    assert marked not in strict.live
    assert [one.config for one in strict.dropped("DOWN_CONVERT_INPUTS")] == [marked.config]
    assert "allow_notes=('DOWN_CONVERT_INPUTS',) lets it through" in strict.rejected[0].reason
    assert marked in named.live
    assert [one for one in named.live if one != marked] == strict.live


def test_no_engine_here_rounds_its_inputs() -> None:
    """When this fails there is a real candidate to show B9 with: use it."""
    asked = [problem(op, dtype=dtype) for op in ("fprop", "dgrad", "wgrad") for dtype in ("float32", "float16")]
    assert not any(carries(one, "DOWN_CONVERT_INPUTS") for each in asked for one in Filtered(each).proposed)


# ---- errata


Write = Callable[..., Path]


@pytest.fixture
def errata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a user's file of rules and names it in the environment."""

    def write(*rules: dict[str, Any]) -> Path:
        head = {"reason": "it hangs", "source": "https://example.org/1"}
        path = tmp_path / "mine.json"
        named = [{"id": f"mine-{place}", **head, **rule} for place, rule in enumerate(rules)]
        path.write_text(json.dumps({"schema": 1, "rules": named}))
        monkeypatch.setenv("CONVPLAN_ERRATA", str(path))
        return path

    return write


def splits(candidate: Candidate) -> bool:
    return candidate.config.knob("split_k") >= 2


# A rule, and which candidates of `WGRAD32` it is about.
RULES: dict[str, tuple[dict[str, Any], Callable[[Candidate], bool]]] = {
    "engine": ({"engines": [0]}, lambda one: one.config.knob("engine") == 0),
    "engines": ({"engines": [0, 1]}, lambda one: one.config.knob("engine") in (0, 1)),
    "knob": ({"knobs": {"split_k": {"min": 2}}}, splits),
    "note": ({"notes": ["TENSOR_CORE"]}, lambda one: carries(one, "TENSOR_CORE")),
    "engine-and-note": (
        {"engines": [20, 68], "notes": ["NONDETERMINISTIC"]},
        lambda one: one.config.knob("engine") in (20, 68) and carries(one, "NONDETERMINISTIC"),
    ),
    "this-version": ({"cudnn": {"since": "9.19.0", "before": "9.19.1"}}, lambda one: True),
    "older-versions": ({"cudnn": {"before": "9.19"}}, lambda one: False),
    "newer-versions": ({"cudnn": {"since": "9.19.1"}}, lambda one: False),
    "this-gpu": ({"compute_capability": {"min": "9.0", "max": "9.0"}}, lambda one: True),
    "other-gpus": ({"compute_capability": {"min": "9.1"}}, lambda one: False),
    "this-problem": ({"operations": ["wgrad"], "dtypes": ["float32"], "layouts": ["contiguous"]}, lambda one: True),
    "another-operation": ({"operations": ["fprop", "dgrad"], "engines": [0]}, lambda one: False),
    "another-dtype": ({"dtypes": ["float16"]}, lambda one: False),
    "another-layout": ({"layouts": ["channels_last"]}, lambda one: False),
}


@pytest.mark.behaviour("B11")
@pytest.mark.parametrize("effort", ["instant", "measure"])
@pytest.mark.parametrize("name", RULES)
def test_a_users_rule_drops_the_candidates_it_is_about(name: str, effort: Effort, errata: Write) -> None:
    rule, about = RULES[name]
    before = Filtered(WGRAD32, effort)
    wanted = [one for one in before.live if about(one)]
    if effort == "measure":
        assert bool(wanted) is (
            name not in ("older-versions", "newer-versions") and not name.startswith(("other", "an"))
        )
    errata(rule)
    after = Filtered(WGRAD32, effort)
    assert after.live == [one for one in before.live if not about(one)]
    assert [one.config for one in after.dropped("mine-0")] == [one.config for one in wanted]
    assert {one.reason for one in after.dropped("mine-0")} <= {"errata rule mine-0: it hangs"}


@pytest.mark.behaviour("B11")
def test_a_file_that_changes_counts_from_the_next_planning_on(errata: Write) -> None:
    everything = Filtered(WGRAD32).live
    path = errata({"engines": [0]})
    first = Filtered(WGRAD32).live
    assert 0 in numbers(everything)
    assert 0 not in numbers(first)
    errata({"engines": [1], "knobs": {"no_such_knob": 1}})
    assert Filtered(WGRAD32).live == everything
    path.write_text("{")
    with pytest.raises(NoPlan, match=f"{path}: "):
        plan_problem(WGRAD32, ANYTHING, HERE, effort="instant")


@pytest.mark.behaviour("B11")
def test_a_malformed_file_is_named_with_rule_and_field(errata: Write, cudnn: CudnnEngine) -> None:
    path = errata({"engines": [0]}, {"engines": ["all"]})
    with pytest.raises(ErrataError) as caught:
        cudnn.configs(WGRAD32, "measure")
    assert (caught.value.path, caught.value.rule, caught.value.field) == (str(path), "mine-1", "engines[0]")


@pytest.mark.behaviour("B11")
def test_a_shipped_rule_applies_to_what_cudnn_proposes() -> None:
    asked = Problem.dense(
        "fprop", (8, 64, 28, 28), (64, 64, 3, 3), dtype="int8", output_dtype="int32", padding=1, device="cuda"
    )
    found = Filtered(asked)
    dropped = found.dropped("errata rule fprop-int8-to-int32-garbage")
    assert {one.config.knob("engine") for one in dropped} <= {0, 28}
    assert dropped


# ---- workspace


@pytest.mark.behaviour("B12")
@pytest.mark.parametrize(
    "asked", [WGRAD32, problem(), problem("dgrad", dtype="bfloat16", layout="contiguous")], ids=str
)
def test_a_smaller_workspace_limit_leaves_a_subset_in_the_same_order(asked: Problem) -> None:
    sizes = {one.workspace_bytes for one in Filtered(asked).live}
    assert None not in sizes
    limits = sorted({0, *(size for size in sizes if size is not None), *(size - 1 for size in sizes if size)})
    assert len(limits) > 4
    larger = Filtered(asked).live
    for limit in reversed(limits):
        found = Filtered(asked, workspace_limit_bytes=limit)
        assert found.live == [one for one in larger if (one.workspace_bytes or 0) <= limit]
        over = [one.workspace_bytes for one in found.rejected if "over the limit" in one.reason]
        assert all(size is not None and size > limit for size in over)
        assert all(f"is over the limit of {limit} bytes" in one.reason for one in found.dropped("over the limit"))
        larger = found.live


@pytest.mark.behaviour("B12")
def test_what_is_within_the_limit_when_proposed_is_so_when_built() -> None:
    policy = ANYTHING.replace(workspace_limit_bytes=2**20)
    live, _ = filter_candidates(enumerate_candidates(WGRAD32, policy, "measure")[0], WGRAD32, policy)
    made, rejected = build_candidates(live, WGRAD32, policy)
    assert rejected == []
    assert max(map(size, made)) <= 2**20
    assert [*map(size, made)] == [item.candidate.workspace_bytes for item in live]


@pytest.mark.behaviour("B12")
def test_a_workspace_that_only_building_tells_is_judged_then(target: Target) -> None:
    class Silent(CudnnEngine):
        """The real engine, whose heuristics say nothing about workspace."""

        def configs(self, problem: Problem, effort: Effort) -> list[Candidate]:
            return [msgspec.structs.replace(one, workspace_bytes=None) for one in super().configs(problem, effort)]

    limit = 2**20
    told = Filtered(WGRAD32, workspace_limit_bytes=limit).live
    convplan.register_engine(Silent(target), replace=True)
    policy = ANYTHING.replace(workspace_limit_bytes=limit)
    live, _ = filter_candidates(enumerate_candidates(WGRAD32, policy, "measure")[0], WGRAD32, policy)
    assert len(live) > len(told)
    made, rejected = build_candidates(live, WGRAD32, policy)
    assert [item.candidate.config for item in made] == [one.config for one in told]
    assert {one.rejected for one in rejected} == {"build"}
    assert all(f"is over the limit of {limit} bytes" in one.reason for one in rejected)


# ---- memory while measuring


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Lets torch allocate up to so many bytes at once; returns the list of what is asked for from then on."""

    def script(room: int) -> list[int]:
        asked: list[int] = []

        def empty(size: int, *, dtype: torch.dtype, device: torch.device) -> None:
            assert dtype is torch.uint8
            asked.append(size)
            if size > room:
                raise torch.OutOfMemoryError(f"{size} bytes")

        monkeypatch.setattr(torch, "empty", empty)
        return asked

    return script


@pytest.mark.behaviour("B16")
@pytest.mark.parametrize("part", [1, 2, 3, 7, 2**40])
def test_the_largest_workspace_is_tried_first_and_halved_until_it_fits(
    part: int, allocator: Callable[[int], list[int]]
) -> None:
    live = built(WGRAD32)
    largest = max(size(item) for item in live)
    assert largest > 4 * 2**20
    asked = allocator(largest // part)
    dropped = fit_workspace(live, torch.device("cuda"))
    assert asked == [largest >> turn for turn in range(len(asked))]
    got = asked[-1] if asked[-1] <= largest // part else 0
    assert [one.config for one in dropped] == [item.candidate.config for item in live if size(item) > got]
    assert bool(dropped) is (part > 1)
    for one in dropped:
        assert one.rejected == "measure"
        assert f"workspace {one.workspace_bytes} bytes, {got} bytes could be allocated" in one.reason


@pytest.mark.behaviour("B16")
def test_more_than_a_tebibyte_is_out_of_memory_without_trying(allocator: Callable[[int], list[int]]) -> None:
    live = built(WGRAD32)[:2]
    huge = msgspec.structs.replace(live[0].built, workspace_bytes=2**40 + 1)
    live[0].built = huge
    asked = allocator(2**60)
    assert [one.config for one in fit_workspace(live, torch.device("cuda"))] == [live[0].candidate.config]
    assert asked == [2**40]


def built(asked: Problem) -> list[Any]:
    """Every candidate of a problem on its way through planning, built."""
    live, _ = filter_candidates(enumerate_candidates(asked, ANYTHING, "measure")[0], asked, ANYTHING)
    return build_candidates(live, asked, ANYTHING)[0]


def size(item: Any) -> int:
    return int(item.built.workspace_bytes)


@pytest.mark.behaviour("B17")
@pytest.mark.parametrize("setting", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_torchs_cache_is_emptied_around_measuring_where_torchs_setting_asks_for_it(
    setting: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch._C, "_cuda_get_conv_benchmark_empty_cache", lambda: setting, raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    with contextlib.suppress(ZeroDivisionError), cache_emptied(torch.device("cuda")):
        done.append("measured")
        assert not fails or 1 // 0
    assert done == (["emptied", "measured", "emptied"] if setting else ["measured"])
    done.clear()
    with cache_emptied(torch.device("cpu")):
        done.append("measured")
    assert done == ["measured"]


# ---- sources


@pytest.mark.behaviour("B13")
@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize(
    ("effort", "sources"), [("instant", ("mode_a", "fallback")), ("measure", ("mode_a", "mode_b", "fallback"))]
)
def test_sources_come_in_order_and_each_configuration_once(
    op: str, effort: Effort, sources: tuple[str, ...], cudnn: CudnnEngine, target: Target
) -> None:
    found = cudnn.configs(problem(op), effort)
    places = [sources.index(one.source) for one in found]
    assert places == sorted(places)
    assert len({one.config for one in found}) == len(found)
    graph = operation_graph(target, problem(op))
    listed = {source: heuristic_configurations(graph, target, source) for source in sources}
    assert {one.source for one in found} <= set(sources)
    seen: set[tuple[int, frozenset[tuple[str, int]]]] = set()
    for source, configurations in listed.items():
        new = {(one.engine, frozenset(one.knobs)) for one in configurations} - seen
        assert sum(one.source == source for one in found) == len(new)
        seen |= new
    if effort == "measure":
        assert sum(map(len, listed.values())) > len(found), "some are in several lists, else this shows little"


@pytest.mark.behaviour("B13")
def test_every_source_by_its_name_answers(target: Target) -> None:
    graph = operation_graph(target, problem())
    counts = {
        source: len(heuristic_configurations(graph, target, source))
        for source in ("mode_a", "mode_b", "instant", "fallback")
    }
    assert all(counts.values()), counts
    assert counts["instant"] <= counts["mode_a"]


@pytest.mark.behaviour("B13")
@pytest.mark.behaviour("B14")
def test_instant_takes_the_first_that_builds_and_ends_with_the_fallback_list() -> None:
    record = planned(problem("wgrad"))
    sources = [one.source for one in record.ranking]
    assert record.effort == "instant"
    assert record.ranking[0].config == Filtered(problem("wgrad"), "instant").live[0].config
    assert collections.Counter(sources).keys() == {"mode_a", "fallback"}
    assert sources == sorted(sources, key=["mode_a", "fallback"].index)


@pytest.mark.behaviour("B14")
def test_instant_goes_on_where_a_candidate_does_not_build(target: Target) -> None:
    class Stale(CudnnEngine):
        """The real engine, whose first three proposals have a knob that their engines do not know."""

        def configs(self, problem: Problem, effort: Effort) -> list[Candidate]:
            found = super().configs(problem, effort)
            knobs = [dict(one.config.knobs) | {"knob_9999": 1} for one in found[:3]]
            stale = [
                msgspec.structs.replace(one, config=type(one.config).of("cudnn", **more))
                for one, more in zip(found, knobs, strict=False)
            ]
            return [*stale, *found]

    expected = planned(problem()).ranking
    convplan.register_engine(Stale(target), replace=True)
    record = planned(problem())
    assert [one.config for one in record.ranking] == [one.config for one in expected]
    assert [one.rejected for one in record.rejected] == ["build"] * 3
    assert all("cudnnBackendFinalize(ENGINECFG) returned NOT_SUPPORTED" in one.reason for one in record.rejected)


def planned(asked: Problem, **rules: Any) -> PlanRecord:
    return plan_problem(asked, ANYTHING.replace(**rules), HERE, effort="instant")


@pytest.mark.behaviour("B18")
@pytest.mark.behaviour("B19")
def test_when_nothing_is_left_every_candidate_is_listed_with_its_reason(errata: Write) -> None:
    errata({"operations": ["wgrad"]})
    with pytest.raises(NoPlan) as caught:
        planned(WGRAD32, allow_tf32=False)
    reasons = dict(caught.value.rejections)
    assert len(reasons) == len(Filtered(WGRAD32, "instant").proposed)
    assert set(reasons.values()) == {"filter: errata rule mine-0: it hangs"}
    assert str(WGRAD32) in str(caught.value)
    assert "allow_tf32=False" in str(caught.value)


# ---- engines that need what is missing


@pytest.mark.behaviour("B32")
@pytest.mark.parametrize("missing", ["has_nvrtc", "has_runtime_compiled"])
def test_engines_compiled_at_run_time_are_refused_when_what_compiles_them_is_missing(
    missing: str, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = problem("wgrad", groups=64)
    before = Filtered(asked)
    compiled = [one for one in before.live if COMPILED in one.notes.behavior]
    assert compiled
    monkeypatch.setattr(target.library, missing, False)
    after = Filtered(asked)
    assert after.live == [one for one in before.live if one not in compiled] != []
    refused = after.dropped("it is compiled at run time, and what that needs is missing")
    assert [one.config for one in refused] == [one.config for one in compiled]
    assert all("`convplan doctor`" in one.reason for one in refused)


@pytest.mark.behaviour("B32")
def test_a_problem_that_only_such_engines_run_says_so(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target.library, "has_nvrtc", False)
    with pytest.raises(NoPlan, match="it is compiled at run time, and what that needs is missing"):
        planned(problem(dtype="float8_e4m3fn", output_dtype="bfloat16"))
