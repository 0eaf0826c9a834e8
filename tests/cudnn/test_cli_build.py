"""`convplan build`: the real cuDNN builds plans for a GPU that a file describes, and a program there finds them.

The GPU itself is the only thing that is made up: the engine is the real one for the described GPU, and the environment
is what torch would say on that machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

import convplan
from convplan import Policy, Problem, ReplayMiss, _deciding, _environment, _runtime
from convplan._ahead import LEADING, AheadBuilder, AheadPlan, build_ahead, write_ahead
from convplan._choices import known
from convplan._environment import Environment
from convplan._errors import NoPlan
from convplan._plan import PlanRecord
from convplan._planner import Planned
from convplan._problem import OPS
from convplan._problem_files import parse_problems
from convplan._store import PlanStore
from convplan.cli import main
from convplan.engines import registry
from convplan.engines.cudnn.device import Device
from convplan.engines.cudnn.engine import CudnnEngine

H200 = Path(__file__).with_name("h200-cudnn-9.19.0.deviceprop.json")
ENTRY: dict[str, Any] = {
    "name": "layer", "op": "fprop", "n": 8, "c": 64, "k": 64, "spatial": [28, 28], "filter": [3, 3], "padding": [1, 1],
    "stride": [1, 1], "dilation": [1, 1], "groups": 1, "dtype": "float16", "layout": "channels_last", "device": "cuda",
}  # fmt: skip
NO_ENGINE = {"name": "narrow", "op": "dgrad", "dtype": "float8_e4m3fn"}  # cuDNN 9.19 has none on an H200
INSTANT = Policy(effort="instant")

pytestmark = pytest.mark.usefixtures("library")


def on_gpu(**change: Any) -> Problem:
    """The problem of an entry, as a program would meet it on a GPU."""
    data = json.dumps({"problems": [{**ENTRY, **change, "device": "cuda"}]}).encode()
    return parse_problems(data)[0].problem


class Ran(NamedTuple):
    """What one run of the command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def call(*argv: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def build(run: Callable[..., Ran], tmp_path: Path) -> Callable[..., Ran]:
    """Runs the command on entries that differ from `ENTRY` as said."""

    def call(*changes: dict[str, Any], options: tuple[object, ...] = ("--json",), device: Path = H200) -> Ran:
        file = tmp_path / "problems.json"
        file.write_text(json.dumps({"problems": [{**ENTRY, **change} for change in changes]}))
        return run("build", "--problems", file, "--device", device, "--out", tmp_path / "plans.json", *options)

    return call


# ---- building


@pytest.mark.behaviour("C7")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("op", OPS)
def test_the_heuristics_first_choices_are_built(op: str, dtype: str, build: Callable[..., Ran], h200: Device) -> None:
    ran = build({"op": op, "dtype": dtype})
    assert ran.code == 0, ran.err
    (answer,) = ran.json["problems"]
    builder = AheadBuilder(h200)
    problem, policy = on_gpu(op=op, dtype=dtype), Policy(allow_tf32=dtype != "float32")
    allowed = [
        str(one.config)
        for one in builder.engine.configs(problem, "instant")
        if not one.refused
        and one.source != "fallback"
        and "DOWN_CONVERT_INPUTS" not in one.notes.numerical
        and (policy.allow_tf32 or "TENSOR_CORE" not in one.notes.numerical)
    ]
    wanted = allowed[:LEADING]
    assert [plan["config"] for plan in answer["plans"]][: len(wanted)] == wanted
    assert len(answer["plans"]) == LEADING
    assert all(plan["serialized_bytes"] > 1000 for plan in answer["plans"])
    assert (answer["name"], answer["problem"], answer["error"]) == ("layer", str(problem), "")


@pytest.mark.behaviour("C7")
@pytest.mark.behaviour("C1")
def test_what_was_built_ahead_is_restored_and_equals_what_is_built(cudnn: CudnnEngine, h200: Device) -> None:
    problems = [on_gpu(op=op, dtype=dtype) for op in OPS for dtype in ("float16", "float32")]
    for plan in build_ahead(problems, Policy(), h200):
        record = plan.record
        assert [evidence.config for evidence in record.ranking[:LEADING]] == [*plan.serialized]
        for config, serialized in plan.serialized.items():
            restored = cudnn.restore(record.problem, config, record.policy, serialized)
            built = cudnn.build(record.problem, config, record.policy)
            assert restored.serialize is not None
            assert built.serialize is not None
            assert restored.serialize() == serialized == built.serialize()
            assert restored.workspace_bytes == built.workspace_bytes


def test_a_record_says_what_was_not_done(h200: Device) -> None:
    (plan,) = build_ahead([on_gpu()], Policy(), h200, leading=2)
    record = plan.record
    assert (record.effort, record.environment.is_ahead, len(plan.serialized)) == ("instant", True, 2)
    assert all(evidence.median_us is None and evidence.verified == "no" for evidence in record.ranking)
    assert len(record.ranking) > 2, "the others stand behind, unbuilt"
    assert record.policy.workspace_limit_bytes is None, "as a program's that gives no limit"


@pytest.mark.parametrize("leading", [1, 5])
def test_leading_says_how_many_are_built(leading: int, build: Callable[..., Ran]) -> None:
    (answer,) = build({}, options=("--json", "--leading", leading)).json["problems"]
    assert len(answer["plans"]) == leading


@pytest.mark.behaviour("B12")
def test_the_workspace_limit_is_kept_and_part_of_the_key(build: Callable[..., Ran]) -> None:
    change = {"op": "wgrad", "dtype": "float32", "layout": "contiguous"}
    free = build(change, options=("--json", "--leading", 20)).json["problems"][0]
    none = build(change, options=("--json", "--leading", 20, "--workspace-limit", "0")).json["problems"][0]
    assert any(plan["workspace_bytes"] for plan in free["plans"])
    assert not any(plan["workspace_bytes"] for plan in none["plans"])
    assert free["key"] != none["key"]


@pytest.mark.behaviour("B8")
def test_deterministic_plans_are_asked_for_with_an_option(build: Callable[..., Ran], tmp_path: Path) -> None:
    ran = build({"op": "wgrad", "dtype": "float32"}, options=("--json", "--deterministic", "--leading", 20))
    assert ran.code == 0
    (record,) = records_of(tmp_path / "plans.json")
    assert record.policy.deterministic
    assert all(evidence.notes.deterministic for evidence in record.ranking)
    assert any("NONDETERMINISTIC" in evidence.reason for evidence in record.rejected)


def records_of(file: Path) -> list[PlanRecord]:
    found = json.loads(file.read_bytes())["plans"]
    return [msgspec.convert(one.get("record", one), PlanRecord) for one in found]


@pytest.mark.behaviour("B11")
def test_errata_hold_for_what_is_built_ahead(
    build: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, *_) = build({}).json["problems"][0]["plans"]
    engine = int(first["config"].partition("engine=")[2].split(",")[0].rstrip("]"))
    rule = {"id": "mine", "reason": "it hangs", "source": "https://example.org/1", "engines": [engine]}
    (tmp_path / "errata.json").write_text(json.dumps({"schema": 1, "rules": [rule]}))
    monkeypatch.setenv("CONVPLAN_ERRATA", str(tmp_path / "errata.json"))
    ran = build({})
    assert ran.code == 0, ran.err
    assert all(f"engine={engine}," not in plan["config"] + "," for plan in ran.json["problems"][0]["plans"])


# ---- what goes wrong


def test_a_malformed_file_of_errata_is_one_error(
    build: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "errata.json").write_text('{"schema": 1, "rules": 7}')
    monkeypatch.setenv("CONVPLAN_ERRATA", str(tmp_path / "errata.json"))
    ran = build({}, {"name": "other"})
    assert (ran.code, ran.json["error"]["type"]) == (1, "ErrataError")


def test_a_problem_without_a_plan_costs_only_itself(build: Callable[..., Ran], tmp_path: Path) -> None:
    ran = build({"name": "one"}, NO_ENGINE, {"name": "two", "op": "wgrad"})
    assert ran.code == 1
    assert (ran.json["total"], ran.json["built"], ran.json["failed"]) == (3, 2, 1)
    assert "it proposes no configuration" in ran.json["problems"][1]["error"]
    assert len(records_of(tmp_path / "plans.json")) == 2
    text = build({"name": "one"}, NO_ENGINE, options=()).out
    assert "narrow: no engine runs this problem" in text
    assert "2 problems: 1 have plans, 1 do not" in text


def test_where_nothing_has_a_plan_nothing_is_written(build: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "plans.json").write_text("older")
    ran = build(NO_ENGINE, {"name": "empty", "n": 0})
    assert (ran.code, ran.json["path"], ran.json["bytes"]) == (1, "", 0)
    assert "the problem is empty" in ran.json["problems"][1]["error"]
    assert (tmp_path / "plans.json").read_text() == "older"
    assert "nothing was written" in build(NO_ENGINE, options=()).out


def test_problems_for_a_processor_are_built_for_the_gpu_and_it_says_so(
    build: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = build({"device": "cpu"}, {"name": "other"})
    assert (ran.code, ran.json["for_another_device"]) == (0, 1)
    assert {record.problem.device for record in records_of(tmp_path / "plans.json")} == {"cuda"}
    assert "1 of them name another device" in build({"device": "cpu"}, options=()).out


def test_a_file_that_cannot_be_written_is_found_out_first(
    run: Callable[..., Ran], build: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build({}).code == 0  # writes the problems
    monkeypatch.setattr(AheadBuilder, "build", lambda *_, **__: pytest.fail("built before the file was tried"))
    problems = tmp_path / "problems.json"
    for out, words in ((tmp_path / "no" / "plans.json", "cannot be written"), (tmp_path, "is a directory")):
        ran = run("build", "--problems", problems, "--device", H200, "--out", out, "--json")
        assert (ran.code, ran.json["error"]["type"]) == (1, "StoreError")
        assert words in ran.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "deviceName is"),
        (b"no", "not JSON"),
        (json.dumps({"deviceName": "NVIDIA H200", "deviceVer": 900, "cudnnVersion": 92800}).encode(), "cuDNN 9.28.0"),
    ],
    ids=["empty", "no-json", "another-cudnn"],
)
def test_properties_that_are_none_or_of_another_cudnn_are_an_error(
    content: bytes, words: str, build: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "gpu.json").write_bytes(content)
    ran = build({}, device=tmp_path / "gpu.json")
    assert (ran.code, ran.json["error"]["type"]) == (1, "SpecError")
    assert words in ran.err


