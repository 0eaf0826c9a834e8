"""The commands about stored plans: `list`, `explain`, `verify`, `export`, `import`, `check`, `clear`.

All work on the store that the environment variables name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from convplan._errors import ConvPlanError, StoreError, WrongResult
from convplan._store import PlanStore, StoredRow, current_environments, showable
from convplan.cli.output import Progress, Result
from convplan.cli.planning import KEY_SHOWN
from convplan.report import group_rejected, human_us, stock_torch, table

if TYPE_CHECKING:
    from convplan._environment import Environment
    from convplan._plan import PlanRecord
    from convplan._problem import Problem
    from convplan._serialized import Part
    from convplan.report import Side

LIST_COLUMNS: dict[str, Side] = {
    "key": "left",
    "problem": "left",
    "chosen": "left",
    "time": "right",
    "effort": "left",
    "environment": "left",
    "created": "left",
}
VERIFY_COLUMNS: dict[str, Side] = {
    "key": "left",
    "problem": "left",
    "config": "left",
    "error": "right",
    "result": "left",
}


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """One stored plan. `environment` is `here`, `elsewhere`, or `unknown` where torch cannot say what here is."""

    key: str
    problem: str
    engine: str
    chosen: str
    median_us: float | None
    effort: str
    environment: str
    created: str
    version: str
    trouble: str


class Compiled(msgspec.Struct, frozen=True, kw_only=True):
    """One serialized plan beside a stored one: which candidate's, how large, and where it comes from."""

    config: str
    size_bytes: int
    version: str
    created: str
    provenance: str
    trouble: str


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """One re-checked plan: the largest error over what the arithmetic allows, or why the check failed."""

    key: str
    problem: str
    config: str
    error: float | None
    scope: str
    reason: str
    ok: bool


def list_plans(*, key_prefix: str, engine: str | None, device: str | None) -> Result:
    """Every stored plan, usable or not."""
    here = _environments()
    with PlanStore.default() as store:
        found = [_listed(row, here) for row in store.rows(key_prefix=key_prefix, engine=engine, device=device)]
    rows = [
        (
            one.key[:KEY_SHOWN],
            one.problem or "-",
            one.chosen,
            human_us(one.median_us),
            one.effort,
            f"unusable: {one.trouble}" if one.trouble else one.environment,
            one.created,
        )
        for one in found
    ]
    summary = f"{len(found)} plans in {store.location}"
    text = f"{table(LIST_COLUMNS, rows)}\n\n{summary}" if rows else summary
    return Result(text, {"location": store.location, "plans": found})


def _environments() -> tuple[Environment, ...] | None:
    try:
        return current_environments()
    except Exception:  # torch does not load: stored plans can still be listed
        return None


def _listed(row: StoredRow, here: tuple[Environment, ...] | None) -> Listed:
    record = row.record
    place = "unknown" if here is None else "here" if row.environment in here else "elsewhere"
    return Listed(
        key=row.key,
        problem="" if record is None else str(record.problem),
        engine=row.engine,
        chosen=row.engine if record is None else str(record.config),
        median_us=None if record is None else record.median_us,
        effort=row.effort,
        environment=place,
        created=row.created,
        version=row.version,
        trouble=row.trouble,
    )


def explain(key: str, *, every_rejection: bool) -> Result:
    """The whole evidence of one stored plan, and what it is compared with."""
    with PlanStore.default() as store:
        found = list(store.rows(key_prefix=key.strip().lower()))
        parts = [_compiled(part, trouble) for part, trouble in store.parts(found[0].key)] if len(found) == 1 else []
    if not found:
        raise StoreError(path=store.location, reason=f"no key begins with {key!r}; `convplan list` shows those stored")
    if len(found) > 1:
        some = ", ".join(row.key for row in found[:5])
        raise StoreError(path=store.location, reason=f"{len(found)} keys begin with {key!r}, expected one: {some}")
    row = found[0]
    if row.record is None:
        raise StoreError(path=store.location, reason=f"the plan {row.key} cannot be used: {row.trouble}")
    return _explained(row.key, row.record, parts, every_rejection)


def explain_problem(problem: Problem, *, every_rejection: bool) -> Result:
    """The same for the one plan that is stored for a problem; where there are several, for the one made here."""
    here = _environments() or ()
    with PlanStore.default() as store:
        found = [row for row in store.rows() if row.record is not None and row.record.problem == problem]
    own = [row for row in found if row.environment in here] or found
    if len(own) == 1:
        return explain(own[0].key, every_rejection=every_rejection)
    if not own:
        raise StoreError(path=store.location, reason=f"no plan is stored for {problem}; `convplan tune` makes one")
    some = ", ".join(row.key for row in own[:5])
    raise StoreError(path=store.location, reason=f"{len(own)} plans are stored for {problem}; give one's key: {some}")


def _explained(key: str, record: PlanRecord, parts: list[Compiled], every_rejection: bool) -> Result:
    data = {
        "key": key,
        "record": record,
        "stock_torch": stock_torch(record),
        "hardware_limit": None if record.limit is None else record.limit._asdict(),
        "rejected": [group for group, _ in group_rejected(record.rejected)],
        "serialized": parts,
    }
    lines = [
        f"serialized: {one.config}, {one.size_bytes} bytes, {one.provenance or one.trouble}"
        + (f" (unusable: {one.trouble})" if one.provenance and one.trouble else "")
        for one in parts
    ]
    text = record.explain(every_rejection=every_rejection)
    return Result("\n".join([text, *(["", *lines] if lines else [])]), data)


