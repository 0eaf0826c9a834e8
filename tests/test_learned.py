"""Learned errata: what they speak of and what not, how they are kept and shared, and that planning heeds them."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.fresh import fresh_process, registered
from helpers.plans import ELSEWHERE, HERE, hear, problem, record, run_python, say, start_python

import convplan
from convplan import _database, _deciding, _environment, _errata_files, _runtime, _snapshot, _sqlite, _store_tables
from convplan._environment import PROBE_FAILED, Environment
from convplan._epilogue import Epilogue
from convplan._errata_files import export_errata, import_errata
from convplan._errors import ConvPlanWarning, PlanFileError, SpecError, StoreError, StoreMismatch
from convplan._learned import KIND_OF_STAGE, Family, LearnedErratum, learned_from, scope_of, verdict
from convplan._plan import Evidence
from convplan._problem import Problem
from convplan._store import ForgivingStore, PlanStore
from convplan.cli import main
from convplan.engines.base import EngineConfig
from convplan.engines.fake import FakeCandidate, FakeEngine

H200 = Environment(
    "cuda",
    (
        ("gpu", "NVIDIA H200"),
        ("capability", "9.0"),
        ("multiprocessors", "132"),
        ("torch", "2.11.0+cu130"),
        ("cuda", "13.0"),
        ("cudnn", "91900"),
        ("matmul_precision", "highest"),
    ),
)
CONFIG = EngineConfig.of("cudnn", engine=12, split_k=4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plans.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[PlanStore]:
    with PlanStore(path, wait_s=0.2) as opened:
        yield opened


def gpu_problem(**changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "op": "fprop",
        "x_dims": (8, 64, 56, 56),
        "w_dims": (64, 64, 3, 3),
        "padding": 1,
        "dtype": "float16",
        "device": "cuda",
        **changes,
    }
    return Problem.dense(fields.pop("op"), fields.pop("x_dims"), fields.pop("w_dims"), **fields)


def erratum(config: EngineConfig = CONFIG, environment: Environment = H200, **changes: Any) -> LearnedErratum:
    fields: dict[str, Any] = {
        "config": config,
        "kind": "crashed",
        "reason": "the worker ended with signal 11",
        "problem": str(gpu_problem()),
        "family": Family.of(gpu_problem()),
        "scope": scope_of(config.engine, environment),
        "created": "2030-01-01T00:00:00+00:00",
        "version": "0.1.0",
        **changes,
    }
    return LearnedErratum(**fields)


def numbered(number: int) -> LearnedErratum:
    return erratum(EngineConfig.of("cudnn", engine=number))


def without(environment: Environment, **changed: str) -> Environment:
    """An environment with some items changed."""
    items = tuple((label, changed.get(label, value)) for label, value in environment.items)
    return Environment(environment.device, items)


# ---- what it speaks of

SAME = {
    "itself": {},
    "batch": {"x_dims": (1, 64, 56, 56)},
    "size": {"x_dims": (8, 64, 7, 9)},
    "channels": {"x_dims": (8, 32, 56, 56), "w_dims": (64, 32, 3, 3)},
    "filters": {"w_dims": (7, 64, 3, 3)},
    "padding": {"padding": 0},
    "bias": {"epilogue": Epilogue(bias=True)},
}
OTHER = {
    "gradient of the input": {"op": "dgrad"},
    "gradient of the weight": {"op": "wgrad"},
    "dtype": {"dtype": "bfloat16"},
    "layout": {"layout": "channels_last"},
    "one dimension": {"x_dims": (8, 64, 56), "w_dims": (64, 64, 3)},
    "three dimensions": {"x_dims": (8, 64, 8, 8, 8), "w_dims": (64, 64, 3, 3, 3)},
    "pointwise": {"w_dims": (64, 64, 1, 1)},
    "oblong": {"w_dims": (64, 64, 3, 1)},
    "strided": {"stride": 2},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2, "w_dims": (64, 32, 3, 3)},
    "depthwise": {"groups": 64, "w_dims": (64, 1, 3, 3)},
}


@pytest.mark.behaviour("B11")
@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_it_speaks_of_the_whole_family(changes: dict[str, Any]) -> None:
    assert erratum().matches(gpu_problem(**changes), CONFIG, H200)


@pytest.mark.behaviour("B11")
@pytest.mark.parametrize("changes", OTHER.values(), ids=OTHER)
def test_it_does_not_speak_of_other_families(changes: dict[str, Any]) -> None:
    assert not erratum().matches(gpu_problem(**changes), CONFIG, H200)


def test_grouped_and_depthwise_are_families_of_their_own() -> None:
    families = {Family.of(gpu_problem(**OTHER[name])) for name in ("grouped", "depthwise")}
    assert len(families | {Family.of(gpu_problem())}) == 3
    assert Family.of(gpu_problem(groups=4, w_dims=(64, 16, 3, 3))) in families


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig.of("cudnn", engine=13, split_k=4),
        EngineConfig.of("cudnn", engine=12, split_k=8),
        EngineConfig.of("cudnn", engine=12),
        EngineConfig.of("cudnn", engine=12, split_k=4, stages=1),
        EngineConfig.of("aten", engine=12, split_k=4),
    ],
    ids=str,
)
def test_it_speaks_of_exactly_one_configuration(config: EngineConfig) -> None:
    assert not erratum().matches(gpu_problem(), config, H200)


CPU = Environment(
    "cpu",
    (
        ("cpu", "a cpu"),
        ("capability", "AVX512"),
        ("threads", "2"),
        ("torch", "2.13.0"),
        ("onednn", "3.7"),
        ("matmul_precision", "highest"),
    ),
)


@pytest.mark.parametrize(
    ("engine", "seen_in", "label", "counts"),
    [
        ("cudnn", H200, "capability", True),
        ("cudnn", H200, "cudnn", True),
        ("cudnn", H200, "cuda", True),
        ("cudnn", H200, "torch", False),
        ("cudnn", H200, "gpu", False),
        ("cudnn", H200, "multiprocessors", False),
        ("aten", H200, "torch", True),
        ("aten", H200, "cudnn", True),
        ("aten", H200, "matmul_precision", False),
        ("aten", CPU, "cpu", True),
        ("aten", CPU, "capability", True),
        ("aten", CPU, "torch", True),
        ("aten", CPU, "onednn", True),
        ("aten", CPU, "threads", False),
    ],
)
def test_its_scope_is_what_the_failure_depends_on(engine: str, seen_in: Environment, label: str, counts: bool) -> None:
    one = erratum(EngineConfig(engine), seen_in)
    assert one.applies_in(seen_in)
    assert one.applies_in(without(seen_in, **{label: "another"})) is not counts


def test_it_holds_on_its_device_only_and_never_where_a_version_is_unknown() -> None:
    assert not erratum().applies_in(CPU)
    assert not erratum().applies_in(Environment("cuda", ()))
    unknown = without(H200, cudnn=PROBE_FAILED)
    assert not erratum(environment=unknown).applies_in(unknown)
    other = Environment("xpu", (("torch", "2.13.0"),))
    assert erratum(EngineConfig("aten"), other).applies_in(other)


def test_the_scope_of_this_machine_is_found() -> None:
    here = _environment.current("cpu")
    assert [label for label, _ in scope_of("aten", here).items] == ["cpu", "capability", "torch", "onednn"]


def test_a_verdict_says_what_happened_when_and_how_often() -> None:
    one = erratum(seen=3)
    said = verdict([numbered(1), one], gpu_problem(), CONFIG, H200)
    assert said.startswith(f"learned erratum {one.id[:8]}: crashed on 2030-01-01, 3 times by now (fprop float16")
    assert said.endswith("the worker ended with signal 11")
    assert verdict([one], gpu_problem(), CONFIG) == said
    assert verdict([one], gpu_problem(), CONFIG, CPU) == ""
    assert verdict([one], gpu_problem(stride=2), CONFIG, H200) == ""
    assert verdict([], gpu_problem(), CONFIG, H200) == ""


def test_its_id_is_what_it_speaks_of_and_not_what_it_says() -> None:
    assert erratum(kind="leaked", reason="else", problem="else", created="", version="", seen=9).id == erratum().id
    others = [numbered(1), erratum(family=Family.of(gpu_problem(stride=2))), erratum(environment=CPU)]
    assert len({one.id for one in (*others, erratum())}) == 4


# ---- what is learned


@pytest.mark.parametrize(("stage", "kind"), KIND_OF_STAGE.items())
def test_a_candidate_that_did_harm_is_learned(stage: str, kind: str) -> None:
    bad = Evidence(config=EngineConfig.of("fft", block=2), rejected=stage, reason="as\x1b[31m it\nsaid")
    (one,) = learned_from(msgspec.structs.replace(record(1), rejected=(bad, *record(1).rejected)))
    assert (one.config, one.kind, one.reason) == (bad.config, kind, "as [31m it said")
    assert one.matches(problem(7), bad.config, HERE)
    assert (one.problem, one.created, one.version) == (str(problem(1)), record(1).created, "0.1.0")


@pytest.mark.parametrize("stage", ["enumerate", "filter", "build", "measure", "run"])
def test_a_candidate_that_was_only_slow_or_refused_is_not(stage: str) -> None:
    bad = Evidence(config=EngineConfig("fft"), rejected=stage, reason="out of memory")
    assert learned_from(msgspec.structs.replace(record(1), rejected=(bad,))) == []


# ---- the table


def test_what_is_learned_comes_back_in_another_process(path: Path) -> None:
    with PlanStore(path) as store:
        assert store.learn([erratum(), numbered(1)]) == {"added": 2, "updated": 0, "kept": 0}
        assert store.errata() == sorted([erratum(), numbered(1)], key=lambda one: one.id)
        assert store.errata(CPU) == []
        assert store.errata(without(H200, gpu="NVIDIA H100", torch="2.13.0")) == store.errata()
        assert store.errata(without(H200, cudnn="92000")) == []
    code = (
        "import sys; from convplan._environment import Environment; import msgspec\n"
        "from convplan._store import ForgivingStore, PlanStore\n"
        "environment = msgspec.json.decode(sys.argv[2], type=Environment)\n"
        "print(*sorted(one.id for one in ForgivingStore(PlanStore(sys.argv[1])).errata(environment)))\n"
        "assert 'sqlalchemy' not in sys.modules"
    )
    printed = run_python(code, path, msgspec.json.encode(H200).decode())
    assert printed.split() == sorted([erratum().id, numbered(1).id])


def test_what_is_seen_again_is_counted_and_told_by_the_newest(store: PlanStore) -> None:
    store.learn([erratum()])
    later = erratum(kind="stalled", reason="no answer in 5 s", created="2031-01-01T00:00:00+00:00")
    assert store.learn([later]) == {"added": 0, "updated": 1, "kept": 0}
    assert store.learn([erratum()], count_again=False) == {"added": 0, "updated": 0, "kept": 1}
    (found,) = store.errata()
    assert (found.seen, found.kind, found.reason) == (2, "stalled", "no answer in 5 s")
    assert found.created == erratum().created


def test_dry_learning_writes_nothing(store: PlanStore) -> None:
    assert store.learn([erratum()], dry_run=True)["added"] == 1
    assert store.errata() == []


def test_forgetting_takes_what_is_named(store: PlanStore) -> None:
    store.learn(map(numbered, range(5)))
    assert store.forget_errata(numbered(2).id[:12]) == 1
    assert numbered(2) not in store.errata()
    assert store.forget_errata("%") == 0
    assert store.forget_errata(dry_run=True) == 4
    assert store.forget_errata() == 4
    assert store.errata() == []


def test_clearing_plans_leaves_errata(store: PlanStore) -> None:
    store.put(record(1))
    store.learn([erratum()])
    store.delete()
    assert store.errata() == [erratum()]


def test_a_store_takes_so_many_and_no_more(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_store_tables, "MAX_ERRATA", 3)
    store.learn(map(numbered, range(3)))
    store.learn(map(numbered, range(3)))
    with pytest.raises(StoreError, match="room for 0 more learned errata of 3, found 2 new ones"):
        store.learn(map(numbered, range(5)))
    assert [one.seen for one in store.errata()] == [2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scope": Environment("cuda", ())}, "scope has 0 items"),
        ({"reason": ""}, "reason is empty"),
        ({"reason": "\x1b[31m"}, "control characters"),
        ({"problem": "x" * 3000}, "too long"),
        ({"created": "x" * 65}, "too long"),
        ({"scope": Environment("cuda", (("cudnn", "\x07"),))}, "control characters"),
        ({"config": EngineConfig.of("cudnn", engine=2**64)}, "more than 64 bits"),
    ],
)
def test_one_that_makes_no_sense_is_not_stored(store: PlanStore, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        store.learn([numbered(1), erratum(**changes)])
    assert store.errata() == []


def edit(path: Path, sql: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        assert connection.execute(sql, values).rowcount == 1


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("erratum", "{}", "does not match its checksum"),
        ("erratum", 7, "does not match its checksum"),
        ("checksum", "", "does not match its checksum"),
        ("id", "0" * 32, "the id does not belong"),
        ("schema", 2, "a newer convplan wrote it"),
        ("schema", "new", "a newer convplan wrote it"),
    ],
)
def test_a_damaged_row_is_named_and_not_heeded(path: Path, column: str, value: object, said: str) -> None:
    with PlanStore(path) as store:
        store.learn([numbered(1), numbered(2)])
    edit(path, f"UPDATE convplan_errata SET {column} = ? WHERE id = ?", value, numbered(1).id)
    with PlanStore(path) as store:
        assert store.errata() == [numbered(2)]
        assert ForgivingStore(store).errata(H200) == (numbered(2),)
        report = store.check(engines=("aten",), here=[HERE])
        assert report.errata == 2
        (found,) = report.problems
        assert found.key.startswith("erratum ")
        assert said in found.reason
        counted = store.learn([numbered(1)])
        newer = column == "schema"
        assert counted == {
            "added": int(column == "id"),
            "updated": int(not newer and column != "id"),
            "kept": int(newer),
        }
        assert (numbered(1) in store.errata()) is not newer
        assert store.forget_errata() == (1 if newer else 3 if column == "id" else 2)


LEARN_MANY = """
import sys, msgspec
from convplan._learned import LearnedErratum
from convplan._store import PlanStore
errata = msgspec.json.decode(sys.argv[2], type=list[LearnedErratum])
print("ready", flush=True)
input()
with PlanStore(sys.argv[1]) as store:
    for _ in range(10):
        for one in errata:
            store.learn([one])
