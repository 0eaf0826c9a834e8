"""Ranks of a job use the same plan for a problem, which one of them tunes, and none of them waits for another's sake.

Two real processes on gloo run the scenarios of `helpers.ranks`. What a board makes of strangers' rows, of the dead and
of stores that fail is shown in one process, on torch's own stores and with a clock of our own.
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.fresh import fresh_process
from helpers.plans import ELSEWHERE, HERE, POLICY, problem, record, run_python
from helpers.ranks import Job, Scripted

import convplan
from convplan import ConvPlanWarning, Policy, PolicyError, _agreement, _ranks
from convplan._agreement import Agreement, agreement
from convplan._key import plan_key
from convplan._plan import PlanRecord
from convplan._ranks import Board, BoardGone
from convplan.engines.base import EngineConfig

Reports = list[dict[str, Any]]


@pytest.fixture(scope="module")
def _started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    with Job("cpu", tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.fixture
def job(_started: Job) -> Job:
    _started.renew()
    return _started


def summed(reports: Reports, counter: str) -> int:
    return sum(report["stats"][counter] for report in reports)


def agree(reports: Reports) -> bool:
    """Whether all ranks run every problem that they share by the very same record."""
    first, second = (report["chosen"] for report in reports)
    shared = first.keys() & second.keys()
    assert shared, "they have something in common"
    return all(first[text] == second[text] for text in shared)


# Two processes


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_training_has_one_plan_for_each_problem_tuned_once_and_equal_parameters(job: Job, scenario: str) -> None:
    reports = job.run(scenario)
    assert agree(reports)
    problems = reports[0]["chosen"]
    assert len(problems) == reports[0]["count"] // 2 * 3 - 1, "forward and both gradients, but for the first input's"
    assert all(effort == "measure" for _, effort, _ in problems.values())
    assert summed(reports, "tuned") == len(problems)
    assert summed(reports, "from_rank") >= len(problems)
    assert reports[0]["parameters"] == reports[1]["parameters"]
    assert [report["stored"] for report in reports] == [len(problems)] * 2, "each machine has them next time"


def test_ranks_that_share_a_store_tune_once_too(job: Job) -> None:
    reports = job.run("ddp", share_store=True)
    assert agree(reports)
    problems = reports[0]["chosen"]
    assert summed(reports, "tuned") == len(problems)
    assert [report["stored"] for report in reports] == [len(problems)] * 2


def test_ranks_that_do_not_agree_each_tune_and_choose_differently(job: Job) -> None:
    reports = job.run("ddp", ranks="alone")
    assert not agree(reports)
    assert summed(reports, "tuned") == 2 * len(reports[0]["chosen"])
    assert summed(reports, "from_rank") == 0
    assert reports[0]["parameters"] == reports[1]["parameters"], "the gradients are averaged all the same"


def test_a_straggler_finds_what_the_others_tuned(job: Job) -> None:
    reports = job.run("straggler")
    assert agree(reports)
    assert [report["tuned_here"] for report in reports] == [1, 0]
    assert reports[1]["stats"]["from_rank"] == 1
    assert reports[1]["stats"]["planned"] == 0


def test_a_rank_goes_on_untuned_while_another_is_held_up_in_tuning(job: Job) -> None:
    reports = job.run("busy")
    first = next(iter(reports[0]["chosen"].values()))
    assert agree(reports)
    assert first[:2] == [f"mine[index={Scripted.fastest(0)}]", "measure"]
    assert reports[1]["ran"] == [20, 0, 0, 0], "rank 0's own order, which rank 1 does not share"
    assert [report["stats"]["tuned"] for report in reports] == [1, 0]


def test_shapes_that_other_ranks_never_meet_hold_nobody_up(job: Job) -> None:
    reports = job.run("shapes")
    assert [report["total"] for report in reports] == [2.0, 2.0]
    assert agree(reports)
    assert summed(reports, "tuned") == 3, "the shared one once, and each rank's own"
    assert len({*reports[0]["chosen"], *reports[1]["chosen"]}) == 1 + 2 + 8


@pytest.mark.behaviour("B29")
def test_under_a_deterministic_policy_plans_never_change(job: Job) -> None:
    reports = job.run("deterministic")
    assert agree(reports)
    assert summed(reports, "tuned") == 3
    for report in reports:
        assert report["results"] == reports[0]["results"][:3] * 3
        assert {effort for _, effort, _ in report["chosen"].values()} == {"measure"}


@pytest.mark.parametrize(
    "changes",
    [
        {"effort": "instant"},
        {"deterministic": True},
        {"mode": "replay", "replay_miss": "instant"},
        {"tuning_limit_s": 0.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_untuned_plans_are_the_same_too(job: Job, changes: dict[str, Any]) -> None:
    reports = job.run("never_tuned", **changes)
    assert agree(reports)
    assert summed(reports, "tuned") == 0
    assert {effort for _, effort, _ in reports[0]["chosen"].values()} == {"instant"}
    alone = job.run("never_tuned", **changes, ranks="alone")
    assert not agree(alone)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("sure", [False, True], ids=["plans-may-change", "deterministic"])
def test_what_one_ranks_store_holds_does_not_break_agreement(job: Job, sure: bool, first: int) -> None:
    reports = job.run("own_stores", deterministic=sure, first=first)
    assert agree(reports)
    (choice,) = reports[0]["chosen"].values()
    tuned_by_then = not sure or first == 1
    assert choice[1] == ("measure" if tuned_by_then else "instant")


def test_strict_replay_asks_each_ranks_own_store_first(job: Job) -> None:
    assert [report["missed"] for report in job.run("strict_replay")] == [True, False]


def test_ranks_share_the_work_of_tuning_a_list(job: Job) -> None:
    reports = job.run("tune_together")
    assert agree(reports)
    assert summed(reports, "tuned") == 6
    assert all(report["stats"]["tuned"] for report in reports)
    assert all(report["in_order"] for report in reports)


def test_nonsense_on_the_board_is_told_once_and_ranks_still_agree(job: Job) -> None:
    reports = job.run("damaged")
    assert agree(reports)
    assert summed(reports, "tuned") == 1
    for report in reports:
        (warning,) = report["warned"]
        assert "is not used: it is no row of this convplan" in warning
        assert "\x1b" not in warning


def test_a_forked_child_does_not_use_its_parents_connections(job: Job) -> None:
    reports = job.run("forked")
    assert [report["child"] for report in reports] == ["None 1", "None 1"]
    assert agree(reports)


def test_a_rank_that_is_killed_while_tuning_leaves_its_work_to_the_others(job: Job) -> None:
    (report,) = job.run("killed", only=(0,))
    job.processes[1].join(10)
    assert job.processes[1].exitcode == -signal.SIGKILL
    assert report["stats"]["tuned"] == 2
    assert {effort for _, effort, _ in report["chosen"].values()} == {"measure"}
    assert report["calls"] > 1, "it went on meanwhile"


# One process: the board


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def store() -> Any:
    return dist.HashStore()


@pytest.fixture
def boards(store: Any) -> Iterator[Callable[..., Board]]:
    """Makes boards on one store, each as if it were in a process of its own."""
    made: list[Board] = []

    def make(clock: Callable[[], float] = time.monotonic, at: Any = store) -> Board:
        made.append(Board(lambda: at, len(made), 2, clock=clock))
        return made[-1]

    yield make
    for board in made:
        board.close()


def test_the_first_row_stays(boards: Callable[..., Board]) -> None:
    one, other = boards(), boards()
    assert one.read("x") is None
    assert one.publish("x", "first") == b"first"
    assert other.publish("x", "second") == b"first"
    assert other.read("x") == b"first"
    assert other.read("y") is None


def test_work_is_given_to_one_and_when_given_back_to_the_next(boards: Callable[..., Board]) -> None:
    one, other = boards(), boards()
    assert one.claim("x")
    assert one.claim("x"), "it has it already"
    assert not other.claim("x")
    assert other.claim("y")
    one.release("x")
    assert other.claim("x")
    assert not one.claim("x")


def test_many_ask_at_once_and_one_gets_it(boards: Callable[..., Board]) -> None:
    made = [boards() for _ in range(4)]
    for turn in range(20):
        won: list[bool] = []

        def ask(board: Board, name: str = str(turn), won: list[bool] = won) -> None:
            won.append(board.claim(name))

        threads = [threading.Thread(target=ask, args=(board,)) for board in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [False, False, False, True]


def test_the_work_of_the_dead_is_free_after_a_while_by_the_clock_of_who_asks(
    boards: Callable[..., Board], store: Any
) -> None:
    clock = Clock()
    dead, other = boards(clock), boards(clock)
    assert dead.claim("x")
    dead._held.clear()  # gives no sign of life any more
    assert not other.claim("x")
    clock.now_s += _ranks.EXPIRY_S - 0.1
    assert not other.claim("x")
    clock.now_s += 0.2
    assert other.claim("x")
    third = boards(clock)
    clock.now_s += 1000
    assert not third.claim("x"), "it has not looked for long enough itself"


def test_the_work_of_the_living_is_theirs_however_long_it_takes(
    boards: Callable[..., Board], store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ranks, "BEAT_S", 0.02)
    clock = Clock()
    alive, other = boards(clock), boards(clock)
    assert alive.claim("x")
    for _ in range(5):
        assert not other.claim("x")
        before = store.get(f"beat/{alive._token}")
        clock.now_s += _ranks.EXPIRY_S + 1
        deadline = time.monotonic() + 30
        while store.get(f"beat/{alive._token}") == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("claim", ["nobody", "x" * 5_000, b"\xff\xfe"], ids=["token", "long", "binary"])
def test_a_claim_that_nobody_here_made_is_free_after_a_while(
    boards: Callable[..., Board], store: Any, claim: str | bytes
) -> None:
    clock = Clock()
    board = boards(clock)
    store.set("claim/x", claim)
    assert not board.claim("x")
    clock.now_s += _ranks.EXPIRY_S + 1
    assert board.claim("x")


class Failing:
    """A store that fails, or never answers, once it is told to."""

    def __init__(self, store: Any, *, hangs: bool) -> None:
        self._store, self._hangs = store, hangs
        self.broken = False
        self.asked = 0
        self.let_go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.asked += 1
            if self.broken and self._hangs:
                self.let_go.wait(60)
            if self.broken:
                raise RuntimeError("Broken pipe\nand a long trace")
            return getattr(self._store, name)(*arguments)

        return call


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
def test_a_store_that_fails_costs_one_warning_and_is_left_alone(
    boards: Callable[..., Board], store: Any, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(store, hangs=hangs)
    board = boards(at=failing)
    place = agreed_place(board)
    mine = record(environment=HERE)
    assert board.claim("x")
    failing.broken = True
    monkeypatch.setattr(_ranks, "ANSWER_S", 0.3)
    with pytest.warns(ConvPlanWarning, match=r"rank 0: the job's key-value store fails \(\w+: [^\n]*\); from here on"):
        assert place.look("final") is None
    assert board.gone
    asked = failing.asked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert place.publish(mine, "final").record is mine
        with place.turn() as turn:
            assert turn.mine, "as if alone"
        with pytest.raises(BoardGone):
            board.claim("y")
    assert failing.asked == asked
    failing.let_go.set()


def test_a_store_that_cannot_be_connected_to_is_one_warning() -> None:
    def connect() -> Any:
        raise RuntimeError("no route to host")

    board = Board(connect, 3, 4)
    with pytest.warns(ConvPlanWarning, match=r"rank 3: .*RuntimeError: no route to host"), pytest.raises(BoardGone):
        board.read("x")


# One process: what is agreed


def agreed_place(board: Board, number: int = 1, *, environment: Any = HERE, **changes: Any) -> Agreement:
    return Agreement(board, (plan_key(problem(number), POLICY, environment),), "measure", **changes)


def test_a_record_arrives_whole(boards: Callable[..., Board]) -> None:
    mine = record()
    assert agreed_place(boards()).publish(mine, "final").record is mine
    found = agreed_place(boards()).look("final")
    assert found is not None
    assert found.record == mine
    assert agreed_place(boards(), 2).look("final") is None
    assert agreed_place(boards()).look("provisional") is None


def test_who_comes_second_gets_the_firsts_record(boards: Callable[..., Board]) -> None:
    first, second = agreed_place(boards()), agreed_place(boards())
    mine, yours = record(median_us=10.0), record(median_us=20.0)
    assert first.publish(mine, "final").record is mine
    assert second.publish(yours, "final").record == mine
    assert second.publish(yours, "provisional").record is yours, "another question"


def test_ranks_in_other_environments_share_nothing(boards: Callable[..., Board]) -> None:
    agreed_place(boards()).publish(record(), "final")
    assert agreed_place(boards(), environment=ELSEWHERE).look("final") is None


def test_a_record_that_is_too_large_goes_without_what_it_can_spare(boards: Callable[..., Board]) -> None:
    large = record(reason="x" * 50_000)
    large = msgspec.structs.replace(large, rejected=large.rejected * 10)
    agreed_place(boards()).publish(large, "final")
    found = agreed_place(boards()).look("final")
    assert found is not None
    assert found.record.config == large.config
    assert found.record.rejected == ()
    assert found.record.ranking[0].median_us == large.ranking[0].median_us


def _row(found: PlanRecord, **changes: Any) -> str:
    return json.dumps({**json.loads(_agreement._encoded(found)), **changes})


def _other_config(found: PlanRecord) -> PlanRecord:
    evil = msgspec.structs.replace(found.ranking[0], config=EngineConfig.of("aten", block=2**70))
    return msgspec.structs.replace(found, ranking=(evil,))


def _reencoded(found: PlanRecord) -> str:
    """A record that makes no sense, with the right checksum."""
    text = msgspec.json.encode(found).decode()
    return _row(record(), record=text, checksum=hashlib.sha256(text.encode()).hexdigest())


TAMPERED: dict[str, Callable[[], str | bytes]] = {
    "no-json": lambda: "nonsense",
    "binary": lambda: b"\x80\xff\x00",
    "empty": lambda: "{}",
    "deep": lambda: "[" * 100_000,
    "extra-field": lambda: _row(record(), more=1),
    "checksum": lambda: _row(record(), checksum="0" * 64),
    "edited": lambda: _row(record()).replace("12.5", "1.25"),
    "other-problem": lambda: _row(record(2)),
    "other-key": lambda: _row(record(2), key=record().key),
    "other-environment": lambda: _row(record(environment=ELSEWHERE)),
    "newer-schema": lambda: _row(record(), schema=99),
    "unknown-engine": lambda: _row(record(engine="nobody")),
    "negative-time": lambda: _reencoded(record(median_us=-1.0)),
    "huge-knob": lambda: _reencoded(_other_config(record())),
    "escape": lambda: _reencoded(msgspec.structs.replace(record(), version="\x1b[31m")),
    "too-long": lambda: _row(record()) + " " * _ranks.MOST_BYTES,
}


@pytest.mark.parametrize("tampered", TAMPERED)
def test_rows_from_strangers_are_checked_and_all_ranks_go_on_to_the_same_next_place(
    boards: Callable[..., Board], store: Any, tampered: str
) -> None:
    one, other = agreed_place(boards()), agreed_place(boards())
    store.set(f"row/{one._places('final')[0]}", TAMPERED[tampered]())
    with pytest.warns(ConvPlanWarning, match="what the job's key-value store holds as a plan is not used: ") as caught:
        assert one.look("final") is None
    assert str(caught[0].message).isprintable()
    mine = record(median_us=10.0)
    assert one.publish(mine, "final").record is mine
    with pytest.warns(ConvPlanWarning):
        assert other.publish(record(median_us=20.0), "final").record == mine


def test_who_asked_for_a_tuned_plan_passes_by_the_untuned_one_that_others_stay_with(
    boards: Callable[..., Board],
) -> None:
    untuned, tuned = record(effort="instant", median_us=None), record()
    agreed_place(boards()).publish(untuned, "final")
    asked = agreed_place(boards(), least="measure")
    assert asked.look("final") is None
    assert asked.publish(tuned, "final").record is tuned
    again = agreed_place(boards(), least="measure").look("final")
    assert again is not None
    assert again.record == tuned
    others = agreed_place(boards()).look("final")
    assert others is not None
    assert others.record == untuned


def test_a_turn_ends_when_tuning_fails_and_another_rank_has_the_next(boards: Callable[..., Board]) -> None:
    one, other = agreed_place(boards()), agreed_place(boards())

    def tune_in_vain() -> None:
        with one.turn() as turn:
            assert turn.mine
            with other.turn() as theirs:
                assert theirs == (False, None)
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        tune_in_vain()
    with other.turn() as theirs:
        assert theirs.mine


def test_who_waits_gets_the_record_and_who_waits_in_vain_does_not_wait_long_again(
    boards: Callable[..., Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_agreement, "IMPATIENCE_S", 0.0)
    one, patient, impatient = (agreed_place(boards()) for _ in range(3))
    mine = record()
    with one.turn():
        with impatient.turn(wait_s=0.05) as turn:
            assert turn == (False, None)
        with impatient.turn(wait_s=1e9) as turn:
            assert turn == (False, None)
        later = threading.Timer(0.2, one.publish, (mine, "final"))
        later.start()
        with patient.turn(wait_s=60.0) as turn:
            assert turn == (False, mine)
        later.join()


# One process: the policy, and where there is no job


@pytest.mark.parametrize("value", [None, True, "both"])
def test_a_policy_says_what_ranks_may_be(value: object) -> None:
    with pytest.raises(PolicyError, match=r"ranks is .*, expected one of agree, alone"):
        Policy(ranks=value)  # type: ignore[arg-type]


def test_agreement_is_not_part_of_what_a_plan_is() -> None:
    assert Policy(ranks="alone").key_items() == Policy().key_items()


def test_there_is_no_board_outside_of_a_job_and_in_a_job_of_one(tmp_path: Path) -> None:
    assert _ranks.current() is None
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        assert _ranks.current() is None
    finally:
        dist.destroy_process_group()
    assert _ranks.current() is None


@pytest.mark.parametrize("kind", ["hash", "file"])
def test_a_job_of_two_has_a_board_on_each_of_torchs_stores_while_it_lasts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.HashStore() if kind == "hash" else dist.FileStore(str(tmp_path / "store"), 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)  # the other rank never comes
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        board = _ranks.current()
        assert board is not None
        assert board is _ranks.current()
        assert agreement(None, problem(), Policy(ranks="alone").resolve(), HERE) is None
        place = agreement(None, problem(), POLICY, HERE)
        assert place is not None
        with place.turn() as turn:
            assert turn.mine
            place.publish(record(), "final")
        assert place.look("final") == (record(), "final")
        assert agreement(place, problem(), POLICY, HERE) is place
    finally:
        dist.destroy_process_group()
    assert _ranks.current() is None
    assert board.gone


def test_a_hit_asks_nothing_about_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Policy] = []
    monkeypatch.setattr(_agreement, "board_for", lambda policy: asked.append(policy))
    x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)
    with fresh_process(), convplan.enabled(Policy(effort="instant")):
        F.conv2d(x, w)
        assert asked
        asked.clear()
        for _ in range(5):
            F.conv2d(x, w)
        assert asked == []


def test_importing_convplan_does_not_import_torch_distributed() -> None:
    said = run_python("import sys, convplan._ranks as r; print(r.current(), 'torch' in sys.modules)")
    assert said.split() == ["None", "False"]
