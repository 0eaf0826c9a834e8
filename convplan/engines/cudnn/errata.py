"""Errata: rules that drop a configuration of cuDNN which is known to crash or to give wrong results (B11).

Here: what a rule and a file of rules are, reading them strictly, and the verdict on one configuration. The rules
themselves are data: `errata.json` beside this module, and the files that `CONVPLAN_ERRATA` names (several, separated as
in PATH). Elsewhere: who asks and what becomes of a dropped configuration (`configs.py`, the planner's filter), and the
plans that failed on this very machine, which the store remembers.

A rule is a set of conditions, and drops what meets all of them. Files are data from strangers: their size is limited,
unknown fields are refused, nothing in them is ever evaluated, and every complaint is an `ErrataError` that names the
file, the rule and the field. The format is published in `schemas/errata.schema.json`, which
`scripts/write_errata_schema.py` makes from the structs here.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec

from convplan._errors import ErrataError
from convplan._problem import DTYPES, Layout, Op, Problem

ENVIRONMENT_VARIABLE = "CONVPLAN_ERRATA"
SHIPPED_PATH = Path(__file__).with_name("errata.json")
SCHEMA_PATH = Path(__file__).parents[2] / "schemas" / "errata.schema.json"

FILE_SCHEMA = 1  # goes up when an older convplan could not read the file, or would misread it
MAX_FILE_BYTES = 2**20
MAX_RULES = 10_000
MAX_VALUES = 256  # of one condition
MAX_TEXT = 1_000  # characters of a reason, a source or a comment
MAX_QUOTED = 60  # characters of a file's own text in an error

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TEXT)]
RuleId = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)]
# Of a public thread or document, or a path of this project's own results.
Source = Annotated[
    str, msgspec.Meta(pattern=r"^(https?://[^\s]+|benchmarks/results/[A-Za-z0-9_./-]+)$", max_length=MAX_TEXT)
]
KnobName = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
NoteName = Annotated[str, msgspec.Meta(pattern=r"^[A-Z][A-Z0-9_]*$", max_length=64)]
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,2}\.[0-9]{1,2}(\.[0-9]{1,2})?$")]
Capability = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,2}\.[0-9]{1,2}$")]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_values = msgspec.Meta(max_length=MAX_VALUES)
# What is in an operation graph: a convolution alone (a bias may be added to it later), or also what follows it, in one
# of the two forms of `fusion`, or statistics of its result.
GraphKind = Literal["convolution", "specialised", "general", "statistics"]


def version_number(text: str) -> int:
    """cuDNN's own number of a version: 92301 for `9.23.1`, 91500 for `9.15`, 8907 for `8.9.7`."""
    major, minor, patch = (*map(int, text.split(".")), 0)[:3]
    # The encoding changed with cuDNN 9: CUDNN_VERSION in cudnn_version.h of either generation.
    return major * (10_000 if major >= 9 else 1_000) + minor * 100 + patch


def capability_pair(text: str) -> tuple[int, int]:
    """A compute capability as numbers that compare: (12, 0) for `12.0`.

    Raises:
        ValueError: it is not written as major.minor.
    """
    found = re.fullmatch(r"([0-9]{1,2})\.([0-9]{1,2})", text)
    if found is None:
        raise ValueError(f"compute capability is {text!r}, expected major.minor such as '9.0'")
    return int(found[1]), int(found[2])


class Versions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A range of cuDNN versions: `since` is the first one affected, `before` the first one that is not any more."""

    since: Version | None = None
    before: Version | None = None

    def __post_init__(self) -> None:
        _check_ends(self, version_number, "before")

    def __contains__(self, version: int) -> bool:
        return (self.since is None or version_number(self.since) <= version) and (
            self.before is None or version < version_number(self.before)
        )


class Capabilities(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A range of compute capabilities, both ends included; `{"min": "8.6", "max": "8.6"}` is one kind of GPU."""

    min: Capability | None = None
    max: Capability | None = None

    def __post_init__(self) -> None:
        _check_ends(self, capability_pair)

    def __contains__(self, capability: tuple[int, int]) -> bool:
        return (self.min is None or capability_pair(self.min) <= capability) and (
            self.max is None or capability <= capability_pair(self.max)
        )