"""


def test_processes_that_learn_the_same_count_every_time(path: Path) -> None:
    text = msgspec.json.encode([numbered(1), numbered(2)]).decode()
    writers = [start_python(LEARN_MANY, path, text) for _ in range(2)]
    for writer in writers:
        assert hear(writer) == "ready"
    for writer in writers:
        say(writer)
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    with PlanStore(path) as store:
        assert [one.seen for one in store.errata()] == [20, 20]


def test_both_readers_know_the_same_schemas() -> None:
    numbers = (*_database.OLDER_SCHEMAS, _database.STORE_SCHEMA)
    assert tuple(map(str, numbers)) == _snapshot.KNOWN_SCHEMAS


# ---- the forgiving store


def test_what_cannot_be_written_counts_in_this_process_and_is_written_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PlanStore(path) as other:
        other.learn([numbered(1)])
    monkeypatch.setitem(_sqlite.PRAGMAS, "query_only", "on")
    now = [0.0]
    forgiving = ForgivingStore(PlanStore(path), clock=lambda: now[0])
    with pytest.warns(ConvPlanWarning, match="read-only"):
        forgiving.learn([numbered(2)])
    forgiving.learn([numbered(3), numbered(2)])
    assert {one.id: one.seen for one in forgiving.errata(H200)} == {
        numbered(1).id: 1,
        numbered(2).id: 2,
        numbered(3).id: 1,
    }
    assert forgiving.errata(CPU) == ()
    forgiving.close()
    monkeypatch.delitem(_sqlite.PRAGMAS, "query_only")
    now[0] = 60.0
    forgiving.remember(record(1))
    forgiving.close()
    with PlanStore(path) as store:
        assert {one.id: one.seen for one in store.errata()} == {
            numbered(1).id: 1,
            numbered(2).id: 2,
            numbered(3).id: 1,
        }


def test_one_without_a_scope_is_heeded_in_this_process_only(store: PlanStore) -> None:
    nowhere = Environment("cpu", ())
    forgiving = ForgivingStore(store)
    forgiving.learn([erratum(EngineConfig("aten"), nowhere)])
    assert len(forgiving.errata(nowhere)) == 1
    assert store.errata() == []


def test_a_store_that_cannot_be_read_has_no_errata_and_warns_once(path: Path) -> None:
    path.mkdir()
    forgiving = ForgivingStore(PlanStore(path), clock=iter(range(0, 10**6, 60)).__next__)
    with pytest.warns(ConvPlanWarning, match="directory") as caught:
        assert [forgiving.errata(HERE), forgiving.errata(ELSEWHERE)] == [(), ()]
    assert len(caught) == 1


# ---- planning

PROBLEM = Problem.dense("fprop", (2, 4, 9, 9), (6, 4, 3, 3), padding=1)
MINE = convplan.Policy(engines=("mine",), budget_s=0.01, effort="measure")


@pytest.fixture
def mine() -> Iterator[FakeEngine]:
    """An engine whose faster candidate is wrong."""
    engine = FakeEngine([FakeCandidate(time_us=400), FakeCandidate(time_us=50, fails="wrong")], name="mine")
    with fresh_process(), registered(engine):
        yield engine


@pytest.mark.behaviour("B11")
def test_what_planning_learned_is_not_run_again(mine: FakeEngine) -> None:
    first = convplan.plan(PROBLEM, MINE)
    (bad,) = first.rejected
    assert bad.rejected == "verify"
    with PlanStore.default() as store:
        (learned,) = store.errata()
    assert (learned.config, learned.kind, learned.seen) == (bad.config, "wrong", 1)
    _runtime.forget()  # as in another process
    again, planned = _deciding.adopt(PROBLEM, MINE, force=True)
    assert planned
    (dropped,) = again.rejected
    assert (dropped.config, dropped.rejected) == (bad.config, "filter")
    assert dropped.reason.startswith(f"learned erratum {learned.id[:8]}: gave wrong results on ")
    relative = Problem.dense("fprop", (5, 4, 7, 7), (6, 4, 3, 3), padding=1)
    assert [one.rejected for one in convplan.plan(relative, MINE).rejected] == ["filter"]
    stranger = Problem.dense("fprop", (5, 4, 7, 7), (6, 4, 3, 3), padding=1, stride=2)
    assert [one.rejected for one in convplan.plan(stranger, MINE).rejected] == ["verify"]
    with PlanStore.default() as store:
        assert [one.seen for one in store.errata()] == [1, 1]
        store.forget_errata()
    _runtime.forget()
    again, _ = _deciding.adopt(PROBLEM, MINE, force=True)
    assert [one.rejected for one in again.rejected] == ["verify"], "forgotten, and so tried again"


def test_effort_instant_heeds_it_too(mine: FakeEngine) -> None:
    convplan.plan(PROBLEM, MINE)
    small = Problem.dense("fprop", (1, 4, 5, 5), (6, 4, 3, 3), padding=1)
    untuned = convplan.plan(small, MINE.replace(effort="instant"))
    assert [one.rejected for one in untuned.rejected] == ["filter"]


# ---- files


def test_errata_go_out_to_a_file_and_come_back(store: PlanStore, tmp_path: Path) -> None:
    file = tmp_path / "errata.json"
    store.learn([erratum(seen=4), numbered(1)])
    assert export_errata(file, store=store).exported == 2
    target = tmp_path / "target.sqlite"
    assert import_errata(file, store=target, dry_run=True).added == 2
    assert import_errata(file, store=target).added == 2
    assert import_errata(file, store=target).kept == 2
    with PlanStore(target) as other:
        assert other.errata() == store.errata()


def spoilt(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    file = tmp_path / "errata.json"
    with PlanStore(tmp_path / "source.sqlite") as store:
        store.learn([numbered(1), numbered(2)])
        export_errata(file, store=store)
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content))
    return file


def first(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["errata"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (first(kind="exploded"), "Invalid enum value 'exploded'"),
        (first(seen=0), ">= 1"),
        (first(run="rm"), "unknown field `run`"),
        (first(scope={"device": "cuda", "items": []}), "scope has 0 items"),
        (first(reason="\x1b[2J"), "control characters"),
        (lambda content: content["errata"][0]["family"].update(dtypes=["float7"] * 3), "float7"),
        (lambda content: content["errata"][0]["family"].update(filter_dims=[]), "filter_dims has 0 sizes"),
        (lambda content: content["errata"][0]["config"].update(engine="UPPER"), "expected a lower-case name"),
    ],
)
def test_import_refuses_a_bad_one_and_takes_the_rest(
    tmp_path: Path, path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    report = import_errata(spoilt(tmp_path, change), store=path)
    assert report.added == 1
    ((name, reason),) = report.refused
    assert name == "errata[0]"
    assert said in reason


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda content: content.update(schema=2), StoreMismatch, "schema 2, expected 1"),
        (lambda content: content.update(format="convplan-plans"), StoreMismatch, "expected 'convplan-errata' 1"),
        (lambda content: content.update(more=1), PlanFileError, "unknown field `more`"),
        (lambda content: content.pop("errata"), PlanFileError, "missing required field `errata`"),
    ],
)
def test_a_file_of_something_else_is_refused_as_a_whole(
    tmp_path: Path, path: Path, change: Callable[[dict[str, Any]], object], error: type[StoreError], said: str
) -> None:
    with pytest.raises(error, match=said):
        import_errata(spoilt(tmp_path, change), store=path)
    assert not path.exists()


def test_too_large_a_file_is_refused(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = spoilt(tmp_path, lambda content: None)
    monkeypatch.setattr(_errata_files, "MAX_ERRATA", 1)
    with pytest.raises(PlanFileError, match="holds 2 errata, expected at most 1"):
        import_errata(file, store=path)
    monkeypatch.setattr(_errata_files, "MAX_FILE_BYTES", 10)
    with pytest.raises(PlanFileError, match="larger than 10 bytes"):
        import_errata(file, store=path)


# ---- the command


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in argv])
    return (code, *capsys.readouterr())


def test_the_command_lists_exports_imports_and_clears(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = _environment.current("cpu")
    mine, theirs = erratum(EngineConfig.of("aten", block=3), here), erratum()
    with PlanStore.default() as store:
        store.learn([mine, theirs])
    code, out, _ = run(capsys, "errata", "list")
    assert code == 0
    assert all(text in out for text in (mine.id[:8], theirs.id[:8], "cudnn[engine=12, split_k=4]", "signal 11"))
    found = json.loads(run(capsys, "errata", "list", "--json")[1])["errata"]
    assert {one["id"]: one["environment"] for one in found} == {mine.id: "here", theirs.id: "elsewhere"}
    file = tmp_path / "errata.json"
    assert json.loads(run(capsys, "errata", "export", file, "--json")[1])["exported"] == 2
    assert json.loads(run(capsys, "errata", "clear", "--dry-run", "--json")[1]) == {"removed": 2, "dry_run": True}
    assert run(capsys, "errata", "clear", mine.id[:10], "--yes")[1] == "1 learned errata forgotten\n"
    assert run(capsys, "errata", "clear", "--yes")[1] == "1 learned errata forgotten\n"
    assert json.loads(run(capsys, "errata", "import", file, "--dry-run", "--json")[1])["added"] == 2
    assert run(capsys, "errata", "import", file)[:2] == (0, "added 2, updated 0, kept 0, refused 0\n")
    content = json.loads(file.read_bytes())
    content["errata"][0]["seen"] = -1
    file.write_text(json.dumps(content))
    code, out, _ = run(capsys, "errata", "import", file, "--json")
    assert (code, json.loads(out)["refused"][0]["erratum"]) == (1, "errata[0]")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with PlanStore.default() as store:
        store.learn([erratum()])
    code, out, err = run(capsys, "errata", "clear", "zz", "--yes")
    assert (code, out) == (1, "")
    assert "0 ids of learned errata begin with 'zz', expected one; `convplan errata list`" in err
    assert run(capsys, "errata", "clear")[0] == 2
    assert run(capsys, "errata")[0] in (0, 2)
    assert run(capsys, "errata", "import", tmp_path / "none.json")[0] == 2
