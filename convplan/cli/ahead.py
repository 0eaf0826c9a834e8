"""The command `build`: plans for a GPU that is elsewhere, into a file that the GPU's machine imports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from convplan._errors import NoPlan
from convplan._policy import Policy
from convplan.cli.output import Progress, Result
from convplan.report import human_bytes, one_line, table

if TYPE_CHECKING:
    from convplan._ahead import AheadBuilder, AheadPlan
    from convplan._problem_files import NamedProblem
    from convplan.report import Side

COLUMNS: dict[str, Side] = {
    "problem": "left",
    "plan": "left",
    "workspace": "right",
    "serialized": "right",
    "key": "left",
}
KEY_SHOWN = 12  # digits of a key in tables: enough for `explain`


class BuiltPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One plan: its configuration, scratch memory, and the size of its serialized form."""

    config: str
    workspace_bytes: int
    serialized_bytes: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What was built for one problem, best first; `error` says why that is nothing."""

    name: str
    problem: str
    key: str = ""
    plans: tuple[BuiltPlan, ...] = ()
    error: str = ""


def build(problems: Sequence[NamedProblem], policy: Policy, *, properties: Path, out: Path, leading: int) -> Result:
    """Build the leading plans of each problem for a described GPU and write them to a file.

    Args:
        problems: of a file. Whichever device they name, they are built for the GPU.
        policy: the rules.
        properties: the file that describes the GPU.
        out: the file to write; written when at least one problem has a plan.
        leading: how many plans are built for a problem.

    Raises:
        EngineUnavailable: no cuDNN, or nothing to build with.
        SpecError: the description is malformed, or of another cuDNN version.
        ErrataError: the user's own file of errata is malformed.
        StoreError: the file cannot be written; found out before anything is built.
    """
    from convplan._ahead import AheadBuilder, check_writable, write_ahead
    from convplan.engines.cudnn.device import Device

    builder = AheadBuilder(Device.from_properties(properties))
    check_writable(out)
    answers: list[Answer] = []
    plans: list[AheadPlan] = []
    with Progress("building") as progress:
        for done, named in enumerate(problems, start=1):
            answer, plan = _build(builder, named, policy, leading)
            answers.append(answer)
            plans += [] if plan is None else [plan]
            progress.step(done, len(problems), named.name)
    if plans:
        write_ahead(plans, out)
    failed = sum(bool(answer.error) for answer in answers)
    moved = sum(named.problem.device != "cuda" for named in problems)
    data = {
        "path": str(out.absolute()) if plans else "",
        "environment": builder.environment,
        "problems": answers,
        "total": len(answers),
        "built": len(plans),
        "failed": failed,
        "for_another_device": moved,
        "bytes": out.stat().st_size if plans else 0,
    }
    return Result(_text(answers, builder, out if plans else None, moved), data, ok=not failed)


def _build(builder: AheadBuilder, named: NamedProblem, policy: Policy, leading: int) -> tuple[Answer, AheadPlan | None]:
    on_gpu = msgspec.structs.replace(named, problem=msgspec.structs.replace(named.problem, device="cuda"))
    shown = str(on_gpu.problem)
    try:
        plan = builder.build(on_gpu.problem, on_gpu.policy(policy), leading=leading)
    except NoPlan as exc:  # the others of the file can still be built
        return Answer(name=named.name, problem=shown, error=str(exc)), None
    evidence = {one.config: one for one in plan.record.ranking}
    built = tuple(
        BuiltPlan(
            config=str(config),
            workspace_bytes=evidence[config].workspace_bytes or 0,
            serialized_bytes=len(serialized),
        )
        for config, serialized in plan.serialized.items()
    )
    return Answer(name=named.name, problem=shown, key=plan.record.key, plans=built), plan


def _text(answers: Sequence[Answer], builder: AheadBuilder, out: Path | None, moved: int) -> str:
    rows = []
    for answer in answers:
        if answer.error:
            rows.append((answer.name, "none", "-", "-", "-"))
        rows += [
            (
                answer.name if place == 0 else "",
                plan.config,
                human_bytes(plan.workspace_bytes),
                human_bytes(plan.serialized_bytes),
                answer.key[:KEY_SHOWN] if place == 0 else "",
            )
            for place, plan in enumerate(answer.plans)
        ]
    failures = [_failure(answer) for answer in answers if answer.error]
    built = len(answers) - len(failures)
    summary = [f"{len(answers)} problems: {built} have plans, {len(failures)} do not ({builder.environment})"]
    if moved:
        summary.append(f"{moved} of them name another device; they were built for the GPU all the same")
    summary.append("nothing was written" if out is None else f"written to {out} ({human_bytes(out.stat().st_size)})")
    return "\n".join([table(COLUMNS, rows), "", *failures, *summary])


def _failure(answer: Answer) -> str:
    """The problem's name and every candidate's reason, one a line."""
    first, *rest = answer.error.splitlines()
    return "\n".join([f"{answer.name}: {one_line(first)}", *(f"  {one_line(line)}" for line in rest)])
