"""The commands about planning and measuring: `tune`, `replay-check`, `bench` and `demo`.

They lay out what other modules find and time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from convplan._errors import ConvPlanError, PlanFileError, ReplayMiss
from convplan._policy import Policy
from convplan.cli.output import CommandError, Progress, Result
from convplan.report import curve_text, human_s, human_us, table

if TYPE_CHECKING:
    from convplan._bench import Comparison
    from convplan._plan import PlanRecord
    from convplan._problem_files import NamedProblem
    from convplan.cli.demo import Outcome
    from convplan.report import Side

TUNE_COLUMNS: dict[str, Side] = {
    "problem": "left",
    "chosen": "left",
    "time": "right",
    "planning": "right",
    "key": "left",
    "note": "left",
}
REPLAY_COLUMNS: dict[str, Side] = {
    "problem": "left",
    "chosen": "left",
    "effort": "left",
    "key": "left",
    "miss": "left",
}
BENCH_COLUMNS: dict[str, Side] = {
    "problem": "left",
    "chosen": "left",
    "stock": "right",
    "convplan": "right",
    "ratio": "right",
    "note": "left",
}
DEMO_COLUMNS: dict[str, Side] = {
    "uses": "right",
    "problem": "left",
    "chosen": "left",
    "convplan": "right",
    "stock": "right",
    "ratio": "right",
}
DEMO_PACKAGES = ("transformers", "skimage", "PIL")  # the extra `demo`, by the names they are imported by
KEY_SHOWN = 12  # digits of a key in tables: enough for `explain`


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """One problem of a tuning run; `error` is set when nothing runs it, and the fields after it are empty then."""

    name: str
    problem: str
    error: str = ""
    key: str = ""
    chosen: str = ""
    effort: str = ""
    median_us: float | None = None
    planning_s: float | None = None
    curve: tuple[tuple[float, float], ...] = ()


def tune(source: Callable[[], object] | Sequence[NamedProblem], policy: Policy, *, force: bool) -> Result:
    """Plan what a callable runs, or the problems of a file."""
    import convplan

    before = convplan.stats()
    begin = time.perf_counter()
    with Progress("tuning") as progress:
        if callable(source):
            tuned = _tune_callable(source, policy, force, progress)
        else:
            tuned = [
                _tune_one(named, policy, force, progress, index, len(source)) for index, named in enumerate(source)
            ]
    seconds = time.perf_counter() - begin
    after = convplan.stats()
    count = {name: after[name] - before[name] for name in ("planned", "tuned", "from_store")}
    failed = sum(bool(one.error) for one in tuned)
    summary = (
        f"{len(tuned)} problems: {count['tuned']} tuned, {count['from_store']} from the store"
        + (f", {failed} failed" if failed else "")
        + f", in {human_s(seconds)}"
    )
    rows = [
        (
            one.name or one.problem,
            one.chosen or "-",
            human_us(one.median_us),
            human_s(one.planning_s),
            one.key[:KEY_SHOWN] or "-",
            one.error.partition("\n")[0],
        )
        for one in tuned
    ]
    data = {"problems": tuned, "total": len(tuned), **count, "failed": failed, "seconds": seconds}
    curves = [f"{one.name or one.problem}\n{curve_text(one.curve)}" for one in tuned if one.curve]
    return Result("\n\n".join([table(TUNE_COLUMNS, rows), *curves, summary]), data, ok=not failed)


def _tune_callable(source: Callable[[], object], policy: Policy, force: bool, progress: Progress) -> list[Tuned]:
    import convplan

    def step(done: int, total: int, record: PlanRecord | None) -> None:
        progress.step(done, total, "" if record is None else str(record))

    return [_tuned("", record) for record in convplan.tune(source, policy=policy, force=force, progress=step)]


def _tune_one(named: NamedProblem, policy: Policy, force: bool, progress: Progress, index: int, total: int) -> Tuned:
    import convplan

    progress.step(index, total, named.name)
    try:
        record = convplan.tune([named.problem], policy=named.policy(policy), force=force)[0]
    except ConvPlanError as exc:  # the others of the file can still be planned
        return Tuned(name=named.name, problem=str(named.problem), error=str(exc))
    finally:
        progress.step(index + 1, total, named.name)
    return _tuned(named.name, record)


def _tuned(name: str, record: PlanRecord) -> Tuned:
    return Tuned(
        name=name,
        problem=str(record.problem),
        key=record.key,
        chosen=str(record.config),
        effort=record.effort,
        median_us=record.median_us,
        planning_s=record.planning_s,
        curve=record.curve,
    )


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """One problem that replay was asked about; `miss` says why there is no plan to replay, empty when there is one."""

    name: str
    problem: str
    miss: str = ""
    key: str = ""
    chosen: str = ""
    effort: str = ""


def replay_check(problems: Sequence[NamedProblem], policy: Policy) -> Result:
    """Whether a program in replay mode would find a plan for each problem, here and now. Plans and tunes nothing."""
    replay = policy.replace(mode="replay", replay_miss="error")
    answers = []
    with Progress("looking up") as progress:
        for index, named in enumerate(problems, start=1):
            answers.append(_replayed(named, replay))
            progress.step(index, len(problems), named.name)
    missing = [one for one in answers if one.miss]
    rows = [(one.name, one.chosen or "-", one.effort or "-", one.key[:KEY_SHOWN] or "-", one.miss) for one in answers]
    summary = f"{len(answers)} problems: {len(answers) - len(missing)} have a plan, {len(missing)} do not"
    data = {"problems": answers, "total": len(answers), "found": len(answers) - len(missing), "missing": len(missing)}
    return Result(f"{table(REPLAY_COLUMNS, rows)}\n\n{summary}", data, ok=not missing)


def _replayed(named: NamedProblem, policy: Policy) -> Replayed:
    import convplan

    try:
        record = convplan.plan(named.problem, named.policy(policy))
    except ReplayMiss:
        return Replayed(name=named.name, problem=str(named.problem), miss="not in the store")
    except ConvPlanError as exc:  # the others of the file can still be looked up
        return Replayed(name=named.name, problem=str(named.problem), miss=str(exc).partition("\n")[0])
    return Replayed(
        name=named.name,
        problem=str(named.problem),
        key=record.key,
        chosen=str(record.config),
        effort=record.effort,
    )


def bench(
    problems: Sequence[NamedProblem], policy: Policy, *, seconds: float, rounds: int | None, out: Path | None
) -> Result:
    """Time each problem against stock torch, in stock torch's own words."""
    from convplan._bench import bench_report, compare

    comparisons: list[Comparison] = []
    failures: list[tuple[str, str]] = []
    with Progress("timing") as progress:
        for index, named in enumerate(problems):
            progress.step(index, len(problems), named.name)
            try:
                comparisons.append(compare(named, policy, seconds=seconds, rounds=rounds))
            except ConvPlanError as exc:  # the others of the file can still be timed
                failures.append((named.name, str(exc)))
            progress.step(index + 1, len(problems), named.name)
    report = bench_report(comparisons, policy, devices=[named.problem.device for named in problems])
    if out is not None:
        try:
            out.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
        except OSError as exc:
            raise PlanFileError(path=str(out), reason=f"cannot be written: {exc.strerror or exc}") from exc
    lines = [
        table(BENCH_COLUMNS, [_bench_row(one) for one in comparisons]),
        "",
        f"geometric mean {report.geometric_mean:.3f} over {len(comparisons)} problems, {len(report.losses)} losses",
        *(f"loss: {one.name} {one.ratio:.3f} ({one.problem})" for one in comparisons if one.is_loss),
        *(f"failed: {name}: {reason.partition(chr(10))[0]}" for name, reason in failures),
        *report.environments,
    ]
    data = {
        **msgspec.structs.asdict(report),
        "failures": [{"name": name, "error": reason} for name, reason in failures],
    }
    return Result("\n".join(lines), data, ok=not failures)


