"""JSON files of plans: the round trip, what import refuses and why, and that a bad file changes nothing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.plans import ELSEWHERE, HERE, hear, record, run_python, start_python

from convplan import _exchange, _store
from convplan._errors import PlanFileError, StoreError, StoreMismatch
from convplan._exchange import (
    ImportReport,
    PlanFile,
    check_plans,
    clear_plans,
    export_plans,
    import_plans,
    plan_file_schema,
)
from convplan._plan import PlanRecord
from convplan._store import PlanStore


@pytest.fixture(autouse=True)
def _this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The records' environment and engines are this process's, so that nothing here depends on the machine."""
    for module in (_exchange, _store):
        monkeypatch.setattr(module, "current_environments", lambda: (HERE,))
        monkeypatch.setattr(module, "registered_engines", lambda: ("aten", "fft"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plans.json"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target.sqlite"


def stored(location: Path, *plans: PlanRecord) -> Path:
    """A closed store file that holds these plans."""
    with PlanStore(location) as store:
        for plan in plans:
            store.put(plan)
    return location


def contents(location: Path) -> dict[str, PlanRecord | None]:
    """What a store holds now; it must be in order."""
    with PlanStore(location) as store:
        assert store.check(engines=("aten", "fft"), here=[HERE]).ok
        return {row.key: row.record for row in store}


def plain(*plans: PlanRecord) -> dict[str, Any]:
    """A file's content as dictionaries and lists, to be spoilt."""
    content = msgspec.json.encode(PlanFile(format="convplan-plans", schema=1, plans=plans))
    decoded: dict[str, Any] = msgspec.json.decode(content)
    return decoded


def write(path: Path, content: object) -> Path:
    path.write_bytes(msgspec.json.encode(content))
    return path


# ---- the round trip


@pytest.mark.behaviour("C2")
def test_exported_plans_come_back_in_another_store(tmp_path: Path, path: Path, target: Path) -> None:
    plans = [record(1), record(2, engine="fft"), record(3, effort="instant", median_us=None)]
    source = stored(tmp_path / "source.sqlite", *plans)
    report = export_plans(path, store=source)
    assert (report.path, report.exported, report.left_out) == (str(path), 3, ())
    assert import_plans(path, store=target) == ImportReport(
        added=3, replaced=0, kept=0, elsewhere=0, refused=(), dry_run=False
    )
    assert contents(target) == {plan.key: plan for plan in plans}
    assert import_plans(path, store=target).kept == 3


def test_file_says_what_it_is_and_where_its_plans_belong(tmp_path: Path, path: Path) -> None:
    source = stored(tmp_path / "source.sqlite", record(1), record(2), record(1, environment=ELSEWHERE))
    export_plans(path, store=source)
    file = msgspec.json.decode(path.read_bytes(), type=PlanFile)
    assert (file.format, file.schema) == ("convplan-plans", 2)
    assert {item.environment: item.plans for item in file.environments} == {HERE: 2, ELSEWHERE: 1}
    assert file.version
    assert file.created.endswith("+00:00")


def test_export_takes_what_the_filters_name(tmp_path: Path, path: Path) -> None:
    source = stored(tmp_path / "source.sqlite", record(1), record(2, engine="fft"))
    assert export_plans(path, store=source, engine="fft").exported == 1
    assert msgspec.json.decode(path.read_bytes(), type=PlanFile).plans == (record(2, engine="fft"),)
    assert export_plans(path, store=source, key_prefix=record(1).key).exported == 1
    assert export_plans(path, store=source, device="cuda").exported == 0


def test_export_leaves_out_rows_that_cannot_be_used_and_says_so(tmp_path: Path, path: Path) -> None:
    source = stored(tmp_path / "source.sqlite", record(1), record(2))
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as connection:
        connection.execute("UPDATE convplan_plans SET record = '{}' WHERE key = ?", (record(1).key,))
    report = export_plans(path, store=source)
    assert report.exported == 1
    assert [key for key, _ in report.left_out] == [record(1).key]


@pytest.mark.behaviour("C2")
def test_files_merge_and_the_most_effort_stays(tmp_path: Path, target: Path) -> None:
    quick = record(1, effort="instant", median_us=None)
    files = []
    for name, plans in (("a", [quick, record(2)]), ("b", [record(1), record(3)]), ("c", [quick])):
        source = stored(tmp_path / f"{name}.sqlite", *plans)
        files.append(tmp_path / f"{name}.json")
        export_plans(files[-1], store=source)
    reports = [import_plans(file, store=target) for file in files]
    assert [(r.added, r.replaced, r.kept) for r in reports] == [(2, 0, 0), (1, 1, 0), (0, 0, 1)]
    assert contents(target) == {plan.key: plan for plan in (record(1), record(2), record(3))}


def test_a_key_that_a_file_holds_twice_is_taken_once(path: Path, target: Path) -> None:
    write(path, plain(record(1, effort="instant"), record(1), record(1, median_us=99.0)))
    report = import_plans(path, store=target)
    assert (report.added, report.kept, report.refused) == (1, 2, ())
    assert contents(target) == {record(1).key: record(1)}


@pytest.mark.behaviour("C2")
def test_plans_of_another_environment_are_stored_counted_and_not_used_here(path: Path, target: Path) -> None:
    write(path, plain(record(1), record(1, environment=ELSEWHERE)))
    report = import_plans(path, store=target)
    assert (report.added, report.elsewhere) == (2, 1)
    with PlanStore(target) as store:
        assert store.get(record(1).key) == record(1)


def test_dry_run_reports_the_same_and_writes_nothing(path: Path, target: Path) -> None:
    stored(target, record(1, effort="instant"), record(2))
    before = contents(target)
    write(path, plain(record(1), record(2), record(3)))
    dry = import_plans(path, store=target, dry_run=True)
    assert (dry.added, dry.replaced, dry.kept, dry.dry_run) == (1, 1, 1, True)
    assert contents(target) == before
    wet = import_plans(path, store=target)
    assert (wet.added, wet.replaced, wet.kept) == (dry.added, dry.replaced, dry.kept)


def test_default_store_is_used_when_none_is_given(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVPLAN_STORE", str(tmp_path / "mine.sqlite"))
    write(path, plain(record(1)))
    assert import_plans(path).added == 1
    assert check_plans().rows == 1
    assert export_plans(tmp_path / "again.json").exported == 1
    assert clear_plans().removed == 1
    assert contents(tmp_path / "mine.sqlite") == {}


# ---- check and clear


@pytest.mark.behaviour("C2")
def test_check_counts_other_environments_and_names_unknown_engines(target: Path) -> None:
    stored(target, record(1), record(2, environment=ELSEWHERE), record(3, engine="quantum"))
    report = check_plans(store=target)
    assert (report.rows, report.elsewhere, report.ok) == (3, 1, False)
    assert [problem.key for problem in report.problems] == [record(3, engine="quantum").key]


@pytest.mark.behaviour("C2")
def test_clear_takes_what_the_filters_name(target: Path) -> None:
    stored(target, record(1), record(2, environment=ELSEWHERE), record(3, engine="fft"))
    assert clear_plans(store=target, other_environments=True, dry_run=True).removed == 1
    assert len(contents(target)) == 3
    assert clear_plans(store=target, other_environments=True).removed == 1
    assert clear_plans(store=target, engine="fft").removed == 1
    assert contents(target) == {record(1).key: record(1)}
    assert clear_plans(store=target).removed == 1


# ---- files that are refused as a whole

MALFORMED = [
    pytest.param(b"", "Input data was truncated", id="empty"),
    pytest.param(b"plans!", r"malformed.*byte 0", id="no-json"),
    pytest.param(b'{"format": "convplan-plans", "schema": 1, "plans": [', "truncated", id="cut-short"),
    pytest.param(b'{"format": "convplan-plans", "schema": 1, "plans": [NaN]}', r"malformed.*byte 52", id="nan"),
    pytest.param(b"[1, 2]", "Expected `object`, got `array`", id="list"),
    pytest.param(b"{}", "missing required field `format`", id="empty-object"),
    pytest.param(
        b'{"format": "convplan-plans", "schema": "1"}', r"Expected `int`, got `str` - at `\$.schema`", id="type"
    ),
    pytest.param(b'{"format": "convplan-plans", "schema": 1}', "missing required field `plans`", id="no-plans"),
    pytest.param(
        b'{"format": "convplan-plans", "schema": 1, "plans": {}}', r"got `object` - at `\$.plans`", id="plans-object"
    ),
    pytest.param(
        b'{"format": "convplan-plans", "schema": 1, "plans": [], "run": "rm"}',
        "unknown field `run`",
        id="unknown-field",
    ),
    pytest.param(b'{"format": "\xff\xfe", "schema": 1, "plans": []}', "utf-8", id="no-utf-8"),
    pytest.param(b"[" * 500_000, "Expected `object`", id="nested"),
    pytest.param(b'{"x": ' * 500_000, "not a file of plans", id="nested-unknown"),
    pytest.param(
        b'{"format": "convplan-plans", "schema": 1, "plans": [' + b"[" * 500_000,
        "not a file of plans",
        id="nested-plan",
    ),
    pytest.param(b'{"format": "\\u001b[31m", "schema": 1, "plans": 3', "truncated", id="cut-short-with-escape"),
]


@pytest.mark.parametrize(("content", "said"), MALFORMED)
def test_malformed_file_is_an_error_that_names_the_place(path: Path, target: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    with pytest.raises(PlanFileError, match=said) as caught:
        import_plans(path, store=target)
    assert caught.value.path == str(path)
    assert isinstance(caught.value, ValueError)
    assert not target.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other-plans"}, r"schema 'other-plans', expected 'convplan-plans' 2"),
        ({"schema": 3, "and": "more"}, "schema 3, expected 2"),
        ({"schema": -1}, "schema -1, expected 2"),
    ],
    ids=["format", "newer", "negative"],
)
def test_other_format_or_schema_is_a_mismatch(path: Path, target: Path, change: dict[str, object], said: str) -> None:
    write(path, plain(record(1)) | change)
    with pytest.raises(StoreMismatch, match=said):
        import_plans(path, store=target)
    assert not target.exists()


def test_too_large_a_file_is_not_read(path: Path, target: Path) -> None:
    with path.open("wb") as file:
        file.truncate(_exchange.MAX_FILE_BYTES + 1)
    with pytest.raises(PlanFileError, match=f"is larger than {_exchange.MAX_FILE_BYTES} bytes"):
        import_plans(path, store=target)


def test_too_many_plans_are_refused(path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exchange, "MAX_PLANS", 2)
    write(path, plain(record(1), record(2), record(3)))
    with pytest.raises(PlanFileError, match="holds 3 plans, expected at most 2"):
        import_plans(path, store=target)
    assert not target.exists()


def test_a_file_that_is_not_there_or_a_directory_is_named(tmp_path: Path, target: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        import_plans(tmp_path / "absent.json", store=target)
    with pytest.raises(StoreError, match="Is a directory"):
        import_plans(tmp_path, store=target)


# ---- plans that are refused one by one, while the good ones go in


def _set(*where: object, to: object) -> Callable[[dict[str, Any]], None]:
    def spoil(plan: dict[str, Any]) -> None:
        at: Any = plan
        for step in where[:-1]:
            at = at[step]
        at[where[-1]] = to

    return spoil


REFUSED = [
    pytest.param(_set("planning_s", to="soon"), r"Expected `float`, got `str` - at `\$.planning_s`", id="wrong-type"),
    pytest.param(_set("colour", to="red"), "unknown field `colour`", id="unknown-field"),
    pytest.param(_set("effort", to="cosmic"), r"Invalid enum value 'cosmic' - at `\$.effort`", id="unknown-effort"),
    pytest.param(_set("problem", "w", "dims", to=[6, 5, 3, 3]), r"weight.shape\[1\] is 5", id="no-such-problem"),
    pytest.param(_set("problem", "x", "dims", to=[2**40] * 4), "at most", id="absurd-size"),
    pytest.param(_set("policy", "deterministic", to=None), "resolved policy", id="unresolved-policy"),
    pytest.param(_set("ranking", to=[]), "1 to 10000 candidates", id="no-candidate"),
    pytest.param(
        _set("ranking", 0, "config", "engine", to="quantum"),
        "unknown engine 'quantum'; registered engines: aten, fft",
        id="unknown-engine",
    ),
    pytest.param(_set("ranking", 0, "config", "engine", to="AtEn"), "lower-case name", id="engine-not-normalized"),
    pytest.param(_set("ranking", 0, "config", "knobs", to=[["a", 2**63]]), "more than 64 bits", id="huge-knob"),
    pytest.param(
        _set("ranking", 0, "median_us", to=-1.0), r"median_us is -1\.0, expected a finite", id="negative-time"
    ),
    pytest.param(_set("ranking", 0, "samples_us", to=[1.0, -0.5]), r"samples_us\[1\] is -0\.5", id="negative-sample"),
    pytest.param(_set("ranking", 0, "workspace_bytes", to=-8), "workspace_bytes is -8", id="negative-workspace"),
    pytest.param(_set("ranking", 0, "rejected", to="build"), "belongs into the other list", id="ranked-rejection"),
    pytest.param(_set("rejected", 0, "reason", to="\x1b[2J"), "no control characters", id="terminal-escape"),
    pytest.param(_set("rejected", 0, "reason", to="x" * 100_001), "has 100001 characters", id="long-text"),
    pytest.param(_set("environment", "device", to="cuda"), "device is 'cpu' in the problem and 'cuda'", id="device"),
    pytest.param(_set("version", to="x" * 65), "at most 64", id="long-version"),
]


@pytest.mark.parametrize(("spoil", "said"), REFUSED)
def test_bad_plan_is_refused_with_its_reason_and_the_good_ones_go_in(
    path: Path, target: Path, spoil: Callable[[dict[str, Any]], None], said: str
) -> None:
    content = plain(record(1), record(2), record(3))
    spoil(content["plans"][1])
    report = import_plans(write(path, content), store=target)
    assert report.added == 2
    ((name, reason),) = report.refused
    assert name.startswith("plans[1]")
    assert re.search(said, reason)
    assert contents(target) == {plan.key: plan for plan in (record(1), record(3))}


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 5000], ids=["large", "small", "5001-digits"])
def test_a_plan_with_a_number_beyond_all_bounds_is_refused(path: Path, target: Path, number: str) -> None:
    _with_planning_s(path, number)
    assert [name for name, _ in import_plans(path, store=target).refused] == ["plans[0]"]
    assert contents(target) == {}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "+1", "0x10", "1_0"])
