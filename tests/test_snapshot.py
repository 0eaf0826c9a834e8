"""Reading a store at once and without SQLAlchemy: it answers what reading key by key answers, also for bad rows."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.plans import ELSEWHERE, HERE, POLICY, hear, problem, record, run_python, say, start_python

from convplan import _forgiving, _store
from convplan._environment import Environment
from convplan._errors import ConvPlanWarning
from convplan._plan import PlanRecord
from convplan._rows import checksum_of
from convplan._snapshot import Odd, QuickReader
from convplan._store import ForgivingStore, PlanStore

NUMBERS = range(1, 13)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plans.sqlite"


def fill(path: Path) -> None:
    with PlanStore(path) as store:
        for number in NUMBERS:
            store.put(record(number))
        store.put(record(1, environment=ELSEWHERE))
        store.put(record(20, environment=ELSEWHERE))


def quick(path: Path) -> QuickReader:
    return QuickReader(path, shown=str(path), wait_s=0.2)


# ---- one look, no SQLAlchemy

REPLAY = """
import sys
from helpers.plans import *
from convplan._store import ForgivingStore, PlanStore
store = ForgivingStore(PlanStore(sys.argv[1]))
assert all(store.lookup(problem(n), POLICY, HERE) == record(n) for n in range(1, 13))
assert store.errata(HERE) == ()
assert not {"sqlalchemy", "torch"} & set(sys.modules), sorted(sys.modules)
store.remember(record(13))
assert "sqlalchemy" in sys.modules
assert store.lookup(problem(13), POLICY, HERE) == record(13)
"""


@pytest.mark.behaviour("C1")
def test_a_second_process_finds_its_plans_without_loading_a_database_library(path: Path) -> None:
    fill(path)
    run_python(REPLAY, path)
    assert [item.name for item in path.parent.iterdir()] == [path.name], "nothing is left beside the file"


@pytest.mark.behaviour("C1")
def test_the_store_is_read_once(path: Path) -> None:
    fill(path)
    statements: list[str] = []
    forgiving = ForgivingStore(PlanStore(path))
    assert forgiving.errata(HERE) == ()
    assert forgiving._quick is not None
    assert forgiving._quick._opened is not None
    forgiving._quick._opened.connection.set_trace_callback(statements.append)
    assert [forgiving.lookup(problem(n), POLICY, HERE) for n in NUMBERS] == [record(n) for n in NUMBERS]
    assert forgiving.errata(HERE) == ()
    assert statements == []
    forgiving.close()


@pytest.mark.parametrize("limit", ["MOST_ROWS", "MOST_BYTES"])
def test_a_store_too_large_to_be_held_is_read_key_by_key(
    path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    fill(path)
    for module in ("_forgiving", "_snapshot", "_store"):
        monkeypatch.setattr(f"convplan.{module}.{limit}", 5)
    with PlanStore(path) as store:
        assert quick(path).snapshot(HERE).rows is None
        assert store.snapshot(HERE).rows is None
        forgiving = ForgivingStore(store)
        assert [forgiving.lookup(problem(n), POLICY, HERE) for n in NUMBERS] == [record(n) for n in NUMBERS]


def test_a_store_that_is_not_there_is_empty_and_not_made_by_asking(path: Path) -> None:
    forgiving = ForgivingStore(PlanStore(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forgiving.lookup(problem(1), POLICY, HERE) is None
        assert not path.exists()
        forgiving.remember(record(1))
        assert forgiving.lookup(problem(1), POLICY, HERE) == record(1)
    forgiving.close()


# ---- the same answers as key by key


def _rewrite(path: Path, key: str, change: Callable[[str], object], *, sign: bool) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        (text,) = connection.execute("SELECT record FROM convplan_plans WHERE key = ?", (key,)).fetchone()
        new = change(text)
        values = (new, checksum_of(new) if sign and isinstance(new, str) else None, key)
        connection.execute(
            "UPDATE convplan_plans SET record = ?, checksum = coalesce(?, checksum) WHERE key = ?", values
        )


def _set(path: Path, key: str, column: str, value: object) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"UPDATE convplan_plans SET {column} = ? WHERE key = ?", (value, key))


BAD: dict[str, Callable[[Path, str], None]] = {
    "flipped digit": lambda path, key: _rewrite(path, key, lambda t: t.replace("12.5", "11.5"), sign=False),
    "cut short": lambda path, key: _rewrite(path, key, lambda t: t[:-9], sign=True),
    "number": lambda path, key: _rewrite(path, key, lambda t: 7, sign=False),
    "no utf-8": lambda path, key: _rewrite(path, key, lambda t: b"\xff\xfe", sign=False),
    "other problem": lambda path, key: _rewrite(
        path, key, lambda t: msgspec.json.encode(record(99)).decode(), sign=True
    ),
    "nested": lambda path, key: _rewrite(path, key, lambda t: "[" * 100_000, sign=True),
    "newer row": lambda path, key: _set(path, key, "schema", 99),
    "schema text": lambda path, key: _set(path, key, "schema", "new"),
    "environment of another": lambda path, key: _set(path, key, "environment", "{}"),
    "moved": lambda path, key: _set(path, key, "key", "f" * 32),
    "checksum gone": lambda path, key: _set(path, key, "checksum", ""),
    "older row": lambda path, key: _set(path, key, "schema", 1),
}


def test_whatever_rows_hold_both_ways_of_reading_answer_alike(path: Path) -> None:
    fill(path)
    keys = [record(number).key for number in NUMBERS]
    for key, spoil in zip(keys, BAD.values(), strict=True):
        spoil(path, key)
    with PlanStore(path) as one_by_one:
        expected = {number: one_by_one.get(record(number).key) for number in (*NUMBERS, 20)}
    usable = {number for number, found in expected.items() if found is not None}
    assert usable == {list(BAD).index("environment of another") + 1, list(BAD).index("older row") + 1}
    for source in (path, f"sqlite:///{path}"):
        forgiving = ForgivingStore(PlanStore(source))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvPlanWarning)  # about plans of another environment
            found = {number: forgiving.lookup(problem(number), POLICY, HERE) for number in expected}
        assert found == expected
        assert (forgiving._quick is not None) == (source is path), "bad rows put nobody off"
        forgiving.close()


def test_both_readers_see_the_same(path: Path) -> None:
    fill(path)
    reader = quick(path)
    with PlanStore(path) as store:
        for environment in (HERE, ELSEWHERE, Environment("cpu", ())):
            assert reader.snapshot(environment) == store.snapshot(environment)
        for key in (record(1).key, "f" * 32):
            assert reader.raw_row(key) == store.raw_row(key)
            assert reader.raw_part(key, "0" * 32) == store.raw_part(key, "0" * 32)
        choice = _forgiving.choice_key(problem(1), POLICY)
        assert reader.find_elsewhere(choice, HERE) == store.find_elsewhere(choice, HERE) == [ELSEWHERE]
    reader.close()


def test_plans_of_another_environment_are_reported_as_before(path: Path) -> None:
    fill(path)
    forgiving = ForgivingStore(PlanStore(path))
    with pytest.warns(ConvPlanWarning, match=r"another environment \(threads 4 -> 2\)"):
        assert forgiving.lookup(problem(20), POLICY, HERE) is None
    assert forgiving._quick is not None
    forgiving.close()


# ---- what others write meanwhile


def lookup(forgiving: ForgivingStore, number: int, effort: str = "measure") -> PlanRecord | None:
    return forgiving.lookup(problem(number), POLICY.replace(effort=effort), HERE)


def test_processes_share_what_they_find_while_they_run(path: Path) -> None:
    with PlanStore(path) as other:
        other.put(record(1, effort="instant", median_us=None))
        forgiving = ForgivingStore(PlanStore(path))
        assert lookup(forgiving, 2) is None
        other.put(record(2))
        assert lookup(forgiving, 2) == record(2)
        other.put(record(1))
        assert lookup(forgiving, 1) == record(1), "the snapshot's has too little effort"
        forgiving.remember(record(1, median_us=3.0))
        assert lookup(forgiving, 1) == record(1, median_us=3.0)
        forgiving.close()


def test_what_the_store_lacks_is_not_asked_for_until_something_was_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(path)
    asked: list[str] = []
    raw_row = QuickReader.raw_row

    def counting(self: QuickReader, key: str) -> Any:
        asked.append(key)
        return raw_row(self, key)

    monkeypatch.setattr(QuickReader, "raw_row", counting)
    forgiving = ForgivingStore(PlanStore(path))
    assert [lookup(forgiving, 30) for _ in range(3)] == [None] * 3
    assert asked == []
    with PlanStore(path) as other:
        other.put(record(30))
        assert lookup(forgiving, 30) == record(30)
        assert asked == [record(30).key]
        other.delete(key_prefix=record(30).key)
    assert lookup(forgiving, 30) is None
    forgiving.close()


@pytest.mark.parametrize("most", [_forgiving.MOST_ROWS, 2])
def test_all_plans_of_an_environment_are_given_at_once(path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    fill(path)
    BAD["flipped digit"](path, record(2).key)
    monkeypatch.setattr("convplan._snapshot.MOST_ROWS", most)
    forgiving = ForgivingStore(PlanStore(path))
    by_key = {one.key: one for one in forgiving.records(HERE)}
    assert by_key == {record(number).key: record(number) for number in NUMBERS if number != 2}
    assert forgiving.records(ELSEWHERE) != []
    assert lookup(forgiving, 1) == record(1)
    assert len(forgiving.records(HERE)) == len(by_key), "also those that were looked up"
    wrong = msgspec.structs.replace(record(1), planning_s=-1.0)  # no store takes it
    with pytest.warns(ConvPlanWarning, match="planning_s"):
        forgiving.remember(wrong)
    assert [one for one in forgiving.records(HERE) if one.key == wrong.key] == [wrong]
    forgiving.close()


def test_a_file_that_is_exchanged_is_opened_anew(path: Path, tmp_path: Path) -> None:
    fill(path)
    forgiving = ForgivingStore(PlanStore(path))
    assert lookup(forgiving, 1) == record(1)
    with PlanStore(tmp_path / "other.sqlite") as other:
        other.put(record(50))
    shutil.move(tmp_path / "other.sqlite", path)
    assert lookup(forgiving, 50) == record(50)
    path.unlink()
    assert lookup(forgiving, 51) is None
    forgiving.close()


def test_threads_use_one_reader(path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    fill(path)
    forgiving = ForgivingStore(PlanStore(path))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: lookup(forgiving, n), [*NUMBERS] * 8))
    assert found == [record(n) for n in NUMBERS] * 8
    forgiving.close()


FORK = """
import os, sys
from helpers.plans import *
from convplan._store import ForgivingStore, PlanStore
store = ForgivingStore(PlanStore(sys.argv[1]))
assert store.lookup(problem(1), POLICY, HERE) == record(1)
assert store._quick._opened is not None
child = os.fork()
if child == 0:
    status = 1
    try:
        assert store._quick._opened is None, "closed before the fork"
        assert store.lookup(problem(2), POLICY, HERE) == record(2)
        assert store.lookup(problem(1), POLICY, HERE) == record(1)
        status = 0
    finally:
        os._exit(status)
