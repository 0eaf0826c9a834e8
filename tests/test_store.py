"""The plan store: what comes back, what several processes do to it, and that no trouble loses anybody's row.

Children are real processes whose exit codes are asserted, and tests that write end on a clean `check()`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from helpers.plans import ELSEWHERE, HERE, POLICY, hear, problem, record, run_python, say, start_python

from convplan import _database, _sqlite, _store
from convplan._environment import Environment
from convplan._errors import ConvPlanWarning, SpecError, StoreBusy, StoreError, StoreMismatch
from convplan._key import choice_key, plan_key
from convplan._plan import PlanRecord
from convplan._policy import EFFORTS
from convplan._rows import checksum_of
from convplan._sqlite import Sqlite
from convplan._store import ForgivingStore, PlanStore, default_location, hide_password, satisfies

ENGINES = ("aten", "fft")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plans.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[PlanStore]:
    with PlanStore(path, wait_s=0.2) as opened:
        yield opened


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that another user can reach; `tmp_path` is closed to others."""
    directory = Path(tempfile.mkdtemp(prefix="convplan-test-"))
    directory.chmod(0o755)
    yield directory
    directory.chmod(0o755)
    shutil.rmtree(directory)


@contextlib.contextmanager
def one_warning(said: str) -> Iterator[None]:
    """Exactly one warning of ours is given inside, and it matches `said`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [warning.category for warning in caught] == [ConvPlanWarning]
    assert re.search(said, str(caught[0].message))


def check(store: PlanStore) -> _store.CheckReport:
    return store.check(engines=ENGINES, here=[HERE])


def assert_clean(store: PlanStore, *, rows: int) -> None:
    report = check(store)
    assert (report.problems, report.integrity, report.rows) == ((), (), rows)
    assert report.ok


def edit(path: Path, sql: str, *values: object) -> None:
    """Change the file behind the store's back; exactly one row must be hit."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        assert connection.execute(sql, values).rowcount == 1


def filled(path: Path, count: int = 3) -> list[str]:
    """A closed store file with plans 1 to `count`; returns their keys."""
    with PlanStore(path) as store:
        assert [store.put(record(n)) for n in range(1, count + 1)] == ["added"] * count
    return [record(n).key for n in range(1, count + 1)]


# ---- where it lies


def test_default_location_follows_the_variables(tmp_path: Path) -> None:
    assert default_location({"CONVPLAN_CACHE_DIR": str(tmp_path)}) == str(tmp_path / "plans.sqlite")
    assert default_location({"CONVPLAN_CACHE_DIR": "x", "CONVPLAN_STORE": "/a/b"}) == "/a/b"
    assert default_location({"CONVPLAN_STORE": "postgresql://h/d"}) == "postgresql://h/d"
    in_cache = default_location({"CONVPLAN_STORE": "", "CONVPLAN_CACHE_DIR": ""})
    assert Path(in_cache).name == "plans.sqlite"
    assert Path(in_cache).parent.name == "convplan"


def test_default_store_reads_the_variables_at_call_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVPLAN_STORE", raising=False)
    for name in ("first", "second"):
        monkeypatch.setenv("CONVPLAN_CACHE_DIR", str(tmp_path / name))
        assert PlanStore.default().location == str(tmp_path / name / "plans.sqlite")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://ann:s3cret@host/db", "postgresql+psycopg://ann:***@host/db"),
        ("mysql://ann:p@ss:word@host:3306/db", "mysql://ann:***@host:3306/db"),
        ("postgresql://host/db?user=ann&password=s3cret&x=1", "postgresql://host/db?user=ann&password=***&x=1"),
        ("sqlite:////tmp/a.sqlite", "sqlite:////tmp/a.sqlite"),
    ],
)
def test_location_hides_passwords(url: str, shown: str) -> None:
    assert hide_password(url) == shown
    assert PlanStore(url).location == shown


def test_importing_the_store_loads_neither_database_nor_torch() -> None:
    run_python("import sys, convplan._store; assert not {'sqlalchemy', 'sqlite3', 'torch'} & set(sys.modules)")


def test_missing_directories_are_made(tmp_path: Path) -> None:
    with PlanStore(tmp_path / "a" / "b" / "plans.sqlite") as store:
        assert store.put(record()) == "added"
    assert (tmp_path / "a" / "b" / "plans.sqlite").is_file()