def _bench_row(one: Comparison) -> tuple[str, ...]:
    notes = ("loss" if one.is_loss else "", "" if one.from_plan else "not run by a plan")
    return (
        one.name,
        one.chosen or "-",
        f"{human_us(one.stock.median_us)} ± {human_us(one.stock.spread_us)}",
        f"{human_us(one.convplan.median_us)} ± {human_us(one.convplan.spread_us)}",
        f"{one.ratio:.3f}",
        ", ".join(filter(None, notes)),
    )


def demo(names: tuple[str, ...], *, budget_s: float) -> Result:
    """Run the demonstration's workloads and lay out what they took, layer by layer and as a whole."""
    from convplan.cli.demo import run_demo

    with Progress("planning") as progress:
        try:
            outcomes = run_demo(
                names, progress=lambda name, done, total: progress.step(done, total, name), budget_s=budget_s
            )
        except ModuleNotFoundError as exc:
            if (exc.name or "").partition(".")[0] not in DEMO_PACKAGES:
                raise
            raise CommandError(f"the demo needs {exc.name}: pip install 'convplan[demo]'", type(exc).__name__) from exc
    data = {
        "workloads": outcomes,
        "tuned": sum(one.tuned for one in outcomes),
        "from_store": sum(one.from_store for one in outcomes),
        "planning_s": sum(one.planning_s for one in outcomes),
    }
    return Result("\n\n".join([*map(_demo_text, outcomes), _demo_summary(outcomes)]), data)


def _demo_text(outcome: Outcome) -> str:
    rows = [
        (
            f"{layer.uses}x",
            layer.problem,
            layer.chosen,
            human_us(layer.convplan_us),
            human_us(layer.stock_us),
            f"{layer.ratio:.2f}",
        )
        for layer in outcome.layers
    ]
    totals = [
        f"{total.what}: {human_s(total.convplan_ms / 1e3)}, stock torch {human_s(total.stock_ms / 1e3)}, "
        f"ratio {total.ratio:.2f} (median of {total.rounds})"
        for total in outcome.totals
    ]
    return "\n".join([outcome.title, table(DEMO_COLUMNS, rows), *totals])


def _demo_summary(outcomes: Sequence[Outcome]) -> str:
    tuned, stored = (sum(getattr(one, name) for one in outcomes) for name in ("tuned", "from_store"))
    took = human_s(sum(one.planning_s for one in outcomes))
    if not tuned:
        return f"Every plan came from the store: {stored} read, 0 tuned. Planning took {took}."
    return (
        f"{tuned} problems tuned, {stored} read from the store. Planning took {took}; the next run finds it all stored."
    )