assert store.lookup(problem(1), POLICY, HERE) == record(1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_opens_its_own(path: Path) -> None:
    fill(path)
    run_python(FORK, path)


READ_BESIDE_A_WRITER = """
import sys
from helpers.plans import *
from convplan._store import ForgivingStore, PlanStore
store = ForgivingStore(PlanStore(sys.argv[1]))
print("ready", flush=True)
for line in iter(input, "end"):
    print(store.lookup(problem(int(line)), POLICY, HERE) == record(int(line)), flush=True)
assert "sqlalchemy" not in sys.modules
"""


@pytest.mark.behaviour("C2")
def test_a_reader_in_another_process_sees_each_plan_as_soon_as_it_is_written(path: Path) -> None:
    with start_python(READ_BESIDE_A_WRITER, path) as reader, PlanStore(path) as store:
        assert hear(reader) == "ready"
        for number in (1, 2, 3):
            store.put(record(number))
            say(reader, str(number))
            assert hear(reader) == "True"
        say(reader, "end")
        assert reader.wait(30) == 0


# ---- what puts it off


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: path.mkdir(), id="directory"),
        pytest.param(lambda path: path.write_bytes(b"something else" * 999), id="foreign-file"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty-file"),
        pytest.param(lambda path: path.symlink_to(path), id="loop"),
    ],
)
def test_anything_odd_is_left_to_the_other_way(path: Path, spoil: Callable[[Path], object]) -> None:
    spoil(path)
    reader = quick(path)
    with pytest.raises(Odd):
        reader.snapshot(HERE)
    with pytest.raises(Odd):
        reader.raw_row("0" * 32)


@pytest.mark.parametrize("value", ["3", "ten", "0"])
def test_a_store_of_another_schema_is_left_to_the_other_way(path: Path, value: str) -> None:
    fill(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE convplan_meta SET value = ?", (value,))
    with pytest.raises(Odd, match="schema"):
        quick(path).snapshot(HERE)
    forgiving = ForgivingStore(PlanStore(path))
    with pytest.warns(ConvPlanWarning, match=f"schema {value}, expected {_store.ROW_SCHEMA}"):
        assert lookup(forgiving, 1) is None


def test_the_reader_cannot_write(path: Path) -> None:
    fill(path)
    reader = quick(path)
    reader.snapshot(HERE)
    assert reader._opened is not None
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader._opened.connection.execute("DELETE FROM convplan_plans")
    reader.close()


def test_a_hostile_view_is_not_run(path: Path) -> None:
    """A file from elsewhere may hold anything, such as a view in a table's place."""
    fill(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("ALTER TABLE convplan_plans RENAME TO hidden")
        connection.execute(
            "CREATE VIEW convplan_plans AS SELECT key, choice_key, schema, environment, checksum, "
            "load_extension('x') AS record FROM hidden"
        )
    with pytest.raises(Odd):
        quick(path).raw_row(record(1).key)