def test_a_sqlite_url_is_the_same_store_as_its_path(path: Path) -> None:
    filled(path, 1)
    with PlanStore(f"sqlite:///{path}") as store:
        assert store.get(record().key) == record()
        assert_clean(store, rows=1)


def test_a_store_in_memory_works_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with PlanStore("sqlite://") as store:
        assert store.put(record()) == "added"
        assert store.get(record().key) == record()
    assert list(tmp_path.iterdir()) == []


# ---- what comes back


@pytest.mark.behaviour("C1")
def test_another_process_reads_back_what_was_stored(path: Path) -> None:
    (key,) = filled(path, 1)
    printed = run_python(
        "import sys, msgspec; from convplan._store import PlanStore\n"
        "print(msgspec.json.encode(PlanStore(sys.argv[1]).get(sys.argv[2])).decode())",
        path,
        key,
    )
    assert msgspec.json.decode(printed, type=PlanRecord) == record()


def test_a_key_that_is_not_there_is_none(store: PlanStore) -> None:
    assert store.get(record().key) is None
    assert list(store) == []
    assert_clean(store, rows=0)


def test_put_says_what_it_did(store: PlanStore) -> None:
    assert store.put(record(median_us=10.0)) == "added"
    assert store.put(record(median_us=9.0)) == "replaced"
    assert store.put(record(median_us=8.0), keep_equal=True) == "kept"
    found = store.get(record().key)
    assert found is not None
    assert found.median_us == 9.0
    assert_clean(store, rows=1)


def test_a_dry_put_decides_and_writes_nothing(store: PlanStore) -> None:
    assert store.put(record(), dry_run=True) == "added"
    assert store.get(record().key) is None
    store.put(record(effort="instant", median_us=None))
    assert store.put(record(), dry_run=True) == "replaced"
    found = store.get(record().key)
    assert found is not None
    assert found.effort == "instant"


@pytest.mark.behaviour("B21")
@pytest.mark.parametrize("first", EFFORTS)
@pytest.mark.parametrize("second", EFFORTS)
def test_more_effort_is_never_overwritten_by_less(store: PlanStore, first: str, second: str) -> None:
    store.put(record(effort=first))
    better = EFFORTS.index(second) >= EFFORTS.index(first)
    assert store.put(record(effort=second)) == ("replaced" if better else "kept")
    found = store.get(record().key)
    assert found is not None
    assert found.effort == max(first, second, key=EFFORTS.index)


def test_numbers_that_are_not_finite_are_stored_as_unknown(store: PlanStore) -> None:
    wrong = msgspec.structs.replace(record().rejected[0], error=float("inf"))
    store.put(msgspec.structs.replace(record(), rejected=(wrong,)))
    found = store.get(record().key)
    assert found is not None
    assert found.rejected[0].error is None
    assert_clean(store, rows=1)


def test_reasons_with_control_characters_are_stored_readable(store: PlanStore) -> None:
    store.put(record(reason="\x1b[31mfailed\x1b[0m\nline 2"))
    found = store.get(record().key)
    assert found is not None
    assert found.rejected[0].reason == "?[31mfailed?[0m\nline 2"
    assert_clean(store, rows=1)


def test_a_record_that_makes_no_sense_is_not_stored(store: PlanStore) -> None:
    with pytest.raises(SpecError, match=r"planning_s is -1\.0, expected a finite number of 0 or more"):
        store.put(msgspec.structs.replace(record(), planning_s=-1.0))
    assert_clean(store, rows=0)


def test_rows_lists_in_the_order_of_keys_page_by_page(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_store, "PAGE_ROWS", 2)
    plans = [record(1), record(2, engine="fft"), record(3), record(4, environment=ELSEWHERE)]
    for plan in plans:
        store.put(plan)
    assert [row.key for row in store] == sorted(plan.key for plan in plans)
    assert [row.record for row in store.rows(engine="FFT ")] == [plans[1]]
    assert [row.key for row in store.rows(key_prefix=plans[2].key[:8])] == [plans[2].key]
    assert list(store.rows(device="cuda")) == []
    assert list(store.rows(key_prefix="%")) == []