class Between(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A range of sizes, both ends included."""

    min: Size | None = None
    max: Size | None = None

    def __post_init__(self) -> None:
        _check_ends(self, int)

    def __contains__(self, size: int) -> bool:
        return (self.min is None or self.min <= size) and (self.max is None or size <= self.max)


def _check_ends(found: msgspec.Struct, number: Callable[[Any], Any], excluded: str = "") -> None:
    """At least one end of a range is given, and something lies between the two."""
    ends = {name: getattr(found, name) for name in found.__struct_fields__ if getattr(found, name) is not None}
    if not ends:
        raise ValueError(f"found no end, expected {' or '.join(found.__struct_fields__)}")
    first, *last = map(number, ends.values())
    if last and (first > last[0] or (excluded in ends and first == last[0])):
        said = " and ".join(f"{name} {end}" for name, end in ends.items())
        raise ValueError(f"found {said}, a range that nothing is in")


class ErrataRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One rule. Conditions that are left out hold always; a rule without any condition is an error.

    Args:
        id: names the rule wherever a configuration was dropped; unique among all files.
        reason: what happens, in one sentence.
        source: the public thread or document that says so, or the file in this project that shows it.
        operations: `fprop`, `dgrad`, `wgrad`.
        engines: global indices of cuDNN's engines, which it counts anew for each kind of graph.
        graphs: kinds of graph: `convolution`, for what follows one in the same graph `specialised` or `general`, and
            `statistics` where that is the sums of its channels.
            Left out, a rule that names engines is about those of a convolution alone, any other about all kinds.
        knobs: values the configuration must have, all of them, by cuDNN's names of knobs in lower case; a number or a
            range.
        notes: numerical notes the engine must carry, all of them, such as `TENSOR_CORE`.
        cudnn: versions of cuDNN.
        compute_capability: of the GPU.
        dtypes: of the first tensor read, as torch calls them: `float16`.
        output_dtypes: of the tensor written.
        layouts: of the first tensor read: `contiguous`, `channels_last`, `strided`.
        spatial_rank: spatial dimensions as cuDNN sees them: 2 or 3, where 2 stands for one dimension too.
        groups, channels, filters: of the convolution; channels are those of the input x, filters those of y.
        depthwise: whether each input channel is a group of its own (and there are several).
        uneven_padding: whether padding differs before and after in some dimension.
        filter_taps: filter sizes multiplied; 1 is a pointwise filter.
        elements: of the largest of the three tensors.
    """

    id: RuleId
    reason: Text
    source: Source
    operations: Annotated[tuple[Op, ...], _values] = ()
    engines: Annotated[tuple[Size, ...], _values] = ()
    graphs: Annotated[tuple[GraphKind, ...], _values] = ()
    knobs: Annotated[dict[KnobName, int | Between], _values] = {}
    notes: Annotated[tuple[NoteName, ...], _values] = ()
    cudnn: Versions | None = None
    compute_capability: Capabilities | None = None
    dtypes: Annotated[tuple[str, ...], _values] = ()
    output_dtypes: Annotated[tuple[str, ...], _values] = ()
    layouts: Annotated[tuple[Layout, ...], _values] = ()
    spatial_rank: Between | None = None
    groups: Between | None = None
    channels: Between | None = None
    filters: Between | None = None
    depthwise: bool | None = None
    uneven_padding: bool | None = None
    filter_taps: Between | None = None
    elements: Between | None = None

    def __post_init__(self) -> None:
        for field in ("dtypes", "output_dtypes"):
            unknown = [name for name in getattr(self, field) if name not in DTYPES]
            if unknown:
                raise ValueError(f"{field}: found {_quote(unknown)}, expected some of {', '.join(DTYPES)}")
        if not self.conditions:
            raise ValueError(f"found no condition, expected at least one of {', '.join(_CONDITIONS)}")

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions that are given, by name."""
        return {name: getattr(self, name) for name in _CONDITIONS if getattr(self, name) not in (None, (), {})}

    @property
    def meant_graphs(self) -> tuple[GraphKind, ...]:
        """The kinds of graph that it is about; empty for all."""
        return self.graphs or (("convolution",) if self.engines else ())


class ErrataFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of rules, as it is published in the schema."""

    schema: Literal[1]
    rules: Annotated[tuple[ErrataRule, ...], msgspec.Meta(max_length=MAX_RULES)]
    comment: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)] = ""


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An `ErrataFile` whose rules are not decoded yet, so that an error can say which of them it is about."""

    schema: int
    rules: Annotated[tuple[msgspec.Raw, ...], msgspec.Meta(max_length=MAX_RULES)]
    comment: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)] = ""


class _Question(NamedTuple):
    """One configuration of one problem, somewhere."""

    problem: Problem
    engine_index: int
    knobs: Mapping[str, int]
    cudnn_version: int
    capability: tuple[int, int]
    notes: frozenset[str]
    graph: GraphKind


def _is_like(found: int | None, wanted: int | Between) -> bool:
    if isinstance(wanted, Between):
        return found is not None and found in wanted
    return found == wanted


_CONDITIONS: dict[str, Callable[[Any, _Question], bool]] = {
    "operations": lambda wanted, asked: asked.problem.op in wanted,
    "engines": lambda wanted, asked: asked.engine_index in wanted,
    "graphs": lambda wanted, asked: asked.graph in wanted,
    "knobs": lambda wanted, asked: all(_is_like(asked.knobs.get(name), value) for name, value in wanted.items()),
    "notes": lambda wanted, asked: asked.notes.issuperset(wanted),
    "cudnn": lambda wanted, asked: asked.cudnn_version in wanted,
    "compute_capability": lambda wanted, asked: asked.capability in wanted,
    "dtypes": lambda wanted, asked: asked.problem.inputs[0].dtype in wanted,
    "output_dtypes": lambda wanted, asked: asked.problem.output_dtype in wanted,
    "layouts": lambda wanted, asked: asked.problem.inputs[0].layout in wanted,
    "spatial_rank": lambda wanted, asked: max(asked.problem.spatial_rank, 2) in wanted,
    "groups": lambda wanted, asked: asked.problem.groups in wanted,
    "channels": lambda wanted, asked: asked.problem.x.dims[1] in wanted,
    "filters": lambda wanted, asked: asked.problem.w.dims[0] in wanted,
    "depthwise": lambda wanted, asked: wanted is (1 < asked.problem.groups == asked.problem.x.dims[1]),
    "uneven_padding": lambda wanted, asked: wanted is any(before != after for before, after in asked.problem.padding),
    "filter_taps": lambda wanted, asked: math.prod(asked.problem.w.dims[2:]) in wanted,
    "elements": lambda wanted, asked: max(t.numel for t in (*asked.problem.inputs, asked.problem.output)) in wanted,
}


def _all_conditions(rule: ErrataRule) -> dict[str, Any]:
    """Those that are given, and the one that follows from them."""
    meant = rule.meant_graphs
    return {**rule.conditions, "graphs": meant} if meant else rule.conditions


class Errata:
    """Rules, in the order of their files: the shipped ones first.

    Immutable, so it may be used by several threads at once.
    """

    def __init__(self, rules: Collection[ErrataRule]) -> None:
        self.rules = tuple(rules)
        self._conditions = [(rule, tuple(_all_conditions(rule).items())) for rule in self.rules]

    @classmethod
    def load(cls) -> Errata:
        """The shipped rules and those of the files that `CONVPLAN_ERRATA` names.

        Each file is read again when its time of modification or its size has changed, and the variable counts as it
        is now.

        Raises:
            ErrataError: a file cannot be read or is malformed; names the file, the rule and the field.
        """
        named = os.environ.get(ENVIRONMENT_VARIABLE, "").split(os.pathsep)
        return _load(tuple(map(_stamp, (SHIPPED_PATH, *(Path(name) for name in named if name.strip())))))

    def verdict(
        self,
        problem: Problem,
        engine_index: int,
        knobs: Mapping[str, int],
        *,
        cudnn_version: int,
        compute_capability: str,
        notes: Collection[str] = (),
        graph: GraphKind = "convolution",
    ) -> str:
        """Why a configuration must not run: `errata rule ID: reason` of the first rule that drops it, or empty.

        Args:
            problem: what it would compute.
            engine_index: cuDNN's global index of the engine.
            knobs: its choices, by cuDNN's names of knobs in lower case. A rule about a knob that is not among them
                does not apply.
            cudnn_version: as cuDNN counts, 91900 for 9.19.0.
            compute_capability: of the GPU, as `9.0`.
            notes: the engine's numerical notes in upper case. Rules about a note need them.
            graph: the kind of graph that the engine is one of.

        Raises:
            ValueError: the compute capability is not written as major.minor.
        """
        asked = _Question(
            problem, engine_index, knobs, cudnn_version, capability_pair(compute_capability), frozenset(notes), graph
        )
        for rule, conditions in self._conditions:
            if all(_CONDITIONS[name](wanted, asked) for name, wanted in conditions):
                return f"errata rule {rule.id}: {rule.reason}"
        return ""


def errata_file_schema() -> str:
    """The JSON schema of a file of rules, as published in `schemas/errata.schema.json`."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "convplan errata file",
        **msgspec.json.schema(ErrataFile),
    }
    return json.dumps(schema, indent=1) + "\n"


