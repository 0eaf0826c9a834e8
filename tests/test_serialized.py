"""Serialized plans: stored with their plan or not at all, used only unaltered, and carried by plan files.

Children are real processes whose exit codes are asserted, and tests that write end on a `check()`.
"""

from __future__ import annotations

import base64
import contextlib
import os
import random
import sqlite3
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.plans import ELSEWHERE, HERE, POLICY, hear, problem, record, run_python, say, start_python

from convplan import _exchange, _forgiving, _serialized, _sqlite, _store
from convplan._errors import ConvPlanWarning, PlanFileError, SpecError, StoreError, StoreMismatch
from convplan._exchange import export_plans, import_plans
from convplan._plan import Evidence, PlanRecord
from convplan._policy import Policy
from convplan._serialized import Part, checksum_of_part, config_text, pack, unpack
from convplan._store import ForgivingStore, PlanStore
from convplan.engines.base import EngineConfig

CONFIG = record().config
OTHER = EngineConfig.of("aten", block=16)
PLAIN = bytes(range(256)) * 64
NOISE = random.Random(3).randbytes(50_000)


@pytest.fixture(autouse=True)
def _this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_exchange, _store):
        monkeypatch.setattr(module, "current_environments", lambda: (HERE,))
        monkeypatch.setattr(module, "registered_engines", lambda: ("aten", "fft"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plans.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[PlanStore]:
    with PlanStore(path, wait_s=0.2) as opened:
        yield opened


def two(number: int = 1) -> PlanRecord:
    """A record with two candidates that may run."""
    one = record(number)
    return msgspec.structs.replace(one, ranking=(*one.ranking, Evidence(config=OTHER, median_us=20.0)))


def check(store: PlanStore) -> _store.CheckReport:
    return store.check(engines=("aten", "fft"), here=[HERE])


def assert_clean(store: PlanStore, *, rows: int, serialized: int) -> None:
    report = check(store)
    assert (report.problems, report.integrity, report.rows, report.serialized) == ((), (), rows, serialized)


def edit(path: Path, sql: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        assert connection.execute(sql, values).rowcount == 1


# ---- with their plan or not at all


@pytest.mark.behaviour("C1")
def test_another_process_reads_back_what_was_serialized(path: Path) -> None:
    with PlanStore(path) as store:
        assert store.put(record(1), {CONFIG: PLAIN}) == "added"
        assert_clean(store, rows=1, serialized=1)
    printed = run_python(
        "import sys; from helpers.plans import *; from convplan._store import ForgivingStore, PlanStore\n"
        "store = ForgivingStore(PlanStore(sys.argv[1])); found = store.lookup(problem(1), POLICY, HERE)\n"
        "print(store.serialized(found, found.config).hex())\n"
        "assert 'sqlalchemy' not in sys.modules",
        path,
    )
    assert bytes.fromhex(printed) == PLAIN


def test_each_candidate_has_its_own(store: PlanStore) -> None:
    store.put(two(), {CONFIG: PLAIN, OTHER: NOISE})
    key = two().key
    assert (store.serialized(key, CONFIG), store.serialized(key, OTHER)) == (PLAIN, NOISE)
    assert store.serialized(key, EngineConfig.of("aten", block=9)) is None
    assert store.serialized(record(2).key, CONFIG) is None
    assert [part.provenance for part, _ in store.parts(key) if part is not None] == ["tuned here"] * 2
    assert_clean(store, rows=1, serialized=2)


def test_a_replaced_plan_loses_what_was_serialized_of_it(store: PlanStore) -> None:
    store.put(two(), {CONFIG: PLAIN, OTHER: NOISE})
    assert store.put(two(), {OTHER: PLAIN}) == "replaced"
    assert (store.serialized(two().key, CONFIG), store.serialized(two().key, OTHER)) == (None, PLAIN)
    assert store.put(record(1)) == "replaced"
    assert_clean(store, rows=1, serialized=0)


def test_a_kept_plan_keeps_its_own(store: PlanStore) -> None:
    store.put(record(1), {CONFIG: PLAIN})
    assert store.put(record(1, effort="instant"), {CONFIG: NOISE}) == "kept"
    assert store.put(record(1, median_us=9.0), {CONFIG: NOISE}, keep_equal=True) == "kept"
    assert store.serialized(record(1).key, CONFIG) == PLAIN
    assert_clean(store, rows=1, serialized=1)


def test_the_very_same_plan_gets_what_it_lacks(store: PlanStore) -> None:
    store.put(two(), {CONFIG: PLAIN})
    parts = [pack(two().key, CONFIG, NOISE), pack(two().key, OTHER, NOISE)]
    assert store.put_parts(two(), parts, keep_equal=True, dry_run=True) == ("kept", 1)
    assert store.put_parts(two(), parts, keep_equal=True) == ("kept", 1)
    assert store.put_parts(two(), parts, keep_equal=True) == ("kept", 0)
    assert (store.serialized(two().key, CONFIG), store.serialized(two().key, OTHER)) == (PLAIN, NOISE)
    assert_clean(store, rows=1, serialized=2)


def test_deleting_a_plan_deletes_them_and_no_others(store: PlanStore) -> None:
    for number in (1, 2):
        store.put(record(number), {CONFIG: PLAIN})
    assert store.delete(key_prefix=record(1).key, dry_run=True).removed == 1
    assert_clean(store, rows=2, serialized=2)
    assert store.delete(key_prefix=record(1).key).removed == 1
    assert store.serialized(record(2).key, CONFIG) == PLAIN
    assert_clean(store, rows=1, serialized=1)
    store.delete()
    assert_clean(store, rows=0, serialized=0)


def test_a_dry_put_writes_neither(store: PlanStore) -> None:
    assert store.put(record(1), {CONFIG: PLAIN}, dry_run=True) == "added"
    assert_clean(store, rows=0, serialized=0)


@pytest.mark.parametrize(
    ("serialized", "said"),
    [
        pytest.param({CONFIG: b""}, "has 0 bytes, expected 1 to 16777216", id="empty"),
        pytest.param({CONFIG: bytes(_serialized.MAX_PLAIN_BYTES + 1)}, "has 16777217 bytes", id="too-large"),
        pytest.param({OTHER: PLAIN}, "no candidate of", id="no-candidate"),
        pytest.param({EngineConfig.of("fft"): PLAIN}, "no candidate of", id="rejected-candidate"),
    ],
)
def test_what_cannot_be_stored_is_an_error_and_stores_nothing(
    store: PlanStore, serialized: dict[EngineConfig, bytes], said: str
) -> None:
    with pytest.raises(SpecError, match=said):
        store.put(record(1), serialized)
    assert_clean(store, rows=0, serialized=0)


def test_the_largest_is_stored_also_where_it_cannot_be_compressed(store: PlanStore) -> None:
    plain = os.urandom(_serialized.MAX_PLAIN_BYTES)
    store.put(record(1), {CONFIG: plain})
    assert store.serialized(record(1).key, CONFIG) == plain


def test_a_running_program_keeps_the_plan_whose_serialized_form_is_too_large(store: PlanStore) -> None:
    forgiving = ForgivingStore(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forgiving.remember(two(), {CONFIG: bytes(_serialized.MAX_PLAIN_BYTES + 1), OTHER: PLAIN})
    assert forgiving.unwritten == 0
    assert forgiving.serialized(two(), CONFIG) is None
    assert forgiving.serialized(two(), OTHER) == PLAIN


# ---- altered ones


def bomb() -> bytes:
    """64 MiB of zeros in 64 KiB."""
    return zlib.compress(bytes(64 * 2**20), 9)


def resigned(part: Part, **changes: Any) -> Part:
    """A changed part with the checksum that its maker would write."""
    new = msgspec.structs.replace(part, **changes)
    checksum = checksum_of_part(new.key, config_text(new.config), new.format, new.size, new.data)
    return msgspec.structs.replace(new, sha256=checksum)


GOOD = pack(record(1).key, CONFIG, PLAIN)
ALTERED = [
    pytest.param(msgspec.structs.replace(GOOD, data=GOOD.data[:-1] + b"?"), "altered: its bytes do not", id="byte"),
    pytest.param(msgspec.structs.replace(GOOD, data=b""), "altered: its bytes do not", id="no-bytes"),
    pytest.param(msgspec.structs.replace(GOOD, size=GOOD.size - 1), "altered: its bytes do not", id="size"),
    pytest.param(msgspec.structs.replace(GOOD, format="zstd"), "unknown format 'zstd'", id="format"),
    pytest.param(resigned(GOOD, size=100), "size is not the 100 bytes", id="says-less"),
    pytest.param(resigned(GOOD, size=10**6), "size is not the 1000000 bytes", id="says-more"),
    pytest.param(resigned(GOOD, data=bomb(), size=1000), "size is not the 1000 bytes", id="bomb"),
    pytest.param(resigned(GOOD, data=bomb(), size=64 * 2**20), "too large", id="honest-bomb"),
    pytest.param(resigned(GOOD, size=0), "too large", id="empty"),
    pytest.param(resigned(GOOD, size=-5), "too large", id="negative"),
    pytest.param(resigned(GOOD, data=b"plain"), "not packed as zlib", id="not-packed"),
    pytest.param(resigned(GOOD, data=GOOD.data + b"more"), "size is not", id="longer"),
    pytest.param(resigned(GOOD, data=GOOD.data[:-3]), "size is not", id="cut-short"),
]


@pytest.mark.parametrize(("part", "said"), ALTERED)
def test_altered_ones_are_not_unpacked(part: Part, said: str) -> None:
    plain, trouble = unpack(part)
    assert plain is None
    assert said in trouble


def test_a_bomb_is_not_unpacked_beyond_what_it_says() -> None:
    import tracemalloc

    part = resigned(GOOD, data=bomb(), size=1000)
    tracemalloc.start()
    try:
        assert unpack(part)[0] is None
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.behaviour("C1")
@pytest.mark.parametrize(("part", "said"), ALTERED)
def test_altered_rows_are_never_returned_and_named(path: Path, part: Part, said: str) -> None:
    with PlanStore(path) as store:
        store.put(record(1), {CONFIG: PLAIN})
        store.put(record(2), {CONFIG: PLAIN})
    edit(
        path,
        "UPDATE convplan_serialized SET format = ?, size = ?, checksum = ?, data = ? WHERE key = ?",
        part.format,
        part.size,
        part.sha256,
        part.data,
        record(1).key,
    )
    with PlanStore(path) as store:
        assert store.serialized(record(1).key, CONFIG) is None
        assert store.serialized(record(2).key, CONFIG) == PLAIN
        report = check(store)
        assert [one.key for one in report.problems] == [record(1).key]
        assert said in report.problems[0].reason
        assert str(CONFIG) in report.problems[0].reason
        assert store.get(record(1).key) == record(1), "the plan itself is in order"
        forgiving = ForgivingStore(store)
        with pytest.warns(ConvPlanWarning, match=rf"{record(1).key} is not used") as caught:
            assert [forgiving.serialized(record(1), CONFIG) for _ in range(2)] == [None, None]
        assert len(caught) == 1
        assert said in str(caught[0].message)
        assert forgiving.serialized(record(2), CONFIG) == PLAIN
        assert store.put_parts(record(1), [GOOD], keep_equal=True) == ("kept", 1), "the same plan repairs it"
        assert_clean(store, rows=2, serialized=2)


@pytest.mark.parametrize(
    ("column", "value"), [("data", "text"), ("data", None), ("size", "ten"), ("config", "{"), ("config", 7)]
)
def test_columns_of_other_types_are_named_too(path: Path, column: str, value: object) -> None:
    with PlanStore(path) as store:
        store.put(record(1), {CONFIG: PLAIN})
    if value is None:
        value = 0
    edit(path, f"UPDATE convplan_serialized SET {column} = ?", value)
    with PlanStore(path) as store:
        assert store.serialized(record(1).key, CONFIG) is None
        (found,) = check(store).problems
        assert "altered" in found.reason
        store.put(record(1), {CONFIG: PLAIN})
        assert_clean(store, rows=1, serialized=1)


def test_one_cannot_pose_as_that_of_another_plan_or_configuration(path: Path) -> None:
    with PlanStore(path) as store:
        store.put(two(1), {CONFIG: PLAIN, OTHER: NOISE})
        store.put(two(2), {CONFIG: NOISE})
    edit(path, "DELETE FROM convplan_serialized WHERE key = ? AND config = ?", two(1).key, config_text(OTHER))
    edit(
        path,
        "UPDATE convplan_serialized SET config_key = ?, config = ? WHERE key = ?",
        _serialized.config_key(OTHER),
        config_text(OTHER),
        two(1).key,
    )
    edit(path, "UPDATE convplan_serialized SET key = ? WHERE key = ?", record(3).key, two(2).key)
    with PlanStore(path) as store:
        assert store.serialized(two(1).key, OTHER) is None
        assert store.serialized(record(3).key, CONFIG) is None
        assert len(check(store).problems) == 2


# ---- older stores

SCHEMA_1 = """
CREATE TABLE convplan_meta (name VARCHAR(64) NOT NULL, value VARCHAR(255) NOT NULL, PRIMARY KEY (name));
CREATE TABLE convplan_plans (key VARCHAR(32) NOT NULL, choice_key VARCHAR(32) NOT NULL, schema INTEGER NOT NULL,
 environment TEXT NOT NULL, device VARCHAR(16) NOT NULL, effort VARCHAR(16) NOT NULL, engine VARCHAR(64) NOT NULL,
 version VARCHAR(64) NOT NULL, created VARCHAR(64) NOT NULL, checksum VARCHAR(64) NOT NULL, record TEXT NOT NULL,
 PRIMARY KEY (key));
CREATE INDEX ix_convplan_plans_choice_key ON convplan_plans (choice_key);
INSERT INTO convplan_meta VALUES ('schema', '1');
PRAGMA journal_mode=wal;
"""


def make_schema_1(path: Path, *numbers: int) -> None:
    """The file that convplan made before there were serialized plans."""
    from convplan._rows import row_of

    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(SCHEMA_1)
        for number in numbers:
            row = {**row_of(record(number)), "schema": 1}
            names = ", ".join(row)
            connection.execute(
                f"INSERT INTO convplan_plans ({names}) VALUES ({', '.join('?' * len(row))})", [*row.values()]
            )


def schema_of(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("SELECT value FROM convplan_meta WHERE name = 'schema'").fetchone()[0])


def test_an_older_store_is_read_as_it_is_and_upgraded_by_the_first_write(path: Path) -> None:
    make_schema_1(path, 1, 2)
    before = path.read_bytes()
    with PlanStore(path) as store:
        forgiving = ForgivingStore(store)
        assert forgiving.lookup(problem(1), POLICY, HERE) == record(1)
        assert forgiving.serialized(record(1), CONFIG) is None
        assert forgiving.errata(HERE) == ()
        assert store.get(record(2).key) == record(2)
        assert store.serialized(record(2).key, CONFIG) is None
        assert store.delete(key_prefix="-").removed == 0
        assert store.forget_errata() == 0
        assert_clean(store, rows=2, serialized=0)
        forgiving.close()
        store.close()
        assert (schema_of(path), path.read_bytes() == before) == ("1", True)
        assert store.put(record(3), {CONFIG: PLAIN}) == "added"
        assert forgiving.serialized(record(3), CONFIG) == PLAIN, "the reader that was open sees the upgrade"
        assert [row.record for row in store.rows()] == sorted(map(record, (1, 2, 3)), key=lambda one: one.key)
        assert_clean(store, rows=3, serialized=1)
    assert schema_of(path) == "2"


def test_an_older_store_that_is_read_only_still_answers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_schema_1(path, 1)
    monkeypatch.setitem(_sqlite.PRAGMAS, "query_only", "on")
    with PlanStore(path) as store:
        assert store.get(record(1).key) == record(1)
        assert_clean(store, rows=1, serialized=0)
        with pytest.raises(StoreError, match="read-only"):
            store.put(record(2), {CONFIG: PLAIN})
        assert store.get(record(1).key) == record(1)
    assert schema_of(path) == "1"


UPGRADE = """
from helpers.plans import *
from convplan._store import PlanStore
with PlanStore(sys.argv[1]) as store:
    assert store.get(record(1).key) == record(1)
    print("ready", flush=True)
    input()
    number = int(sys.argv[2])
    assert store.put(record(number), {record(number).config: bytes([number]) * 1000}) == "added"
"""


def test_processes_that_upgrade_at_once_lose_nothing(path: Path) -> None:
    make_schema_1(path, 1)
    writers = [start_python(UPGRADE, path, number) for number in (2, 3)]
    for writer in writers:
        assert hear(writer) == "ready"
    for writer in writers:
        say(writer)
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    with PlanStore(path) as store:
        assert [store.serialized(record(n).key, CONFIG) for n in (1, 2, 3)] == [None, b"\2" * 1000, b"\3" * 1000]
        assert_clean(store, rows=3, serialized=2)


# ---- several processes, read-only places, full disks

WRITE_SHARED = """
from helpers.plans import *
from convplan._store import PlanStore
own = int(sys.argv[2])
print("ready", flush=True)
input()
with PlanStore(sys.argv[1]) as store:
    for turn in range(12):
        plan = record(1 + turn % 3, median_us=float(own))
        assert store.put(plan, {plan.config: bytes([own]) * 30_000}) in ("added", "replaced")
"""


@pytest.mark.behaviour("C2")
def test_processes_writing_the_same_key_leave_a_plan_with_its_own_serialized_form(path: Path) -> None:
    writers = [start_python(WRITE_SHARED, path, own) for own in (1, 2)]
    for writer in writers:
        assert hear(writer) == "ready"
    for writer in writers:
        say(writer)
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    with PlanStore(path) as store:
        for number in (1, 2, 3):
            plan = store.get(record(number).key)
            assert plan is not None
            assert plan.median_us is not None
            assert store.serialized(plan.key, plan.config) == bytes([int(plan.median_us)]) * 30_000
        assert_clean(store, rows=3, serialized=3)


READ_AS_NOBODY = """
import os, sys, warnings
warnings.simplefilter("error")
from helpers.plans import *
import convplan._snapshot
from convplan._store import ForgivingStore, PlanStore
if os.getuid() == 0:
    os.setuid(65534)  # permissions do not bind root
store = ForgivingStore(PlanStore(sys.argv[1]))
found = [store.lookup(problem(n), POLICY, HERE) for n in (1, 2)]
assert found == [record(1), record(2)], found
assert [store.serialized(one, one.config) for one in found] == [bytes([1]) * 1000, bytes([2]) * 1000]
assert store.lookup(problem(3), POLICY, HERE) is None
assert "sqlalchemy" not in sys.modules
"""


@pytest.mark.behaviour("C6")
def test_a_read_only_place_serves_plans_and_their_serialized_forms(tmp_path_factory: pytest.TempPathFactory) -> None:
    import shutil
    import tempfile

    directory = Path(tempfile.mkdtemp(prefix="convplan-test-"))  # pytest's own are closed to other users
    try:
        path = directory / "plans.sqlite"
        with PlanStore(path) as store:
            for number in (1, 2):
                store.put(record(number), {CONFIG: bytes([number]) * 1000})
        path.chmod(0o444)
        directory.chmod(0o555)
        before = path.read_bytes()
        run_python(READ_AS_NOBODY, path)
        assert path.read_bytes() == before
        assert [item.name for item in directory.iterdir()] == [path.name]
    finally:
        directory.chmod(0o755)
        shutil.rmtree(directory)


def test_a_disk_that_fills_undoes_plan_and_serialized_form_and_planning_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PlanStore(path) as store:
        store.put(record(1), {CONFIG: PLAIN})
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
    # Room for the plan alone, so that it is the serialized form that does not fit.
    monkeypatch.setitem(_sqlite.PRAGMAS, "max_page_count", pages + 4)
    now = [0.0]
    with PlanStore(path) as store:
        with pytest.raises(StoreError, match="the disk or quota is full, so this write was undone"):
            store.put(record(2), {CONFIG: NOISE})
        assert store.get(record(2).key) is None
        assert_clean(store, rows=1, serialized=1)
        with pytest.raises(StoreError, match="full"):
            store.put(record(1, median_us=1.0), {CONFIG: NOISE})
        assert (store.get(record(1).key), store.serialized(record(1).key, CONFIG)) == (record(1), PLAIN)
        assert store.put(record(4)) == "added", "the plan alone has room"
        forgiving = ForgivingStore(store, clock=lambda: now[0])
        with pytest.warns(ConvPlanWarning, match="cannot be written: the disk or quota is full"):
            forgiving.remember(record(2), {CONFIG: NOISE})
        assert forgiving.unwritten == 1
        assert forgiving.lookup(problem(2), POLICY, HERE) == record(2)
        assert forgiving.serialized(record(2), CONFIG) == NOISE
        assert_clean(store, rows=2, serialized=1)
    monkeypatch.delitem(_sqlite.PRAGMAS, "max_page_count")
    now[0] = _forgiving.RETRY_AFTER_S
    forgiving.remember(record(3), {CONFIG: PLAIN})
    assert forgiving.unwritten == 0
    forgiving.close()
    with PlanStore(path) as store:
        assert [store.serialized(record(n).key, CONFIG) for n in (1, 2, 3)] == [PLAIN, NOISE, PLAIN]
        assert_clean(store, rows=4, serialized=3)


# ---- plan files


def exported(tmp_path: Path, **options: Any) -> Path:
    """A file of two plans, one of them for elsewhere, three serialized forms between them."""
    with PlanStore(tmp_path / "source.sqlite") as store:
        store.put(two(1), {CONFIG: PLAIN, OTHER: NOISE})
        there = record(2, environment=ELSEWHERE)
        store.put(there, {CONFIG: b"theirs"})
    file = tmp_path / "plans.json"
    export_plans(file, store=tmp_path / "source.sqlite", **options)
    return file


def spoilt(file: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = msgspec.json.decode(file.read_bytes())
    change(content)
    content.pop("content_sha256")
    file.write_bytes(msgspec.json.encode(content))
    return file


def test_a_file_carries_them_and_says_where_they_come_from(tmp_path: Path, path: Path) -> None:
    file = exported(tmp_path)
    report = import_plans(file, store=path)
    assert (report.added, report.elsewhere, report.serialized, report.refused) == (2, 1, 3, ())
    again = import_plans(file, store=path)
    assert (again.kept, again.serialized, again.refused) == (2, 0, ())
    content = msgspec.json.decode(file.read_bytes(), type=_exchange.PlanFile)
    assert len(content.content_sha256) == 64
    with PlanStore(path) as store:
        assert (store.serialized(two(1).key, CONFIG), store.serialized(two(1).key, OTHER)) == (PLAIN, NOISE)
        said = {part.provenance for part, _ in store.parts(two(1).key) if part is not None}
        made = f"imported from a file made by convplan {content.version} at {content.created}"
        assert said == {f"{made}, sha256 {content.content_sha256}"}
        assert_clean(store, rows=2, serialized=3)


def test_plans_for_another_machine_are_kept_for_it_and_not_used(tmp_path: Path, path: Path) -> None:
    import_plans(exported(tmp_path), store=path)
    with PlanStore(path) as store:
        forgiving = ForgivingStore(store)
        with pytest.warns(ConvPlanWarning, match="answers this problem for another environment"):
            assert forgiving.lookup(problem(2), POLICY, HERE) is None
        assert forgiving.serialized(record(2), CONFIG) is None
        there = forgiving.lookup(problem(2), POLICY, ELSEWHERE)
        assert there is not None
        assert forgiving.serialized(there, CONFIG) == b"theirs"


@pytest.mark.parametrize("side", ["export", "import"])
def test_they_can_be_left_out_and_added_later(tmp_path: Path, path: Path, side: str) -> None:
    file = exported(tmp_path, serialized=side == "import")
    assert (len(msgspec.json.decode(file.read_bytes())["serialized"]) == 3) == (side == "import")
    report = import_plans(file, store=path, serialized=False)
    assert (report.added, report.serialized, report.refused) == (2, 0, ())
    with PlanStore(path) as store:
        assert_clean(store, rows=2, serialized=0)
    report = import_plans(exported(tmp_path), store=path)
    assert (report.kept, report.serialized) == (2, 3)


def test_a_dry_import_says_the_same_and_writes_nothing(tmp_path: Path, path: Path) -> None:
    file = exported(tmp_path)
    report = import_plans(file, store=path, dry_run=True)
    assert (report.added, report.serialized) == (2, 3)
    with PlanStore(path) as store:
        assert_clean(store, rows=0, serialized=0)


def test_a_file_of_the_first_schema_is_still_read(tmp_path: Path, path: Path) -> None:
    file = tmp_path / "old.json"
    plans = msgspec.to_builtins(record(1))
    file.write_bytes(msgspec.json.encode({"format": "convplan-plans", "schema": 1, "plans": [plans]}))
    assert import_plans(file, store=path).added == 1


def test_a_file_of_a_newer_convplan_is_a_mismatch(tmp_path: Path, path: Path) -> None:
    file = spoilt(exported(tmp_path), lambda content: content.update(schema=3))
    with pytest.raises(StoreMismatch, match="schema 3, expected 2"):
        import_plans(file, store=path)


def test_an_altered_file_is_refused_as_a_whole(tmp_path: Path, path: Path) -> None:
    file = exported(tmp_path)
    text = file.read_bytes()
    file.write_bytes(text.replace(b'"median_us":12.5', b'"median_us":11.5'))
    assert file.read_bytes() != text
    with pytest.raises(PlanFileError, match=r"altered after it was written: content_sha256 is \w{64}.*nothing was"):
        import_plans(file, store=path)
    assert not path.exists()
    file.write_bytes(msgspec.json.format(text, indent=4))
    assert import_plans(file, store=path).added == 2, "spaces are no change"


def with_part(index: int, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["serialized"][index].update(changes)


def as_json(part: Part) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(part))
    return plain


@pytest.mark.parametrize(("part", "said"), ALTERED)
def test_import_refuses_altered_ones_and_takes_the_rest(tmp_path: Path, path: Path, part: Part, said: str) -> None:
    file = exported(tmp_path)
    found = msgspec.json.decode(file.read_bytes())["serialized"]
    mine = next(
        i for i, one in enumerate(found) if one["key"] == two(1).key and one["config"]["knobs"] == [["block", 8]]
    )
    spoilt(file, lambda content: content["serialized"].__setitem__(mine, as_json(part)))
    report = import_plans(file, store=path)
    assert (report.added, report.serialized) == (2, 2)
    ((name, reason),) = report.refused
    assert name == f"serialized[{mine}] {two(1).key} {CONFIG}"
    assert said in reason
    with PlanStore(path) as store:
        assert store.serialized(two(1).key, CONFIG) is None
        assert_clean(store, rows=2, serialized=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(with_part(0, data="not base64!"), "Invalid base64", id="no-base64"),
        pytest.param(with_part(0, run="rm"), "unknown field `run`", id="unknown-field"),
        pytest.param(with_part(0, size=1.5), "Expected `int`", id="fraction"),
        pytest.param(with_part(0, key="0" * 32), "its plan is not among those taken", id="other-plan"),
        pytest.param(with_part(0, key="\x1b[31m"), "its plan is not among those taken", id="escape"),
        pytest.param(
            with_part(0, config={"engine": "aten", "knobs": [["z", 1]]}), "no candidate of", id="no-candidate"
        ),
        pytest.param(with_part(0, version="\x1b"), "control characters", id="version"),
        pytest.param(with_part(0, created="x" * 65), "longer than", id="created"),
        pytest.param(
            lambda content: content["serialized"].append(content["serialized"][0]), "has one for this", id="twice"
        ),
        pytest.param(lambda content: content["serialized"].append([[[[]]]]), "Expected `object`", id="list"),
    ],
)
def test_import_says_why_it_refuses_one(
    tmp_path: Path, path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    file = spoilt(exported(tmp_path), change)
    report = import_plans(file, store=path)
    assert report.added == 2
    ((name, reason),) = report.refused
    assert name.startswith("serialized[")
    assert said in reason
    assert "\x1b" not in name + reason
    with PlanStore(path) as store:
        assert_clean(store, rows=2, serialized=report.serialized)


def test_a_refused_plan_takes_its_serialized_forms_with_it(tmp_path: Path, path: Path) -> None:
    file = exported(tmp_path)
    spoilt(file, lambda content: content["plans"][0].update(ranking=[]))
    report = import_plans(file, store=path)
    assert report.added == 1
    assert {name.partition("[")[0] for name, _ in report.refused} == {"plans", "serialized"}
    with PlanStore(path) as store:
        assert check(store).ok


def test_what_a_file_says_of_its_maker_is_cut_and_cleaned(tmp_path: Path, path: Path) -> None:
    file = spoilt(exported(tmp_path), lambda content: content.update(version="\x1b[31m" * 100, created="9" * 500))
    assert import_plans(file, store=path).refused == ()
    with PlanStore(path) as store:
        said = [part.provenance for part, _ in store.parts(two(1).key) if part is not None]
        assert all(len(text) <= _serialized.MAX_PROVENANCE and "\x1b" not in text for text in said)
        assert_clean(store, rows=2, serialized=3)


def test_export_leaves_altered_ones_out_and_says_so(tmp_path: Path, path: Path) -> None:
    file = exported(tmp_path)
    edit(tmp_path / "source.sqlite", "UPDATE convplan_serialized SET data = X'00' WHERE config = ?", config_text(OTHER))
    report = export_plans(file, store=tmp_path / "source.sqlite")
    assert (report.exported, report.serialized) == (2, 2)
    assert [key for key, _ in report.left_out] == [two(1).key]
    assert "altered" in report.left_out[0][1]


def test_the_bytes_in_a_file_are_plain_base64_of_zlib(tmp_path: Path) -> None:
    content = msgspec.json.decode(exported(tmp_path).read_bytes())
    plains = {zlib.decompress(base64.b64decode(part["data"])) for part in content["serialized"]}
    assert plains == {PLAIN, NOISE, b"theirs"}


def test_policy_is_part_of_what_they_belong_to(store: PlanStore) -> None:
    """A plan under another policy has another key, and so none of these bytes."""
    store.put(record(1), {CONFIG: PLAIN})
    strict = msgspec.structs.replace(record(1), policy=Policy(deterministic=True, allow_tf32=False))
    assert ForgivingStore(store).serialized(strict, CONFIG) is None