def test_delete_takes_what_the_filters_name_and_counts_it(store: PlanStore) -> None:
    for plan in (record(1), record(2, engine="fft"), record(3, environment=ELSEWHERE), record(4)):
        store.put(plan)
    assert store.delete(engine="fft", dry_run=True) == _store.Deleted(removed=1, left=0)
    assert_clean(store, rows=4)
    assert store.delete(engine="fft").removed == 1
    assert store.delete(not_in=[HERE]).removed == 1
    assert store.delete(key_prefix=record(4).key).removed == 1
    assert store.delete(device="cuda").removed == 0
    assert [row.record for row in store] == [record(1)]
    assert store.delete().removed == 1
    assert_clean(store, rows=0)


def test_rows_of_other_environments_are_in_order_and_counted(store: PlanStore) -> None:
    store.put(record(1))
    store.put(record(1, environment=ELSEWHERE))
    report = check(store)
    assert (report.ok, report.rows, report.elsewhere) == (True, 2, 1)


def test_find_elsewhere_names_the_other_environments(store: PlanStore) -> None:
    store.put(record(1))
    store.put(record(1, environment=ELSEWHERE))
    store.put(record(2, environment=ELSEWHERE))
    choice = choice_key(problem(1), POLICY)
    assert store.find_elsewhere(choice, HERE) == [ELSEWHERE]
    assert set(store.find_elsewhere(choice, Environment("cpu", ()))) == {HERE, ELSEWHERE}


def test_a_store_whose_making_was_interrupted_is_completed(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE convplan_meta (name VARCHAR(64) PRIMARY KEY, value VARCHAR(255) NOT NULL)")
    with PlanStore(path) as store:
        assert store.put(record()) == "added"
    with PlanStore(path) as store:
        assert_clean(store, rows=1)


# ---- rows that cannot be used: never used, named, left for their owner, replaced only by their own key


def _damage(path: Path, kind: str, key: str) -> None:
    text, checksum = _stored(path, key)
    other = msgspec.json.encode(record(9)).decode()
    wrong_type = text.replace('"planning_s":0.25', '"planning_s":"soon"')
    values = {
        "flipped digit": (text.replace("12.5", "11.5"), checksum),
        "cut short": (text[:-40], checksum),
        "no text": (7, checksum),
        "no utf-8": (b"\xff\xfe", checksum),
        "other problem": (other, checksum_of(other)),
        "wrong type": (wrong_type, checksum_of(wrong_type)),
        "nested": ("[" * 100_000, checksum_of("[" * 100_000)),
    }[kind]
    edit(path, "UPDATE convplan_plans SET record = ?, checksum = ? WHERE key = ?", *values, key)


def _stored(path: Path, key: str) -> tuple[str, str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT record, checksum FROM convplan_plans WHERE key = ?", (key,)).fetchone()
    return str(found[0]), str(found[1])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("flipped digit", "checksum"),
        ("cut short", "checksum"),
        ("no text", "checksum"),
        ("no utf-8", "checksum"),
        ("other problem", "the key does not belong to the record, whose key is " + record(9).key),
        ("wrong type", "Expected `float`, got `str` - at `$.planning_s`"),
        ("nested", "not a plan record"),
    ],
)
def test_corrupt_row_is_named_not_used_and_replaced_only_by_its_own_key(path: Path, kind: str, said: str) -> None:
    keys = filled(path)
    _damage(path, kind, keys[1])
    with PlanStore(path) as store:
        assert store.get(keys[1]) is None
        assert store.get(keys[0]) == record(1)
        report = check(store)
        assert [problem.key for problem in report.problems] == [keys[1]]
        assert said in report.problems[0].reason
        assert len(list(store)) == 3
        store.put(record(4))
        assert not check(store).ok
        assert store.put(record(2, effort="instant")) == "replaced"
        assert_clean(store, rows=4)


def test_damage_is_named_by_the_listing_too(path: Path) -> None:
    keys = filled(path)
    _damage(path, "flipped digit", keys[0])
    with PlanStore(path) as store:
        unusable = [row for row in store if row.record is None]
        assert [row.key for row in unusable] == [keys[0]]
        assert (unusable[0].engine, unusable[0].environment) == ("aten", HERE)
        assert store.delete(key_prefix=keys[0]).removed == 1
        assert_clean(store, rows=2)


def test_check_names_engines_nobody_knows(store: PlanStore) -> None:
    store.put(record(1))
    store.put(record(2, engine="quantum"))
    (found,) = check(store).problems
    assert found.key == record(2).key
    assert found.reason == "unknown engine 'quantum'; registered engines: aten, fft"