# --- reading ----------------------------------------------------------------------------------------------------------


class _Stamp(NamedTuple):
    """A file as it was when its name was looked up; another stamp means that it must be read again."""

    path: Path
    modified_ns: int
    size_bytes: int


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError as exc:
        raise ErrataError(path=str(path), reason=f"cannot be read: {exc.strerror or exc}") from exc
    if not stat.S_ISREG(found.st_mode):
        raise ErrataError(path=str(path), reason=f"is no file, expected a file of errata ({ENVIRONMENT_VARIABLE})")
    return _Stamp(path.absolute(), found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=8)
def _load(stamps: tuple[_Stamp, ...]) -> Errata:
    home_of: dict[str, Path] = {}
    rules: list[ErrataRule] = []
    for path, _, _ in stamps:
        for rule in read_errata(path):
            if rule.id in home_of:
                raise ErrataError(
                    path=str(path),
                    rule=rule.id,
                    field="id",
                    reason=f"found an id that {home_of[rule.id]} has as well, expected a new one",
                )
            home_of[rule.id] = path
            rules.append(rule)
    return Errata(rules)


def read_errata(path: str | os.PathLike[str]) -> tuple[ErrataRule, ...]:
    """Every rule of a file, in its order.

    Raises:
        ErrataError: the file cannot be read, is larger than 1 MiB, is no JSON, or a rule of it is wrong.
    """
    try:
        with Path(path).open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ErrataError(path=str(path), reason=f"cannot be read: {exc.strerror or exc}") from exc
    return parse_errata(data, source=str(path))


