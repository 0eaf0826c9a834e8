"""Learned errata: configurations that failed on this very kind of machine, remembered so that nobody meets them again.

Shipped errata (`engines/cudnn/errata.py`) are rules that people wrote. These are observations: a candidate crashed its
worker, never came back, gave wrong numbers, leaked, or wrote into its neighbour's memory. Each holds for one exact
configuration, for one family of problems, and for the library versions and the kind of device it was seen with, so that
an upgrade gives it another chance. Keeping them is the store's business, files of them are `_errata_files`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from convplan._environment import PROBE_FAILED, Environment
from convplan._epilogue import Epilogue
from convplan._errors import SpecError
from convplan._plan import PlanRecord
from convplan._problem import DTYPES, Layout, Op, Problem
from convplan._rows import MAX_KNOB, MAX_LABEL, checksum_of, shows
from convplan.engines.base import EngineConfig

ERRATUM_SCHEMA = (
    1  # goes up when an erratum written now would not decode, or would mean something else, in an older one
)
MAX_ERRATA = 10_000  # in one store or file
MAX_REASON = 2_000  # characters
ID_SHOWN = 8  # digits of an id in messages

Kind = Literal["crashed", "stalled", "wrong", "corrupted", "leaked", "failed"]
Grouping = Literal["dense", "grouped", "depthwise"]

KIND_OF_STAGE: dict[str, Kind] = {  # what planning writes into `Evidence.rejected`
    "crash": "crashed",
    "stall": "stalled",
    "verify": "wrong",
    "corrupt": "corrupted",
    "leak": "leaked",
    "fail": "failed",
}
SAID: dict[Kind, str] = {
    "crashed": "crashed",
    "stalled": "did not come back",
    "wrong": "gave wrong results",
    "corrupted": "wrote into memory that is not its own",
    "leaked": "kept memory",
    "failed": "failed",
}

# What of an environment an observation depends on. The number of threads, of multiprocessors and the like make a plan
# slower or faster, not wrong. cuDNN's plans go by torch without being changed by it.
SCOPE_LABELS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "capability", "torch", "onednn"),
    "cuda": ("capability", "torch", "cuda", "cudnn"),
}
SCOPE_LABELS_OF_ENGINE: dict[tuple[str, str], tuple[str, ...]] = {
    ("cuda", "cudnn"): ("capability", "cuda", "cudnn"),
}

_encode = msgspec.json.Encoder()


class Family(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, cache_hash=True, omit_defaults=True
):
    """Problems that a library treats alike: everything but the sizes.

    Attributes:
        op: `fprop`, `dgrad` or `wgrad`.
        dtypes: of x, w and y.
        layouts: of x, w and y.
        grouping: `depthwise` where each of several channels is a group of its own.
        strided, dilated: in some dimension.
        filter_dims: the filter's spatial sizes; their number is the spatial rank.
        epilogue: what follows the convolution besides a bias alone, by name; no numbers.
    """

    op: Op
    dtypes: tuple[str, str, str]
    layouts: tuple[Layout, Layout, Layout]
    grouping: Grouping
    strided: bool
    dilated: bool
    filter_dims: tuple[Annotated[int, msgspec.Meta(ge=1, le=2**31)], ...]
    epilogue: Annotated[str, msgspec.Meta(pattern="^[a-z0-9_+]*$", max_length=64)] = ""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.dtypes if name not in DTYPES]:
            raise SpecError(f"dtypes hold {unknown[0][:60]!r}, expected some of {', '.join(DTYPES)}")
        if not 1 <= len(self.filter_dims) <= 3:
            raise SpecError(f"filter_dims has {len(self.filter_dims)} sizes, expected 1 to 3")

    @classmethod
    def of(cls, problem: Problem) -> Family:
        """The family a problem belongs to."""
        groups = problem.groups
        specs = (problem.x, problem.w, problem.y)
        return cls(
            op=problem.op,
            dtypes=(specs[0].dtype, specs[1].dtype, specs[2].dtype),
            layouts=(specs[0].layout, specs[1].layout, specs[2].layout),
            grouping="dense" if groups == 1 else "depthwise" if groups == problem.x.dims[1] else "grouped",
            strided=any(step > 1 for step in problem.stride),
            dilated=any(step > 1 for step in problem.dilation),
            filter_dims=tuple(problem.w.dims[2:]),
            epilogue=_parts(problem.epilogue),
        )

    def __str__(self) -> str:
        dtypes = self.dtypes[0] if len(set(self.dtypes)) == 1 else "/".join(self.dtypes)
        layouts = self.layouts[0] if len(set(self.layouts)) == 1 else "/".join(self.layouts)
        marks = [name for name in ("strided", "dilated") if getattr(self, name)]
        op = f"{self.op}+{self.epilogue}" if self.epilogue else self.op
        return " ".join([op, dtypes, layouts, self.grouping, "x".join(map(str, self.filter_dims)), *marks])


def _parts(epilogue: Epilogue) -> str:
    """Such as `residual+bias+relu`; a bias alone is torch's to add."""
    if epilogue.is_plain:
        return ""
    parts = [name for name in ("scale", "residual", "bias", "statistics", "gate") if getattr(epilogue, name)]
    return "+".join([*parts, *([] if epilogue.activation == "none" else [epilogue.activation])])