def test_row_of_a_newer_convplan_is_never_used_replaced_or_deleted(path: Path) -> None:
    keys = filled(path)
    edit(path, "UPDATE convplan_plans SET schema = 3, effort = 'cosmic', record = '?' WHERE key = ?", keys[0])
    with PlanStore(path) as store:
        assert store.get(keys[0]) is None
        assert store.put(record(1)) == "kept"
        assert [(row.key, row.schema, row.record) for row in store if row.trouble] == [(keys[0], 3, None)]
        assert [problem.key for problem in check(store).problems] == [keys[0]]
        assert store.delete() == _store.Deleted(removed=2, left=1)
        assert [row.key for row in store] == [keys[0]]


def test_row_of_an_older_convplan_is_used_and_replaced(path: Path) -> None:
    keys = filled(path)
    edit(path, "UPDATE convplan_plans SET schema = 1 WHERE key = ?", keys[0])
    with PlanStore(path) as store:
        assert store.get(keys[0]) == record(1)
        assert_clean(store, rows=3)
        assert store.put(record(1)) == "replaced"
        assert [row.schema for row in store] == [2, 2, 2]


# ---- files that are no plan store: an error that says so, and not one byte changed


def _make_directory(path: Path) -> None:
    path.mkdir()


def _make_truncated(path: Path) -> None:
    filled(path, 40)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _make_scrambled(path: Path) -> None:
    filled(path, 40)
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes(3 * 4096) + content[100 + 3 * 4096 :])


def _make_foreign_file(path: Path) -> None:
    path.write_text("these are not the plans you are looking for\n" * 400)


def _make_foreign_short(path: Path) -> None:
    path.write_text("note")


def _make_foreign_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE moz_places (id INTEGER PRIMARY KEY, url TEXT)")
        connection.execute("INSERT INTO moz_places (url) VALUES ('https://example.org')")
        connection.commit()


def _make_newer(path: Path) -> None:
    filled(path)
    edit(path, "UPDATE convplan_meta SET value = '3' WHERE name = 'schema'")


def _make_newer_with_other_tables(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE convplan_meta (name TEXT PRIMARY KEY, value TEXT)")
        connection.execute("INSERT INTO convplan_meta VALUES ('schema', 'ten')")
        connection.commit()
        connection.execute("PRAGMA journal_mode=wal")


TROUBLES = [
    pytest.param(_make_directory, StoreError, "is a directory, expected a file", id="directory"),
    pytest.param(_make_truncated, StoreError, "damaged or cut short; it is left as it is", id="truncated"),
    pytest.param(_make_scrambled, StoreError, "damaged or cut short; it is left as it is", id="scrambled"),
    pytest.param(_make_foreign_file, StoreError, "not a SQLite database", id="foreign-file"),
    pytest.param(_make_foreign_short, StoreError, "not a SQLite database", id="foreign-4-bytes"),
    pytest.param(_make_foreign_database, StoreError, r"something else \(tables moz_places\)", id="foreign-database"),
    pytest.param(_make_newer, StoreMismatch, "schema 3, expected 2; it is left as it is", id="newer-schema"),
    pytest.param(_make_newer_with_other_tables, StoreMismatch, "schema ten, expected 2", id="newer-tables"),
]


@pytest.mark.parametrize(("make", "error", "said"), TROUBLES)
def test_trouble_is_an_error_that_names_the_file_and_changes_nothing(
    path: Path, make: object, error: type[StoreError], said: str
) -> None:
    make(path)
    before = None if path.is_dir() else path.read_bytes()
    with PlanStore(path) as store:
        for action in (
            lambda: store.get(record().key),
            lambda: store.put(record(99)),
            lambda: store.delete(),
            lambda: list(store),
            lambda: store.check(engines=ENGINES, here=[HERE]),
        ):
            with pytest.raises(error, match=said) as caught:
                action()
            assert str(path) in str(caught.value)
            assert caught.value.path == str(path)
    if before is not None:
        assert path.read_bytes() == before
    assert sorted(item.name for item in path.parent.iterdir()) == [path.name]


@pytest.mark.parametrize(("make", "error", "said"), TROUBLES)
def test_trouble_while_convolutions_run_is_one_warning(
    path: Path, make: object, error: type[StoreError], said: str
) -> None:
    make(path)
    forgiving = ForgivingStore(PlanStore(path), clock=iter(range(0, 10**6, 60)).__next__)
    with one_warning(f"{re.escape(str(path))}.*{said}"):
        assert forgiving.lookup(problem(99), POLICY, HERE) is None
        forgiving.remember(record(99))
        assert forgiving.lookup(problem(99), POLICY, HERE) == record(99)
        assert forgiving.lookup(problem(98), POLICY, HERE) is None
        forgiving.remember(record(98))
    assert forgiving.unwritten == 2


def test_damage_inside_the_file_is_reported_by_check(path: Path) -> None:
    filled(path, 60)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'convplan_plans'").fetchone()
    content = bytearray(path.read_bytes())
    content[(page - 1) * 4096 : page * 4096] = b"\x55" * 4096
    path.write_bytes(content)
    with PlanStore(path) as store:
        report = check(store)
        assert not report.ok
        assert report.integrity
        with pytest.raises(StoreError, match="damaged"):
            store.get(record(1).key)
    assert path.read_bytes() == bytes(content)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense://host/db", "expected a file path or a SQLAlchemy database URL.*nonsense"),
        ("postgresql+nodriver://ann:s3cret@host/db", "expected a file path or a SQLAlchemy database URL"),
        ("sqlite:///a.sqlite?mode=ro", "takes no options"),
        ("://", "expected a file path or a SQLAlchemy database URL"),
    ],
)
def test_unusable_urls_say_so_without_the_password(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        PlanStore(url).get(record().key)
    assert "s3cret" not in str(caught.value)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"driver of this database is not installed.*psycopg"):
        PlanStore("postgresql+psycopg://ann:s3cret@localhost/db").get(record().key)