def test_wrong_usage(run: Callable[..., Ran], build: Callable[..., Ran], tmp_path: Path) -> None:
    assert build({}, device=tmp_path / "missing.json").code == 2
    assert build({}, options=("--leading", 0)).code == 2
    assert run("build", "--problems", tmp_path / "problems.json", "--device", H200).code == 2


def test_one_problem_without_a_plan_is_an_error_of_the_function(h200: Device) -> None:
    with pytest.raises(NoPlan, match="it proposes no configuration"):
        build_ahead([on_gpu(**NO_ENGINE)], Policy(), h200)


# ---- on the GPU's machine


def gpu_environment(**changes: str) -> Environment:
    """What torch would say where the GPU is."""
    items = {
        "gpu": "NVIDIA H200",
        "capability": "9.0",
        "multiprocessors": "132",
        "torch": "2.11.0+cu130",
        "cuda": "13.0",
        "cudnn": "91900",
        "matmul_precision": "highest",
        **changes,
    }
    return Environment("cuda", tuple(items.items()))


@pytest.fixture
def there(cudnn: CudnnEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Be on the GPU's machine from here on; another one with `gpu=` or `cudnn=`."""
    original = registry.get("cudnn")
    real = _environment.current

    def go(**changes: str) -> None:
        found = gpu_environment(**changes)
        monkeypatch.setattr(
            _environment, "current", lambda device, index=None: found if device == "cuda" else real(device)
        )
        registry.register(cudnn, replace=True)
        _runtime.forget()
        convplan.stats(reset=True)

    yield go
    registry.register(original, replace=True)
    _runtime.forget()


@pytest.fixture
def shipped(build: Callable[..., Ran], run: Callable[..., Ran], tmp_path: Path) -> str:
    """Plans for `ENTRY` are built ahead and imported into the default store; the choice."""
    built = build({})
    assert built.code == 0
    imported = run("import", tmp_path / "plans.json", "--json")
    assert (imported.code, imported.json["added"], imported.json["refused"]) == (0, 1, [])
    chosen = built.json["problems"][0]["plans"][0]["config"]
    assert isinstance(chosen, str)
    return chosen


def counted() -> dict[str, int]:
    found = convplan.stats()
    return {name: found[name] for name in ("planned", "from_store", "tuned")}


@pytest.mark.behaviour("C7")
@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        INSTANT,
        Policy(tune_after=5),
        Policy(deterministic=False, allow_tf32=True),
        Policy(effort="instant", mode="replay"),
        Policy(mode="replay", replay_miss="instant"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error")
def test_they_are_the_untuned_plans_at_first_sight(policy: Policy, shipped: str, there: Callable[..., None]) -> None:
    there()
    _, record = _deciding.decide(on_gpu(), policy)
    assert str(record.config) == shipped
    assert record.environment.is_ahead
    assert counted() == {"planned": 0, "from_store": 1, "tuned": 0}


@pytest.mark.behaviour("C1")
def test_their_serialized_forms_travel_with_them(shipped: str, there: Callable[..., None], cudnn: CudnnEngine) -> None:
    there()
    _, record = _deciding.decide(on_gpu(), INSTANT)
    for evidence in record.ranking[:LEADING]:
        serialized = known.store().serialized(record, evidence.config)
        assert serialized is not None
        restored = cudnn.restore(record.problem, evidence.config, record.policy, serialized)
        assert restored.serialize is not None
        assert restored.serialize() == serialized
    assert str(record.config) == shipped
    assert known.store().serialized(record, record.ranking[LEADING].config) is None, "it was not built"


def test_a_replay_of_measured_plans_does_not_take_them(shipped: str, there: Callable[..., None]) -> None:
    there()
    with pytest.raises(ReplayMiss):
        _deciding.decide(on_gpu(), Policy(mode="replay"))
    with pytest.raises(ReplayMiss):
        convplan.plan(on_gpu(), Policy(mode="replay"))
    assert str(convplan.plan(on_gpu(), Policy(mode="replay", effort="instant")).config) == shipped
    assert counted()["planned"] == 0


def measured(problem: Problem, policy: Policy, environment: Environment, **_: object) -> Planned:
    """A tuned record, without the GPU that tuning needs."""
    (plan,) = build_ahead([problem], policy, Device.from_properties(H200), leading=2)
    ranking = tuple(reversed(plan.record.ranking[:2]))
    record = msgspec.structs.replace(plan.record, environment=environment, effort="measure", ranking=ranking)
    return Planned(record, {})


@pytest.mark.behaviour("C7")
def test_they_are_tuned_at_the_sighting_that_the_policy_names(
    shipped: str, there: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    there()
    monkeypatch.setattr(_deciding, "find_plans", measured)
    found = [_deciding.decide(on_gpu(), Policy(tune_after=3))[1] for _ in range(4)]
    assert [record.effort for record in found] == ["instant", "instant", "measure", "measure"]
    assert str(found[0].config) == shipped != str(found[2].config)
    assert counted() == {"planned": 1, "from_store": 1, "tuned": 1}
    _runtime.forget()
    _, again = _deciding.decide(on_gpu(), Policy())
    assert (again.effort, again.environment) == ("measure", gpu_environment()), "what was measured there comes first"


def test_a_problem_that_is_tuned_at_first_sight_does_not_wait(
    shipped: str, there: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    there()
    monkeypatch.setattr(_deciding, "find_plans", measured)
    _, record = _deciding.decide(on_gpu(), Policy(tune_after=1))
    assert record.effort == "measure"
    assert counted() == {"planned": 1, "from_store": 0, "tuned": 1}


@pytest.mark.parametrize(
    "changes",
    [{"gpu": "NVIDIA H100 PCIe"}, {"multiprocessors": "114"}, {"capability": "10.0"}, {"cudnn": "91800"}],
    ids=str,
)
def test_on_another_gpu_or_cudnn_they_are_never_used(
    changes: dict[str, str], shipped: str, there: Callable[..., None]
) -> None:
    there(**changes)
    with (
        pytest.warns(convplan.ConvPlanWarning, match="answers this problem for another environment"),
        pytest.raises(ReplayMiss),
    ):
        convplan.plan(on_gpu(), Policy(mode="replay", effort="instant"))
    assert counted()["from_store"] == 0


def test_other_versions_of_torch_make_no_difference(shipped: str, there: Callable[..., None]) -> None:
    there(torch="2.13.0+cu130", cuda="13.2", matmul_precision="high")
    assert str(_deciding.decide(on_gpu(), INSTANT)[1].config) == shipped


def test_a_program_with_another_policy_does_not_find_them(shipped: str, there: Callable[..., None]) -> None:
    there()
    for policy in (Policy(deterministic=True), Policy(workspace_limit_bytes=0)):
        with pytest.raises(ReplayMiss):
            convplan.plan(on_gpu(), policy.replace(mode="replay", effort="instant"))


def test_plans_are_written_whole_or_not_at_all(h200: Device, tmp_path: Path) -> None:
    plans: list[AheadPlan] = build_ahead([on_gpu(), on_gpu(op="wgrad"), on_gpu()], Policy(), h200)
    report = write_ahead(plans, tmp_path / "plans.json")
    assert (report.exported, report.left_out) == (2, ()), "the same problem twice is one plan"
    assert [path.name for path in tmp_path.iterdir()] == ["plans.json"]
    with PlanStore(tmp_path / "store.sqlite") as store:
        assert convplan.import_plans(tmp_path / "plans.json", store=store).added == 2
        assert {row.key for row in store.rows()} == {plan.record.key for plan in plans}
        assert convplan.check_plans(store=store).problems == ()
