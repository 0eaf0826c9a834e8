"""Real distributed jobs for tests: processes that form process groups, run scenarios, and report what they did.

A `Job` starts one process for each rank, which stay alive from scenario to scenario, since importing torch takes longer
than any of them. The parent hosts the key-value store, as `torchrun` does. For every scenario the ranks form a new
process group, on gloo with CPU tensors or on NCCL with a GPU each, and a store of plans of their own.

On the CPU plans come from a scripted engine, whose fastest candidate is another one on each rank, and whose own order
is another one too: ranks that do not agree are bound to choose differently.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import convplan
from convplan import Policy, Problem, _agreement, _deciding, _environment, _ranks, _runtime
from convplan._choices import known
from convplan._planner import find_plans
from convplan.engines.fake import FakeCandidate, FakeEngine, VirtualClock
from helpers.fresh import fresh_process

PATIENCE_S = 60.0  # for one scenario, after which a hang is certain
CANDIDATES = 4
STEPS = 5


class Rank:
    """One process's view of the job that it is in while a scenario runs.

    Attributes:
        store: the job's key-value store, for signals among scenarios' ranks.
        engine: scripted; None on a GPU.
        before_planning: called with each problem that is about to be planned, and the effort.
    """

    def __init__(self, number: int, device: str, store: Any) -> None:
        self.number, self.store = number, store
        self.engine: Scripted | None = None
        self.before_planning: Callable[[Problem, str], object] = lambda problem, effort: None
        self.device = torch.device(device, number) if device == "cuda" else torch.device(device)

    def policy(self, **changes: Any) -> Policy:
        mine = {} if self.engine is None else {"engines": ("mine",)}
        return Policy(**{**mine, "deterministic": False, "allow_tf32": False, "budget_s": 0.05, **changes})

    def say(self, what: str) -> None:
        self.store.set(f"said/{what}", "yes")

    def hear(self, what: str) -> None:
        self.store.wait([f"said/{what}"], timedelta(seconds=PATIENCE_S / 2))

    def meet(self) -> float:
        """A collective of all ranks."""
        total = torch.ones((), device=self.device)
        dist.all_reduce(total)
        return float(total)

    def tensors(self, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(size)
        x, w = torch.randn(2, 4, size, size, generator=generator), torch.randn(4, 4, 3, 3, generator=generator)
        return x.to(self.device), w.to(self.device)

    def conv(self, size: int = 6) -> torch.Tensor:
        return F.conv2d(*self.tensors(size))


class Scripted(FakeEngine):
    """Each rank proposes its candidates in another order, and finds another one fastest."""

    def __init__(self, rank: int, clock: VirtualClock) -> None:
        times = [90.0] * CANDIDATES
        times[self.fastest(rank)] = 50.0
        super().__init__([FakeCandidate(time_us=time_us) for time_us in times], name="mine", clock=clock)
        self.rank = rank

    @staticmethod
    def fastest(rank: int) -> int:
        return 2 + rank % 2

    def configs(self, problem: Problem, effort: Any) -> Any:
        listed = list(super().configs(problem, effort))
        return [*listed[self.rank :], *listed[: self.rank]]


def chosen() -> dict[str, list[str]]:
    """What this process runs each problem by: its configuration, and a digest of the whole record."""
    kept = known.choices._kept
    records = [choice.record for choice in (() if kept is None else list(kept.values())) if choice.record is not None]
    return {
        str(record.problem): [
            str(record.config),
            record.effort,
            hashlib.sha256(msgspec.json.encode(record)).hexdigest(),
        ]
        for record in records
    }


def bits(tensors: Any) -> str:
    """All bits of some tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found.update(whole.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )


def train(rank: Rank, model: nn.Module, steps: int = STEPS) -> None:
    """Gradient descent on data that differs from rank to rank."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(rank.number)
    for _ in range(steps):
        images = torch.randn(2, 3, 8, 8, generator=generator).to(rank.device)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


# ---- scenarios: run by every rank, each returns what is to be compared


def ddp(rank: Rank, **changes: Any) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(
        small_model().to(rank.device), device_ids=[rank.number] if rank.device.type == "cuda" else None
    )
    with convplan.enabled(rank.policy(**changes)):
        train(rank, model)
        settle(rank, lambda: train(rank, model, 1))
    return {"parameters": bits(model.parameters()), "count": len(list(model.parameters()))}


def fsdp(rank: Rank, **changes: Any) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(rank.device.type, (dist.get_world_size(),))
    model = small_model().to(rank.device)
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with convplan.enabled(rank.policy(**changes)):
        train(rank, model)
        settle(rank, lambda: train(rank, model, 1))
    return {"parameters": bits(model.parameters()), "count": len(list(model.parameters()))}


def settle(rank: Rank, again: Callable[[], object], only: str = "") -> None:
    """Go on, on all ranks, until no problem runs untuned on any: they look for what others found now and then.

    Args:
        only: problems whose text has this in it.
    """
    for _ in range(200):
        left = [text for text, (_, effort, _) in chosen().items() if effort == "instant" and only in text]
        waiting = torch.tensor(float(bool(left))).to(rank.device)
        dist.all_reduce(waiting)
        if not waiting:
            return
        time.sleep(0.02)
        again()


def straggler(rank: Rank) -> dict[str, Any]:
    """Rank 1 begins when rank 0 has long finished, and nothing that rank 0 does depends on it."""
    with convplan.enabled(rank.policy()):
        if rank.number:
            rank.hear("finished")
        before = convplan.stats()["tuned"]
        for _ in range(1 if rank.number else 4):
            rank.conv()
        rank.say("finished")
    return {"tuned_here": convplan.stats()["tuned"] - before}


def busy(rank: Rank) -> dict[str, Any]:
    """Rank 0 does not come back from tuning before rank 1 has met the same problem many times."""

    def held_up(problem: Problem, effort: str) -> None:
        if effort != "instant":
            rank.say("tuning")
            rank.hear("went on")

    ran: list[int] = []
    with convplan.enabled(rank.policy()):
        if not rank.number:
            rank.before_planning = held_up
            for _ in range(3):
                rank.conv()
            rank.say("tuned")
        else:
            rank.hear("tuning")
            before = [] if rank.engine is None else list(rank.engine.runs)
            for _ in range(20):
                rank.conv()
            ran = [] if rank.engine is None else [new - old for old, new in zip(before, rank.engine.runs, strict=True)]
            rank.say("went on")
            rank.hear("tuned")
        settle(rank, rank.conv)
    return {"ran": ran}


def shapes(rank: Rank) -> dict[str, Any]:
    """Each rank meets shapes that no other meets, and one that all do, with a collective after every step."""
    with convplan.enabled(rank.policy()):
        for step in range(4):
            rank.conv(7 + rank.number)
            rank.conv(20 + 2 * step + rank.number)  # never again
            if rank.number != step % 2:
                rank.conv(6)
            total = rank.meet()
        settle(rank, lambda: rank.conv(6), only="x=2x4x6x6")
        settle(
            rank, lambda: rank.conv(7 + rank.number), only=f"x=2x4x{7 + rank.number}x"
        )  # those met once stay untuned
    return {"total": total}


def deterministic(rank: Rank) -> dict[str, Any]:
    """Tuned at first sight, by one; the plan never changes."""
    with convplan.enabled(rank.policy(deterministic=True, tune_after=1)):
        seen = [bits([rank.conv(size)]) for _ in range(3) for size in (5, 6, 7)]
    return {"results": seen}


def never_tuned(rank: Rank, **changes: Any) -> dict[str, Any]:
    """Untuned plans too are the same: each rank's own order is another one."""
    with convplan.enabled(rank.policy(**changes)):
        for _ in range(4):
            rank.conv(5)
            rank.conv(6)
    return {}


def own_stores(rank: Rank, **changes: Any) -> dict[str, Any]:
    """Rank 1 brings a tuned plan along, rank 0 does not; rank 0 comes first, or last."""
    first = changes.pop("first")
    if rank.number:
        convplan.tune(convplan.problem("fprop", *rank.tensors()), policy=rank.policy(**{**changes, "ranks": "alone"}))
        _runtime.forget()
        convplan.stats(reset=True)
    rank.meet()
    with convplan.enabled(rank.policy(**changes)):
        if rank.number != first:
            rank.hear("begun")
        rank.conv()
        rank.say("begun")
        rank.meet()
        for _ in range(3):
            rank.conv()
            time.sleep(0.1)  # longer than a rank that found nothing at first waits until it looks again
    return {}