def test_a_file_in_the_way_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be opened: .*\(.*file\)"):
        PlanStore(tmp_path / "file" / "plans.sqlite").get(record().key)


# ---- read-only places: reading goes on

AS_NOBODY = """
import os, sys
from helpers.plans import *
from convplan._store import PlanStore
PlanStore("sqlite://").put(record())  # loads everything that another user may have no right to load
if os.getuid() == 0:
    os.setuid(65534)  # permissions do not bind root
from convplan._errors import StoreError
store = PlanStore(sys.argv[1])
print([store.get(record(n).key) == record(n) for n in (1, 2, 3, 4)], flush=True)
while (order := input()) != "end":
    try:
        found = store.put(record(4)) if order == "write" else store.get(record(int(order)).key) == record(int(order))
    except StoreError as exc:
        found = exc.reason
    print(found, flush=True)
store.close()
"""


@pytest.mark.parametrize("closed", ["directory and file", "directory", "file"])
def test_read_only_place_is_read_and_not_written(open_to_all: Path, closed: str) -> None:
    path = open_to_all / "plans.sqlite"
    filled(path)
    path.chmod(0o444 if "file" in closed else 0o666)
    open_to_all.chmod(0o555 if "directory" in closed else 0o777)
    before = path.read_bytes()
    with start_python(AS_NOBODY, path) as reader:
        assert hear(reader) == "[True, True, True, False]"
        say(reader, "write")
        assert "read-only" in hear(reader)
        say(reader, "end")
        assert reader.wait(30) == 0
    assert path.read_bytes() == before
    with PlanStore(path) as store:
        assert_clean(store, rows=3)


def test_read_only_place_sees_what_its_owner_writes_meanwhile(open_to_all: Path) -> None:
    path = open_to_all / "plans.sqlite"
    filled(path)
    path.chmod(0o444)
    open_to_all.chmod(0o555)
    with start_python(AS_NOBODY, path) as reader, PlanStore(path) as owner:
        assert hear(reader) == "[True, True, True, False]"
        path.chmod(0o644)
        open_to_all.chmod(0o755)
        for number in (4, 5):
            owner.put(record(number))
            say(reader, str(number))
            assert hear(reader) == "True"
        say(reader, "end")
        assert reader.wait(30) == 0
    with PlanStore(path) as store:
        assert_clean(store, rows=5)


# ---- locked and full

