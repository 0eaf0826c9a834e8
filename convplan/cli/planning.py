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
    from convplan._bench import BenchReport, Comparison, Timing, Total
    from convplan._bench_processes import BenchOptions
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


def bench(problems: Sequence[NamedProblem], policy: Policy, options: BenchOptions, *, out: Path | None) -> Result:
    """Time each problem against stock torch, in stock torch's own words, each side in a process of its own."""
    from convplan._bench_processes import run_bench

    if out is not None:
        _write(out, b"")  # a file that cannot be written is better known before the run than after it
    with Progress("timing") as progress:
        report = run_bench(problems, policy, options, progress=progress.step)
    if out is not None:
        _write(out, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    broken = [one for one in report.failures if one.side != "compile"]
    return Result("\n".join(_bench_lines(report)), msgspec.structs.asdict(report), ok=not broken)


def _write(file: Path, text: bytes) -> None:
    """Write a whole file; nothing to write only looks whether that would work, and leaves what is there."""
    try:
        with file.open("wb" if text else "ab") as opened:
            opened.write(text)
    except OSError as exc:
        raise PlanFileError(path=str(file), reason=f"cannot be written: {exc.strerror or exc}") from exc


def _bench_lines(report: BenchReport) -> list[str]:
    extra: dict[str, Side] = {}
    if any(one.compiled is not None for one in report.comparisons):
        extra["compile"] = "right"
    if any(one.regret is not None for one in report.comparisons):
        extra["regret"] = "right"
    columns = {**BENCH_COLUMNS, **extra, "note": BENCH_COLUMNS["note"]}
    order = [name for name in columns if name != "note"] + ["note"]
    rows = []
    for one in report.comparisons:
        cells = _bench_cells(one)
        rows.append(tuple(cells[name] for name in order))
    return [
        table({name: columns[name] for name in order}, rows),
        "",
        *map(_total_line, sorted(report.totals, key=lambda total: total.suite != "all")),
        *(
            f"loss: {one.name} {one.ratio:.3f}, {one.reason} ({one.problem})"
            for one in report.comparisons
            if one.is_loss
        ),
        *(f"failed: {one.name}: {one.side}: {one.error.partition(chr(10))[0]}" for one in report.failures),
        *report.environments,
    ]


def _total_line(total: Total) -> str:
    of = "" if total.suite == "all" else f"{total.suite or 'without a suite'}: "
    compiled = total.geometric_mean_compiled
    return (
        f"{of}geometric mean {total.geometric_mean:.3f} over {total.problems} problems, worst {total.worst:.3f}, "
        f"{total.below_0_98} below 0.98, {total.below_0_97} below 0.97"
        + ("" if compiled is None else f"; torch.compile / convplan {compiled:.3f}")
    )


def _bench_cells(one: Comparison) -> dict[str, str]:
    notes = (
        "loss" if one.is_loss else "",
        "" if one.from_plan else "not run by a plan",
        *(f"{who} timed by {side.how}" for who, side in _sides(one) if side.how == "events around launches"),
    )
    return {
        "problem": one.name,
        "chosen": one.chosen or "-",
        "stock": f"{human_us(one.stock.median_us)} ± {human_us(one.stock.spread_us)}",
        "convplan": f"{human_us(one.convplan.median_us)} ± {human_us(one.convplan.spread_us)}",
        "ratio": f"{one.ratio:.3f}",
        "compile": "-" if one.compiled is None else human_us(one.compiled.median_us),
        "regret": "-" if one.regret is None else f"{one.regret.median:.3f} worst {one.regret.worst:.3f}",
        "note": ", ".join(filter(None, notes)),
    }


def _sides(one: Comparison) -> list[tuple[str, Timing]]:
    return [("stock torch", one.stock), ("convplan", one.convplan)]


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