def parse_errata(data: bytes, *, source: str = "errata") -> tuple[ErrataRule, ...]:
    """The rules in the bytes of a file; `source` names it in errors.

    Raises:
        ErrataError: as `read_errata`.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ErrataError(path=source, reason=f"found more than {MAX_FILE_BYTES} bytes, expected at most that many")
    envelope: _Envelope = _decode(data, _Envelope, source, "")
    if envelope.schema != FILE_SCHEMA:
        reason = f"found {envelope.schema}, expected {FILE_SCHEMA}: written for another version of convplan"
        raise ErrataError(path=source, field="schema", reason=reason)
    return tuple(_decode(raw, ErrataRule, source, _name(raw, place)) for place, raw in enumerate(envelope.rules))


def _decode(data: bytes | msgspec.Raw, kind: Any, source: str, rule: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as exc:
        field, reason = _explain(str(exc), data, kind)
        raise ErrataError(path=source, rule=rule, field=field, reason=reason) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        reason = f"found malformed JSON ({exc}), expected a file of errata"
        raise ErrataError(path=source, rule=rule, reason=reason) from exc


def _name(raw: msgspec.Raw, place: int) -> str:
    """What to call a rule in an error: its id if it has one, else its place in the file."""
    try:
        name = msgspec.json.decode(raw)["id"]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        name = None
    return _shorten(name) if isinstance(name, str) and name else f"rules[{place}]"


# What msgspec says; the place follows each sentence as " - at `$.knobs[...]`" or " - at `key` in `$.knobs`".
_SENTENCE = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$\.?(?P<place>[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"([A-Za-z_]\w*)|\[(\d+)\]")
_CHOICES: dict[str, tuple[str, ...]] = {"operations": get_args(Op), "layouts": get_args(Layout)}


def _explain(message: str, data: bytes | msgspec.Raw, kind: type[msgspec.Struct]) -> tuple[str, str]:
    """The field and `found "conv", expected one of …`, from msgspec's sentence and the file's own bytes."""
    parts = _SENTENCE.match(message)
    assert parts is not None, "the expression takes every text"
    what, field = parts["what"], (parts["place"] or "").replace("[...]", "")
    named = re.match(r"Object (missing required|contains unknown) field `(.*)`$", what, re.DOTALL)
    if named and named[1] == "missing required":
        return f"{field}.{named[2]}".lstrip("."), "found nothing, expected it in every rule and file"
    if named:
        known = _FIELDS.get(field, kind).__struct_fields__
        return f"{field}.{_shorten(named[2])}".lstrip(
            "."
        ), f"found an unknown field, expected one of {', '.join(known)}"
    own = re.match(r"(?:(\w+): )?(found .*)$", what, re.DOTALL)  # a sentence of this module's structs
    if own:
        return field or own[1] or "", own[2]
    found = _found_at(data, field)
    choices = _CHOICES.get(field.partition("[")[0])
    if choices and what.startswith("Invalid enum value"):
        return field, f"found {found}, expected one of {', '.join(choices)}"
    said = re.sub(r", got .*$", "", what.removeprefix("Expected ")).replace("`", "")
    where = " for a name in it" if parts["key"] else ""
    return field, f"found {found}, expected {said}{where}" if what.startswith("Expected ") else f"found {found}: {what}"


_FIELDS: dict[str, type[msgspec.Struct]] = {
    "cudnn": Versions,
    "compute_capability": Capabilities,
    **dict.fromkeys(("spatial_rank", "groups", "channels", "filters", "filter_taps", "elements"), Between),
}


def _found_at(data: bytes | msgspec.Raw, place: str) -> str:
    """The value at a place, as JSON, cut to a readable length."""
    try:
        value = msgspec.json.decode(data)
        for name, index in _STEP.findall(place):
            value = value[name] if name else value[int(index)]
        return _quote(value)
    except (msgspec.MsgspecError, RecursionError, LookupError, TypeError):
        return "something else"  # nested too deeply, or a number too long, to be read at all


def _quote(value: Any) -> str:
    return _shorten(msgspec.json.encode(value).decode())


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "…"