def strict_replay(rank: Rank) -> dict[str, Any]:
    """Rank 1's store holds the plan, rank 0's does not, and comes second."""
    problem = convplan.problem("fprop", *rank.tensors())
    if rank.number:
        convplan.tune(problem, policy=rank.policy(ranks="alone"))
        _runtime.forget()
    rank.meet()
    missed = False
    with convplan.enabled(rank.policy(mode="replay")):
        if not rank.number:
            rank.hear("replayed")
        try:
            rank.conv()
        except convplan.ReplayMiss:
            missed = True
        rank.say("replayed")
    return {"missed": missed}


def tune_together(rank: Rank) -> dict[str, Any]:
    problems = [convplan.problem("fprop", *rank.tensors(size)) for size in range(5, 11)]
    records = convplan.tune(problems, policy=rank.policy())
    return {"in_order": [record.problem for record in records] == problems}


def damaged(rank: Rank) -> dict[str, Any]:
    """Somebody has written nonsense to where the first rows would be."""
    if not rank.number:
        known = _ranks.current()
        assert known is not None
        policy = rank.policy().resolve()
        problem = convplan.problem("fprop", *rank.tensors())
        here = _environment.current(problem.device)
        place = _agreement.agreement(None, problem, policy, here)
        assert place is not None
        for kind in ("final", "provisional"):
            known.publish(place._places(kind)[0], '{"key": "\\u001b[31m", "schema": 2}')
    rank.meet()
    with warnings.catch_warnings(record=True) as caught, convplan.enabled(rank.policy()):
        warnings.simplefilter("always")
        for _ in range(4):
            rank.conv()
            rank.meet()
        settle(rank, rank.conv)
    return {"warned": [str(one.message) for one in caught if issubclass(one.category, convplan.ConvPlanWarning)]}


