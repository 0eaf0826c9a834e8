"""The command about GPUs that need not be here: `configs`, what cuDNN proposes for the problems of a file.

It lists and filters; nothing is built, run or stored. The filter is the planner's own stage, so that planning under the
same policy drops the same configurations for the same reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from convplan._candidates import Live
from convplan._errors import EngineUnavailable
from convplan._filter import filter_candidates
from convplan._memory import MOST_WORKSPACE_BYTES
from convplan._policy import Policy
from convplan.cli.output import Progress, Result
from convplan.engines.base import Notes
from convplan.report import human_bytes, one_line, table

if TYPE_CHECKING:
    from convplan._problem import Problem
    from convplan._problem_files import NamedProblem
    from convplan.engines.base import Candidate, EngineConfig
    from convplan.engines.cudnn.engine import CudnnEngine
    from convplan.report import Side

COLUMNS: dict[str, Side] = {
    "source": "left",
    "engine": "right",
    "knobs": "left",
    "workspace": "right",
    "notes": "left",
    "refused": "left",
}
NO_GPU = (
    "a GPU that torch can use (torch.cuda.is_available() is False), or the description of one: --device FILE.json, "
    "which `convplan doctor --device-properties --out FILE.json` writes where the GPU is"
)
NOTHING_PROPOSED = "cuDNN proposes no configuration"


class Proposed(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration.

    Args:
        source: the list of cuDNN's that it comes from: `mode_a`, `mode_b` or `fallback`.
        engine: cuDNN's index of the engine.
        knobs: the other knobs by name.
        notes: numerical and behaviour notes.
        workspace_bytes: scratch memory, None where only building tells.
        refused: why the filter drops it, empty when it does not.
    """

    source: str
    engine: int
    knobs: dict[str, int]
    notes: Notes
    workspace_bytes: int | None
    refused: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What is proposed for one problem; `reason` is set when that is nothing."""

    name: str
    configs: tuple[Proposed, ...] = ()
    reason: str = ""


class _Gpu(NamedTuple):
    """The engine for one GPU, what to call the two, and whether the GPU is described by a file."""

    engine: CudnnEngine
    title: str
    described: bool


def configs(problems: Sequence[NamedProblem], policy: Policy, *, properties: Path | None) -> Result:
    """Every configuration that cuDNN proposes for each problem, and which of them the policy drops.

    Args:
        problems: of a file. Whichever device they name, they are asked about on the GPU.
        policy: its effort chooses the lists that are asked.
        properties: the file that describes the GPU; None: the current GPU of this machine.

    Returns:
        An answer for each problem; not ok when there are problems and nothing is proposed for any.

    Raises:
        EngineUnavailable: no GPU here and none described, or no cuDNN.
        SpecError: the description is malformed, or of another cuDNN version.
        ErrataError: the user's own file of errata is malformed.
    """
    gpu = _described(properties) if properties is not None else _present()
    answers: list[Answer] = []
    blocks: list[str] = []
    with Progress("listing") as progress:
        for done, named in enumerate(problems, start=1):
            named = msgspec.structs.replace(named, problem=msgspec.structs.replace(named.problem, device="cuda"))
            answers.append(_ask(gpu, named, policy))
            blocks += [_text(named, answers[-1]), ""]
            progress.step(done, len(problems), named.name)
    listed = not answers or any(answer.configs for answer in answers)
    return Result("\n".join([*blocks, _summary(gpu, answers)]), answers, ok=listed)


def _described(properties: Path) -> _Gpu:
    from convplan.engines.cudnn.device import Device
    from convplan.engines.cudnn.engine import CudnnEngine
    from convplan.engines.cudnn.target import Target

    device = Device.from_properties(properties)
    target = Target.absent(device)
    title = f"{device.name}, compute capability {device.compute_capability}, cuDNN {target.library.version_text}"
    return _Gpu(CudnnEngine(target), title, True)


def _present() -> _Gpu:
    import torch

    from convplan.engines.cudnn.engine import CudnnEngine
    from convplan.engines.cudnn.target import present

    if not torch.cuda.is_available():
        raise EngineUnavailable(engine=CudnnEngine.name, needs=NO_GPU)
    index = torch.cuda.current_device()
    target = present(index)
    name = torch.cuda.get_device_name(index)
    title = f"{name}, compute capability {target.compute_capability}, cuDNN {target.library.version_text}"
    return _Gpu(CudnnEngine(target), title, False)


def _ask(gpu: _Gpu, named: NamedProblem, policy: Policy) -> Answer:
    from convplan.engines.cudnn.descriptors import CudnnError

    support = gpu.engine.supports(named.problem)
    if not support.ok:
        return Answer(name=named.name, reason=support.reason)
    resolved = named.policy(policy).resolve()
    try:
        candidates = gpu.engine.configs(named.problem, resolved.effort)
    except CudnnError as exc:  # cuDNN cannot express this problem; it may well express the next
        return Answer(name=named.name, reason=str(exc))
    if not candidates:
        return Answer(name=named.name, reason=NOTHING_PROPOSED)
    if gpu.described and resolved.workspace_limit_bytes is None:
        # What the allocator can provide is only known where the GPU is; this is what no GPU is asked for.
        resolved = resolved.replace(workspace_limit_bytes=MOST_WORKSPACE_BYTES)
    dropped = _dropped(gpu.engine, named.problem, candidates, resolved)
    return Answer(
        name=named.name,
        configs=tuple(_proposed(candidate, dropped.get(candidate.config, "")) for candidate in candidates),
    )


def _dropped(
    engine: CudnnEngine, problem: Problem, candidates: Sequence[Candidate], policy: Policy
) -> dict[EngineConfig, str]:
    """The planner's reason for each configuration that its filter drops."""
    _, rejected = filter_candidates([Live(candidate, engine) for candidate in candidates], problem, policy)
    return {evidence.config: evidence.reason for evidence in rejected}


def _proposed(candidate: Candidate, refused: str) -> Proposed:
    knobs = dict(candidate.config.knobs)
    return Proposed(
        source=candidate.source,
        engine=knobs.pop("engine"),
        knobs=knobs,
        notes=candidate.notes,
        workspace_bytes=candidate.workspace_bytes,
        refused=refused,
    )


def _text(named: NamedProblem, answer: Answer) -> str:
    title = one_line(f"{named.name}: {named.problem}")
    if answer.reason:
        return f"{title}\nnone: {one_line(answer.reason)}"
    rows = [
        (
            one.source,
            str(one.engine),
            " ".join(f"{name}={value}" for name, value in one.knobs.items()) or "-",
            human_bytes(one.workspace_bytes),
            str(one.notes),
            one.refused,
        )
        for one in answer.configs
    ]
    return f"{title}\n{table(COLUMNS, rows)}"


def _summary(gpu: _Gpu, answers: Sequence[Answer]) -> str:
    proposed = [one for answer in answers for one in answer.configs]
    refused = sum(bool(one.refused) for one in proposed)
    without = sum(bool(answer.reason) for answer in answers)
    return (
        f"{len(answers)} problems: {len(proposed)} configurations, {refused} of them refused"
        + (f"; {without} problems without any" if without else "")
        + f" ({gpu.title})"
    )