class LearnedErratum(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One configuration that failed, and where that counts.

    Attributes:
        config: exactly this engine with exactly these knobs.
        kind: what it did.
        reason: what planning said of it.
        problem: text of the problem that it was last seen with.
        family: the problems for which it is believed.
        scope: the device type, and those items of the environment that it depends on.
        created: when it was first seen, UTC time in ISO 8601.
        version: the convplan that saw it last.
        seen: how often.
    """

    config: EngineConfig
    kind: Kind
    reason: str
    problem: str
    family: Family
    scope: Environment
    created: str = ""
    version: str = ""
    seen: Annotated[int, msgspec.Meta(ge=1, le=2**31)] = 1

    @property
    def id(self) -> str:
        """32 hexadecimal digits of configuration, family and scope: what fails in two ways is one erratum."""
        text = _encode.encode((self.config, self.family, self.scope))
        return hashlib.sha256(text).hexdigest()[:32]

    def applies_in(self, environment: Environment) -> bool:
        """Whether it was seen with what is installed there."""
        if self.scope.device != environment.device or any(value == PROBE_FAILED for _, value in self.scope.items):
            return False
        return set(self.scope.items) <= set(environment.items)

    def matches(self, problem: Problem, config: EngineConfig, environment: Environment) -> bool:
        """Whether it speaks of this configuration for this problem there."""
        return config == self.config and self.applies_in(environment) and self.family == Family.of(problem)

    def __str__(self) -> str:
        when = f" on {self.created[:10]}" if self.created else ""
        often = f", {self.seen} times by now" if self.seen > 1 else ""
        return f"learned erratum {self.id[:ID_SHOWN]}: {SAID[self.kind]}{when}{often} ({self.problem}): {self.reason}"


class RawErratum(NamedTuple):
    """A row of errata. The values are whatever the store holds."""

    id: Any
    schema: Any
    checksum: Any
    erratum: Any


_decoder = msgspec.json.Decoder(LearnedErratum)


def verdict(
    errata: Iterable[LearnedErratum], problem: Problem, config: EngineConfig, environment: Environment | None = None
) -> str:
    """Why a configuration must not run, in words; empty when nothing was learned about it.

    Args:
        environment: None: the errata were chosen for it already.
    """
    mine = [one for one in errata if one.config == config]
    if not mine:
        return ""
    family = Family.of(problem)
    found = (one for one in mine if one.family == family and (environment is None or one.applies_in(environment)))
    return next(map(str, found), "")


def learned_from(record: PlanRecord) -> list[LearnedErratum]:
    """What planning a problem taught: one erratum for each candidate that was rejected for what it did when it ran.

    Candidates that were too slow, too large, refused or out of memory taught nothing that holds tomorrow.
    """
    family = Family.of(record.problem)
    found = [
        LearnedErratum(
            config=evidence.config,
            kind=KIND_OF_STAGE[evidence.rejected],
            reason=_cleaned(evidence.reason) or evidence.rejected,
            problem=_cleaned(str(record.problem)),
            family=family,
            scope=scope_of(evidence.config.engine, record.environment),
            created=record.created,
            version=record.version,
        )
        for evidence in record.rejected
        if evidence.rejected in KIND_OF_STAGE
    ]
    return list({one.id: one for one in found}.values())


def scope_of(engine: str, environment: Environment) -> Environment:
    """The part of an environment that an engine's mistakes depend on; all of it on devices that are not known here."""
    usual = SCOPE_LABELS.get(environment.device)
    labels = SCOPE_LABELS_OF_ENGINE.get((environment.device, engine), usual)
    items = tuple(item for item in environment.items if labels is None or item[0] in labels)
    return Environment(environment.device, items or environment.items)


def _cleaned(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:MAX_REASON]).strip()