def forked(rank: Rank) -> dict[str, Any]:
    """A forked child, as a data loader's worker is, chooses alone: the connections are its parent's."""
    assert _ranks.current() is not None
    torch.set_num_threads(1)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            board = _ranks.current()
            with convplan.enabled(rank.policy(tune_after=1)):
                rank.conv()
            os.write(writer, f"{board} {convplan.stats()['tuned']}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reader, 100).decode()
    with convplan.enabled(rank.policy()):
        rank.conv()
    return {"child": said}


def killed(rank: Rank) -> dict[str, Any]:
    """Rank 1 is killed while it tunes two problems, one of them under a policy whose plans never change."""
    sure, unsure = rank.policy(deterministic=True, tune_after=1), rank.policy(tune_after=1)
    if rank.number:
        both = threading.Barrier(2)

        def last_words(problem: Problem, effort: str) -> None:
            both.wait(PATIENCE_S / 2)
            rank.say("tuning")
            os.kill(os.getpid(), signal.SIGKILL)

        def work(size: int, policy: Policy) -> None:
            if rank.device.type == "cuda":
                torch.cuda.set_device(rank.device)
            convplan.conv2d(*rank.tensors(size), policy=policy)

        rank.before_planning = last_words
        threads = [threading.Thread(target=work, args=arguments) for arguments in ((5, sure), (6, unsure))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rank.hear("tuning")
    calls = 0
    until_s = time.monotonic() + PATIENCE_S / 2
    while not any(effort == "measure" for _, effort, _ in chosen().values()):
        convplan.conv2d(*rank.tensors(6), policy=unsure)
        calls += 1
        assert time.monotonic() < until_s
        time.sleep(0.02)
    convplan.conv2d(*rank.tensors(5), policy=sure)
    return {"calls": calls}


def board_cost(rank: Rank) -> dict[str, Any]:
    """Microseconds that a question to the board takes, the thread it goes through included."""
    board = _ranks.current()
    assert board is not None
    row = "x" * 10_000
    questions: dict[str, Callable[[str], object]] = {
        "read nothing": board.read,
        "publish 10 kB": lambda name: board.publish(name, row),
        "read 10 kB": board.read,
        "claim": board.claim,
    }
    taken: dict[str, list[float]] = {what: [] for what in questions}
    for turn in range(200):
        for what, ask in questions.items():
            begin = time.perf_counter()
            ask(f"{rank.number}/{turn}")
            taken[what].append(1e6 * (time.perf_counter() - begin))
    return {"median_us": {what: round(sorted(times)[len(times) // 2], 1) for what, times in taken.items()}}


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    one.__name__: one
    for one in (
        ddp,
        fsdp,
        straggler,
        busy,
        shapes,
        deterministic,
        never_tuned,
        own_stores,
        strict_replay,
        tune_together,
        damaged,
        forked,
        killed,
        board_cost,
    )
}


# ---- the processes


def _serve(number: int, count: int, device: str, port: int, pipe: Any) -> None:
    """A rank's process: run scenarios until told to stop."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(number)
    if device == "cpu":  # torch's own collectives on a GPU may warn of what is none of our business
        warnings.simplefilter("error")
    warnings.simplefilter("default", convplan.ConvPlanWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    server = dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=PATIENCE_S))
    while (order := pipe.recv()) is not None:
        name, serial, folder, options = order
        try:
            pipe.send(
                ("done", _run(name, dist.PrefixStore(str(serial), server), number, count, device, folder, options))
            )
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))


def _run(
    name: str, store: Any, number: int, count: int, device: str, folder: str, options: dict[str, Any]
) -> dict[str, Any]:
    whose = "all" if options.pop("share_store", False) else number
    os.environ["CONVPLAN_STORE"] = str(Path(folder, f"plans-{whose}.sqlite"))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=number,
        world_size=count,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    try:
        rank = Rank(number, device, store)
        with fresh_process(), _watched(rank), _short_expiry() if name == "killed" else nullcontext():
            found = SCENARIOS[name](rank, **options)
            stored = known.store().records(_environment.current(device))
            return {**found, "stats": convplan.stats(), "chosen": chosen(), "stored": len(stored)}
    finally:
        dist.destroy_process_group()


@contextmanager
def _short_expiry() -> Iterator[None]:
    """The dead are missed soon. Ten times the beat, as without this."""
    before = _ranks.EXPIRY_S, _ranks.BEAT_S
    _ranks.EXPIRY_S, _ranks.BEAT_S = 2.0, 0.2
    try:
        yield
    finally:
        _ranks.EXPIRY_S, _ranks.BEAT_S = before


@contextmanager
def _watched(rank: Rank) -> Iterator[None]:
    """Planning tells the rank before it begins; on the CPU it has the scripted engine, and goes by its clock."""
    find = find_plans
    if rank.device.type == "cpu":
        clock = VirtualClock()
        rank.engine = Scripted(rank.number, clock)
        convplan.register_engine(rank.engine)
        find = functools.partial(find_plans, clock=clock)

    def told(problem: Problem, policy: Policy, environment: Any, *, effort: Any, **rest: Any) -> Any:
        rank.before_planning(problem, effort)
        return find(problem, policy, environment, effort=effort, **rest)

    _deciding.find_plans = told
    try:
        yield
    finally:
        _deciding.find_plans = find_plans


class Job:
    """Processes of one job, and the key-value store among them.

    Args:
        device: `cpu` or `cuda`.
        folder: for their stores of plans.
        count: of ranks.
    """

    def __init__(self, device: str, folder: Path, count: int = 2) -> None:
        self._server = dist.TCPStore(
            "127.0.0.1", 0, None, True, timeout=timedelta(seconds=PATIENCE_S), wait_for_workers=False
        )
        self._folder, self._device, self._count = folder, device, count
        self._serial = 0
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for number in range(count):
            self._start(number)

    def _start(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        arguments = (number, self._count, self._device, self._server.port, theirs)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self.pipes[number : number + 1] = [mine]
        self.processes[number : number + 1] = [process]

    def renew(self) -> None:
        """Start those ranks again that have ended."""
        for number, process in enumerate(self.processes):
            if not process.is_alive():
                self._start(number)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    def run(self, name: str, *, only: tuple[int, ...] | None = None, **options: Any) -> list[dict[str, Any]]:
        """Run a scenario on every rank and return what each reports; those not in `only` are not waited for.

        Raises:
            AssertionError: a rank failed, or has not ended after twice `PATIENCE_S`.
        """
        self._serial += 1
        folder = self._folder / str(self._serial)
        folder.mkdir()
        for pipe in self.pipes:
            pipe.send((name, self._serial, str(folder), options))
        until = time.monotonic() + 2 * PATIENCE_S  # the processes may have to start first
        answers: list[Any] = []
        for number, pipe in enumerate(self.pipes):
            if only is not None and number not in only:
                continue
            assert pipe.poll(max(0.0, until - time.monotonic())), f"rank {number} hangs in {name}"
            answers.append(pipe.recv())
        failures = [text for kind, text in answers if kind == "failed"]
        assert not failures, "\n".join(failures)
        return [found for _, found in answers]