def _compiled(part: Part | None, trouble: str) -> Compiled:
    if part is None:
        return Compiled(config="-", size_bytes=0, version="", created="", provenance="", trouble=trouble)
    said = {name: showable(getattr(part, name)) for name in ("version", "created", "provenance")}
    return Compiled(config=str(part.config), size_bytes=part.size, trouble=showable(trouble), **said)


def verify(*, key_prefix: str, engine: str | None, every_rank: bool) -> Result:
    """Build and run the stored plans of this environment, and compare their output with the reference."""
    here = current_environments()
    with PlanStore.default() as store:
        rows = list(store.rows(key_prefix=key_prefix, engine=engine))
    records = [row.record for row in rows if row.record is not None and row.environment in here]
    checks = [(record, rank) for record in records for rank in range(len(record.ranking) if every_rank else 1)]
    verified: list[Verified] = []
    with Progress("verifying") as progress:
        for done, (record, rank) in enumerate(checks, start=1):
            verified.append(_verify(record, rank))
            progress.step(done, len(checks), str(record.problem))
    wrong = sum(not one.ok for one in verified)
    left = len(rows) - len(records)
    summary = f"{len(verified)} verified, {wrong} failed" + (
        f", {left} of other environments or unusable" if left else ""
    )
    cells = [
        (
            one.key[:KEY_SHOWN],
            one.problem,
            one.config,
            "-" if one.error is None else f"{one.error:.2g}",
            f"ok ({one.scope})" if one.ok else f"failed: {one.reason}",
        )
        for one in verified
    ]
    text = f"{table(VERIFY_COLUMNS, cells)}\n\n{summary}" if cells else summary
    data = {"location": store.location, "plans": verified, "failed": wrong, "not_verified": left}
    return Result(text, data, ok=not wrong)


def _verify(record: PlanRecord, rank: int) -> Verified:
    from convplan._proof import verify_plan

    evidence = record.ranking[rank]
    error: float | None = None
    scope = reason = ""
    try:
        error, scope = verify_plan(record.build(rank), evidence.notes, tf32=bool(record.policy.allow_tf32))
    except WrongResult as exc:
        reason = exc.reason
    except (ConvPlanError, RuntimeError) as exc:  # it does not build any more, or torch fails inside it
        reason = str(exc)
    return Verified(
        key=record.key,
        problem=str(record.problem),
        config=str(evidence.config),
        error=error,
        scope=scope,
        reason=reason.partition("\n")[0],
        ok=not reason,
    )


def export(path: Path, *, key_prefix: str, engine: str | None, device: str | None, serialized: bool) -> Result:
    """Write stored plans to a JSON file."""
    from convplan import export_plans

    report = export_plans(path, key_prefix=key_prefix, engine=engine, device=device, serialized=serialized)
    compiled = f", with {report.serialized} serialized ones" if report.serialized else ""
    lines = [
        f"{report.exported} plans written to {report.path}{compiled}",
        *(f"left out: {key}: {reason}" for key, reason in report.left_out),
    ]
    return Result("\n".join(lines), msgspec.structs.asdict(report) | {"left_out": _reasons(report.left_out)})


def import_(path: Path, *, dry_run: bool, serialized: bool) -> Result:
    """Take the plans of a JSON file into the store; the answer is no when one was refused."""
    from convplan import import_plans

    report = import_plans(path, dry_run=dry_run, serialized=serialized)
    lines = [
        f"{'would be ' if dry_run else ''}added {report.added}, replaced {report.replaced}, kept {report.kept}, "
        f"refused {len(report.refused)}; {report.elsewhere} belong to other environments"
        + (f"; {report.serialized} serialized plans" if report.serialized else ""),
        *(f"refused: {name}: {reason}" for name, reason in report.refused),
    ]
    data = msgspec.structs.asdict(report) | {"refused": _reasons(report.refused)}
    return Result("\n".join(lines), data, ok=not report.refused)


def _reasons(pairs: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"plan": name, "reason": reason} for name, reason in pairs]


def check() -> Result:
    """Look at every stored plan; the answer is no when one cannot be used."""
    from convplan import check_plans

    report = check_plans()
    lines = [
        *(f"{problem.key}: {problem.reason}" for problem in report.problems),
        *(f"file: {complaint}" for complaint in report.integrity),
        f"{report.rows} plans in {report.location}: {len(report.problems)} rows cannot be used, "
        f"{report.elsewhere} belong to other environments; {report.serialized} serialized plans, "
        f"{report.errata} learned errata",
    ]
    return Result("\n".join(lines), msgspec.structs.asdict(report) | {"ok": report.ok}, ok=report.ok)


def clear(
    *, key_prefix: str, engine: str | None, device: str | None, other_environments: bool, dry_run: bool
) -> Result:
    """Delete stored plans, or count what would be deleted."""
    from convplan import clear_plans

    done = clear_plans(
        key_prefix=key_prefix,
        engine=engine,
        device=device,
        other_environments=other_environments,
        dry_run=dry_run,
    )
    text = f"{done.removed} plans {'would be ' if dry_run else ''}deleted"
    if done.left:
        text += f", {done.left} of a newer convplan left"
    return Result(text, {"removed": done.removed, "left": done.left, "dry_run": dry_run})
