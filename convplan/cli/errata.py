"""The commands about learned errata: `errata list`, `export`, `import`, `clear`.

All work on the store that the environment variables name. Rules that people wrote are files and need no command.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from convplan._errors import StoreError
from convplan._learned import ID_SHOWN
from convplan._store import PlanStore, current_environments
from convplan.cli.output import Result
from convplan.report import table

if TYPE_CHECKING:
    from convplan._environment import Environment
    from convplan._store_tables import StoredErratum
    from convplan.report import Side

COLUMNS: dict[str, Side] = {
    "id": "left",
    "config": "left",
    "kind": "left",
    "family": "left",
    "environment": "left",
    "seen": "right",
    "created": "left",
    "reason": "left",
}


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """One learned erratum. `environment` is `here`, `elsewhere`, or `unknown` where torch cannot say what here is."""

    id: str
    config: str
    kind: str
    family: str
    problem: str
    reason: str
    scope: str
    environment: str
    seen: int
    created: str
    version: str
    trouble: str


def list_errata() -> Result:
    """Every learned erratum, usable or not."""
    here = _environments()
    with PlanStore.default() as store:
        found = [_listed(row, here) for row in store.errata_rows()]
    rows = [
        (
            one.id[:ID_SHOWN],
            one.config,
            one.kind,
            one.family,
            f"unusable: {one.trouble}" if one.trouble else one.environment,
            str(one.seen),
            one.created,
            one.reason,
        )
        for one in found
    ]
    summary = f"{len(found)} learned errata in {store.location}"
    return Result(
        f"{table(COLUMNS, rows)}\n\n{summary}" if rows else summary, {"location": store.location, "errata": found}
    )


def _environments() -> tuple[Environment, ...] | None:
    try:
        return current_environments()
    except Exception:  # torch does not load: what is stored can still be listed
        return None


def _listed(row: StoredErratum, here: tuple[Environment, ...] | None) -> Listed:
    one = row.erratum
    place = "unknown"
    if one is not None and here is not None:
        place = "here" if any(one.applies_in(environment) for environment in here) else "elsewhere"
    return Listed(
        id=row.id,
        config="-" if one is None else str(one.config),
        kind="-" if one is None else one.kind,
        family="" if one is None else str(one.family),
        problem="" if one is None else one.problem,
        reason="" if one is None else one.reason,
        scope="" if one is None else str(one.scope),
        environment=place,
        seen=0 if one is None else one.seen,
        created="" if one is None else one.created,
        version="" if one is None else one.version,
        trouble=row.trouble,
    )


def export(path: Path) -> Result:
    """Write every learned erratum to a JSON file."""
    from convplan._errata_files import export_errata

    report = export_errata(path)
    lines = [
        f"{report.exported} learned errata written to {report.path}",
        *(f"left out: {name}: {reason}" for name, reason in report.left_out),
    ]
    return Result("\n".join(lines), msgspec.structs.asdict(report) | {"left_out": _reasons(report.left_out)})


def import_(path: Path, *, dry_run: bool) -> Result:
    """Take the errata of a JSON file into the store; the answer is no when one was refused."""
    from convplan._errata_files import import_errata

    report = import_errata(path, dry_run=dry_run)
    lines = [
        f"{'would be ' if dry_run else ''}added {report.added}, updated {report.updated}, kept {report.kept}, "
        f"refused {len(report.refused)}",
        *(f"refused: {name}: {reason}" for name, reason in report.refused),
    ]
    data = msgspec.structs.asdict(report) | {"refused": _reasons(report.refused)}
    return Result("\n".join(lines), data, ok=not report.refused)


def clear(key: str, *, dry_run: bool) -> Result:
    """Forget one erratum, named by how its id begins, or every one."""
    prefix = key.strip().lower()
    with PlanStore.default() as store:
        if prefix:
            found = [row.id for row in store.errata_rows() if row.id.startswith(prefix)]
            if len(found) != 1:
                some = f": {', '.join(found[:5])}" if found else "; `convplan errata list` shows those stored"
                reason = f"{len(found)} ids of learned errata begin with {key!r}, expected one{some}"
                raise StoreError(path=store.location, reason=reason)
        removed = store.forget_errata(prefix, dry_run=dry_run)
    text = f"{removed} learned errata {'would be ' if dry_run else ''}forgotten"
    return Result(text, {"removed": removed, "dry_run": dry_run})


def _reasons(pairs: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"erratum": name, "reason": reason} for name, reason in pairs]