def test_a_number_that_is_not_json_is_a_malformed_file(path: Path, target: Path, number: str) -> None:
    _with_planning_s(path, number)
    with pytest.raises(PlanFileError, match=r"malformed.*byte \d+"):
        import_plans(path, store=target)
    assert not target.exists()


def _with_planning_s(path: Path, number: str) -> None:
    text = msgspec.json.encode(plain(record(1))).decode()
    path.write_text(text.replace('"planning_s":0.25', f'"planning_s":{number}'))


@pytest.mark.parametrize("junk", [None, 7, "text", [], {}, [[[]]]], ids=repr)
def test_plans_that_are_no_objects_are_refused(path: Path, target: Path, junk: object) -> None:
    content = plain(record(1))
    content["plans"].append(junk)
    report = import_plans(write(path, content), store=target)
    assert (report.added, [name for name, _ in report.refused]) == (1, ["plans[1]"])


# ---- writing the file


def test_export_refuses_a_directory(tmp_path: Path, target: Path) -> None:
    with pytest.raises(StoreError, match="is a directory, expected the name of a file"):
        export_plans(tmp_path, store=target)


def test_export_names_a_directory_that_is_missing(tmp_path: Path, target: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written: No such file or directory"):
        export_plans(tmp_path / "absent" / "plans.json", store=target)


def test_export_never_writes_more_than_import_takes(path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(target, record(1), record(2))
    monkeypatch.setattr(_exchange, "MAX_PLANS", 1)
    with pytest.raises(StoreError, match=r"2 plans make .* export in parts"):
        export_plans(path, store=target)
    assert not path.exists()


def test_failed_export_keeps_the_old_file_and_leaves_nothing_beside_it(
    path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(target, record(1))
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="cannot be written: No space left on device"):
        export_plans(path, store=target)
    assert path.read_text() == "old"
    assert {item.name for item in path.parent.iterdir()} == {path.name, target.name}


EXPORT_AGAIN_AND_AGAIN = """
import sys
from convplan._exchange import export_plans
while True:
    export_plans(sys.argv[1], store=sys.argv[2])
    print("exported", flush=True)
"""


def test_a_killed_export_leaves_a_whole_file(path: Path, target: Path) -> None:
    stored(target, *(record(n) for n in range(1, 30)))
    with start_python(EXPORT_AGAIN_AND_AGAIN, path, target) as exporter:
        for _ in range(5):
            assert hear(exporter) == "exported"
        exporter.send_signal(signal.SIGKILL)
        assert exporter.wait(30) == -signal.SIGKILL
    assert len(msgspec.json.decode(path.read_bytes(), type=PlanFile).plans) == 29


# ---- the published schema


def test_published_schema_is_the_one_of_the_structs() -> None:
    assert _exchange.SCHEMA_FILE.read_bytes() == plan_file_schema(), "run python scripts/write_plan_schema.py"


@pytest.mark.behaviour("C2")
def test_exported_file_follows_the_published_schema(tmp_path: Path, path: Path) -> None:
    import jsonschema

    export_plans(path, store=stored(tmp_path / "a.sqlite", record(1), record(2, effort="instant", median_us=None)))
    schema = msgspec.json.decode(_exchange.SCHEMA_FILE.read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    content = msgspec.json.decode(path.read_bytes())
    validator.validate(content)
    content["plans"][0]["colour"] = "red"
    with pytest.raises(jsonschema.ValidationError, match="colour"):
        validator.validate(content)


def test_published_schema_names_every_field_and_allows_no_other() -> None:
    schema = msgspec.json.decode(plan_file_schema())
    for name in ("PlanFile", "PlanRecord", "Problem", "Policy", "Environment", "Evidence", "EngineConfig"):
        assert schema["$defs"][name]["additionalProperties"] is False
    assert set(schema["$defs"]["PlanRecord"]["properties"]) == set(PlanRecord.__struct_fields__)
    assert set(schema["$defs"]["PlanFile"]["properties"]) == set(_exchange._Envelope.__struct_fields__)


LIVE = """
import sys
from convplan import _environment
from convplan._exchange import check_plans, export_plans, import_plans
from convplan._store import PlanStore
from helpers.plans import *
path, target = sys.argv[1:]
with PlanStore(target) as store:
    store.put(record(1, environment=_environment.current("cpu")))
    store.put(record(2, environment=HERE))
report = check_plans(store=target)
assert (report.ok, report.rows, report.elsewhere) == (True, 2, 1), report
export_plans(path, store=target)
report = import_plans(path, store=target)
assert (report.kept, report.elsewhere, report.refused) == (2, 1, ()), report
"""


def test_check_and_import_know_the_live_engines_and_this_machine(path: Path, target: Path) -> None:
    run_python(LIVE, path, target)