def merged(old: LearnedErratum, new: LearnedErratum) -> LearnedErratum:
    """One erratum of two observations of the same: told by the newer, counted since the older."""
    return msgspec.structs.replace(new, created=old.created or new.created, seen=min(old.seen + new.seen, 2**31))


def erratum_trouble(erratum: LearnedErratum) -> str:
    """Why an erratum that decodes still cannot be used, empty for a good one."""
    if not erratum.scope.items or len(erratum.scope.items) > 64:
        return f"scope has {len(erratum.scope.items)} items, expected 1 to 64: without any it would hold everywhere"
    if any(not -MAX_KNOB <= value < MAX_KNOB for _, value in erratum.config.knobs):
        return "config.knobs hold a number of more than 64 bits"
    labels = (erratum.created, erratum.version, erratum.scope.device)
    texts = (erratum.reason, erratum.problem, *(text for item in erratum.scope.items for text in item))
    names = tuple(name for name, _ in erratum.config.knobs)
    if any(len(text) > MAX_LABEL for text in labels) or any(len(text) > MAX_REASON for text in texts):
        return f"a text is too long, expected at most {MAX_REASON} characters, {MAX_LABEL} for device, version and time"
    if not erratum.reason or not all(shows(text) for text in (*labels, *texts, *names)):
        return "reason is empty, or a text holds control characters"
    return ""


def row_of_erratum(erratum: LearnedErratum) -> dict[str, object]:
    """The columns of an erratum's row.

    Raises:
        SpecError: it makes no sense, see `erratum_trouble`.
    """
    if trouble := erratum_trouble(erratum):
        raise SpecError(f"this erratum cannot be stored: {trouble}")
    text = _encode.encode(erratum).decode()
    return {
        "id": erratum.id,
        "schema": ERRATUM_SCHEMA,
        "device": erratum.scope.device,
        "engine": erratum.config.engine,
        "checksum": checksum_of(text),
        "erratum": text,
    }


def read_erratum(row: RawErratum) -> tuple[LearnedErratum | None, str]:
    """A row's erratum, or None and the reason why it cannot be used."""
    if not isinstance(row.schema, int) or row.schema > ERRATUM_SCHEMA:
        return None, f"its schema is {row.schema!r}, expected {ERRATUM_SCHEMA} or older: a newer convplan wrote it"
    if not isinstance(row.erratum, str) or row.checksum != checksum_of(row.erratum):
        return None, "damaged: the erratum does not match its checksum"
    try:
        erratum = _decoder.decode(row.erratum)
    except (msgspec.DecodeError, RecursionError) as exc:
        return None, f"not an erratum: {exc}"
    if erratum.id != row.id:
        return None, f"the id does not belong to the erratum, whose id is {erratum.id}"
    trouble = erratum_trouble(erratum)
    return (None, trouble) if trouble else (erratum, "")


def in_scope(rows: Sequence[RawErratum], environment: Environment) -> tuple[LearnedErratum, ...]:
    """The usable errata among rows that count in an environment."""
    found = (read_erratum(row)[0] for row in rows)
    return tuple(one for one in found if one is not None and one.applies_in(environment))