HOLD_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
input()
connection.execute("ROLLBACK")
"""


def test_locked_store_is_read_and_writers_are_told_how_long_they_waited(path: Path) -> None:
    filled(path)
    with start_python(HOLD_LOCK, path) as other, PlanStore(path, wait_s=0.2) as store:
        assert hear(other) == "locked"
        assert store.get(record(1).key) == record(1)
        with pytest.raises(StoreBusy, match=r"locked by another process for more than 0\.2 s") as caught:
            store.put(record(4))
        assert caught.value.waited_s == 0.2
        say(other)
        assert other.wait(30) == 0
        assert store.put(record(4)) == "added"
        assert_clean(store, rows=4)


def test_locked_store_costs_a_running_program_one_wait_and_one_warning(path: Path) -> None:
    filled(path)
    now = [0.0]
    with start_python(HOLD_LOCK, path) as other, PlanStore(path, wait_s=0.2) as store:
        assert hear(other) == "locked"
        forgiving = ForgivingStore(store, clock=lambda: now[0])
        with one_warning("cannot be written: locked by another process"):
            for number in (4, 5, 6):
                forgiving.remember(record(number))
            assert [forgiving.lookup(problem(n), POLICY, HERE) for n in (1, 4)] == [record(1), record(4)]
        say(other)
        assert other.wait(30) == 0
        forgiving.remember(record(7))
        assert forgiving.unwritten == 4
        now[0] = _store.RETRY_AFTER_S
        forgiving.remember(record(8))
        assert forgiving.unwritten == 0
        assert_clean(store, rows=8)


def _put_many(store: PlanStore, taken: list[int]) -> None:
    """Store plans 4, 5, … and note which were taken."""
    for number in range(4, 100):
        store.put(record(number))
        taken.append(number)


def test_full_disk_undoes_the_write_and_keeps_every_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    pages = path.stat().st_size // 4096
    monkeypatch.setitem(_sqlite.PRAGMAS, "max_page_count", pages + 2)
    taken: list[int] = []
    with PlanStore(path) as store:
        with pytest.raises(StoreError, match="the disk or quota is full, so this write was undone"):
            _put_many(store, taken)
        assert_clean(store, rows=3 + len(taken))
    monkeypatch.delitem(_sqlite.PRAGMAS, "max_page_count")
    with PlanStore(path) as store:
        assert store.put(record(100)) == "added"
        assert_clean(store, rows=3 + len(taken) + 1)


FILE_SIZE_LIMIT = """
import resource, sys
from helpers.plans import *
from convplan._errors import StoreError
from convplan._store import PlanStore
store = PlanStore(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (96 * 1024, 96 * 1024))
for number in range(4, 100):
    try:
        store.put(record(number))
    except StoreError as exc:
        print(number, exc.reason)
        break
assert all(store.get(record(n).key) == record(n) for n in range(1, number))
"""


def test_a_limit_of_the_operating_system_undoes_the_write_and_keeps_every_row(path: Path) -> None:
    filled(path)
    number, reason = run_python(FILE_SIZE_LIMIT, path).strip().split(maxsplit=1)
    assert "so this write was undone" in reason
    with PlanStore(path) as store:
        assert_clean(store, rows=int(number) - 1)


# ---- several processes

WRITE_MANY = """
import sys
from helpers.plans import *
from convplan._store import PlanStore
path, own, shared = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
input()
with PlanStore(path) as store:
    for number in range(shared):
        assert store.put(record(1000 * own + number)) == "added"
        assert store.put(record(1 + number, median_us=float(own))) in ("added", "replaced")
        assert store.get(record(1000 * own + number).key) is not None
        assert store.put(record(1 + number, effort="instant")) == "kept"
"""


@pytest.mark.behaviour("C2")
def test_processes_writing_own_and_shared_keys_at_once_lose_nothing(path: Path) -> None:
    writers = [start_python(WRITE_MANY, path, own, 12) for own in (1, 2, 3)]
    for writer in writers:
        assert hear(writer) == "ready"
    for writer in writers:  # the file does not exist yet: they also race for making it
        say(writer)
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    with PlanStore(path) as store:
        assert_clean(store, rows=4 * 12)
        assert {row.effort for row in store} == {"measure"}


WRITE_UNTIL_KILLED = """
import itertools, sys
from helpers.plans import *
from convplan._store import PlanStore
store = PlanStore(sys.argv[1])
for number in itertools.count(1):
    store.put(record(number))
    print(number, flush=True)
"""


@pytest.mark.behaviour("C1")
def test_killed_writer_loses_at_most_its_own_row(path: Path) -> None:
    with start_python(WRITE_UNTIL_KILLED, path) as writer, PlanStore(path) as other:
        written = [int(hear(writer)) for _ in range(20)]
        other.put(record(10**6))
        writer.send_signal(signal.SIGKILL)
        assert writer.stdout is not None
        rest = writer.stdout.read()  # not communicate(), which misses the lines that were read ahead
        assert writer.wait(timeout=30) == -signal.SIGKILL
        written += [int(line) for line in rest.split()]
    with PlanStore(path) as store:
        for number in (*written, 10**6):
            assert store.get(record(number).key) == record(number)
        rows = len(list(store))
        assert len(written) + 1 <= rows <= len(written) + 2
        assert_clean(store, rows=rows)


FORK = """
import os, sys, threading
from helpers.plans import *
from convplan._store import PlanStore
store = PlanStore(sys.argv[1])
store.put(record(1))
stop = threading.Event()
def use():
    while not stop.is_set():
        assert store.get(record(1).key) is not None
other = threading.Thread(target=use)
other.start()
children = []
for number in range(2, 6):
    child = os.fork()
    if child == 0:
        try:
            assert store.get(record(1).key) == record(1)
            assert store.put(record(number)) == "added"
            store.close()
        except BaseException as exc:
            print(repr(exc), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    children.append(child)
assert store.put(record(6)) == "added"
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
stop.set()
other.join()
store.close()
"""


def test_forked_children_use_the_store_their_parent_had_open(path: Path) -> None:
    run_python(FORK, path)
    with PlanStore(path) as store:
        assert_clean(store, rows=6)


def test_threads_share_one_store(store: PlanStore) -> None:
    failures: list[BaseException] = []

    def work(own: int) -> None:
        try:
            for number in range(8):
                store.put(record(100 * own + number))
                assert store.get(record(100 * own + number).key) is not None
        except BaseException as exc:  # reported by the test's own thread
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(own,)) for own in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert_clean(store, rows=24)


def test_losing_a_race_for_a_new_key_looks_again(store: PlanStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a database does not lock for writing at once, another process can insert between look and insert."""
    store.put(record(2))
    original = _database.Database.session
    calls = [0]

    @contextlib.contextmanager
    def session(self: _database.Database, *, write: bool = False) -> Iterator[object]:
        calls[0] += 1
        if calls[0] == 1:
            with PlanStore(path) as other:
                other.put(record(1, effort="measure"))
            raise _database.LostRace
        with original(self, write=write) as connection:
            yield connection

    monkeypatch.setattr(_database.Database, "session", session)
    assert store.put(record(1, effort="instant")) == "kept"


def test_a_store_deleted_while_open_is_begun_anew(path: Path) -> None:
    with PlanStore(path) as store:
        store.put(record(1))
        for file in path.parent.iterdir():
            file.unlink()
        assert store.get(record(1).key) is None
        assert store.put(record(2)) == "added"
    with PlanStore(path) as store:
        assert_clean(store, rows=1)


# ---- the forgiving store


@pytest.mark.behaviour("C1")
def test_forgiving_store_answers_what_another_one_remembered(path: Path) -> None:
    ForgivingStore(PlanStore(path)).remember(record(1))
    fresh = ForgivingStore(PlanStore(path))
    assert fresh.lookup(problem(1), POLICY, HERE) == record(1)
    assert fresh.lookup(problem(2), POLICY, HERE) is None
    assert fresh.unwritten == 0


@pytest.mark.parametrize("found", EFFORTS)
@pytest.mark.parametrize("wanted", EFFORTS)
def test_a_plan_answers_for_its_effort_and_less(store: PlanStore, found: str, wanted: str) -> None:
    store.put(record(1, effort=found))
    answer = ForgivingStore(store).lookup(problem(1), POLICY.replace(effort=wanted), HERE)
    assert (answer is not None) == satisfies(found, wanted) == (EFFORTS.index(found) >= EFFORTS.index(wanted))


@pytest.mark.behaviour("C2")
def test_another_environments_plans_are_not_used_and_reported_once(store: PlanStore) -> None:
    store.put(record(1, environment=ELSEWHERE))
    store.put(record(2, environment=ELSEWHERE))
    forgiving = ForgivingStore(store)
    with one_warning(rf"{re.escape(store.location)}.*another environment \(threads 4 -> 2\).*stay as they are"):
        assert forgiving.lookup(problem(1), POLICY, HERE) is None
        assert forgiving.lookup(problem(2), POLICY, HERE) is None
    forgiving.remember(record(1))
    assert forgiving.lookup(problem(1), POLICY, HERE) == record(1)
    assert store.get(record(1, environment=ELSEWHERE).key) == record(1, environment=ELSEWHERE)
    assert_clean(store, rows=3)


def test_plans_in_memory_are_not_replaced_by_less_effort(path: Path) -> None:
    path.mkdir()
    forgiving = ForgivingStore(PlanStore(path))
    with pytest.warns(ConvPlanWarning):
        forgiving.remember(record(1))
    forgiving.remember(record(1, effort="instant"))
    assert forgiving.lookup(problem(1), POLICY, HERE) == record(1)


def test_an_unstorable_record_is_used_in_memory_and_holds_up_no_other(store: PlanStore) -> None:
    wrong = msgspec.structs.replace(record(1), planning_s=-1.0)
    forgiving = ForgivingStore(store)
    with one_warning(r"planning_s is -1\.0"):
        forgiving.remember(wrong)
        forgiving.remember(record(2))
    assert forgiving.lookup(problem(1), POLICY, HERE) == wrong
    assert forgiving.unwritten == 1
    assert_clean(store, rows=1)


def test_forgiving_store_finds_the_default_store_at_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgiving = ForgivingStore()
    monkeypatch.delenv("CONVPLAN_STORE", raising=False)
    monkeypatch.setenv("CONVPLAN_CACHE_DIR", str(tmp_path / "cache"))
    forgiving.remember(record(1))
    forgiving.close()
    assert forgiving.location == str(tmp_path / "cache" / "plans.sqlite")
    with PlanStore.default() as store:
        assert_clean(store, rows=1)


def test_a_look_up_that_works_warns_of_nothing(store: PlanStore) -> None:
    store.put(record(1))
    forgiving = ForgivingStore(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forgiving.lookup(problem(1), POLICY, HERE) == record(1)
        assert forgiving.lookup(problem(2), POLICY, HERE) is None


# ---- other databases, and the errors SQLite has


@pytest.mark.parametrize("dialect", ["postgresql", "mysql", "mssql", "oracle"])
def test_tables_and_statements_are_understood_by_other_databases(dialect: str) -> None:
    from importlib import import_module

    import sqlalchemy as sa

    speaks = import_module(f"sqlalchemy.dialects.{dialect}").dialect()
    for table in _database.metadata.sorted_tables:
        assert "CREATE TABLE" in str(sa.schema.CreateTable(table).compile(dialect=speaks))
    for statement in (
        _database.one_row,
        _database.next_rows,
        _database.environments_of,
        _database.insert_row,
        _database.replace_row,
    ):
        assert "convplan_plans" in str(statement.compile(dialect=speaks))


@pytest.mark.parametrize("code", range(1, 27))
def test_every_sqlite_error_gets_a_name(path: Path, code: int) -> None:
    error = sqlite3.OperationalError("as SQLite says it")
    error.sqlite_errorcode = code | 0x0100  # an extended code
    named = _named(path, error)
    assert isinstance(named, StoreBusy) == (code in (Sqlite.BUSY, Sqlite.LOCKED))
    if code not in list(Sqlite):
        assert "as SQLite says it" in named.reason


@pytest.mark.parametrize(("words", "code"), _sqlite.SQLITE_WORDS.items())
def test_sqlite_errors_without_a_code_are_known_by_their_words(path: Path, words: str, code: Sqlite) -> None:
    with_code = sqlite3.OperationalError(words)
    with_code.sqlite_errorcode = int(code)
    assert str(_named(path, sqlite3.OperationalError(words))) == str(_named(path, with_code))


def _named(path: Path, error: sqlite3.Error) -> StoreError:
    database = _database.Database(url=None, path=path, shown=str(path))
    with pytest.raises(StoreError) as caught, database._named():
        raise error
    assert caught.value.path == str(path)
    assert caught.value.__cause__ is error
    return caught.value


def test_keys_are_recomputed_and_not_believed(store: PlanStore) -> None:
    plan = record(1)
    assert plan_key(plan.problem, plan.policy, plan.environment) == plan.key
    store.put(plan)
    moved = record(2).key
    edit(Path(store.location), "UPDATE convplan_plans SET key = ? WHERE key = ?", moved, plan.key)
    assert store.get(moved) is None
    assert store.get(plan.key) is None
    assert [problem.key for problem in check(store).problems] == [moved]
