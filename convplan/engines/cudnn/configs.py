"""Which engines cuDNN offers for a graph, with their knobs, notes and workspace: heuristics, fallback list, by hand.

A configuration is an engine's number and its knobs by name; that is its identity here, in the store and in errata.
Filtering is the planner's business, except for errata, which need cuDNN's version and the device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from convplan.engines.base import Notes
from convplan.engines.cudnn.descriptors import CudnnError, Descriptor, Spare, last_text
from convplan.engines.cudnn.enums import Attribute, BehaviorNote, DescriptorType, HeurMode, KnobType, NumericalNote

if TYPE_CHECKING:
    from convplan.engines.cudnn.library import Library
    from convplan.engines.cudnn.target import Target

# Sources by name, in the order in which they are asked (B13).
SOURCES: dict[str, HeurMode] = {
    "mode_a": HeurMode.A,
    "mode_b": HeurMode.B,
    "instant": HeurMode.INSTANT,
    "fallback": HeurMode.FALLBACK,
}
MOST_CONFIGURATIONS = 512  # one list of the heuristics; those seen hold fewer than 100
MOST_KNOBS = 48  # of one engine; asking for fewer than it has is an error
_KNOB_PREFIX = "knob_"  # of knobs newer than the table of names


class Configuration(msgspec.Struct, frozen=True):
    """One way to run a graph.

    Args:
        engine: cuDNN's global index of the engine.
        knobs: (name, value) pairs in cuDNN's order, names as in `knob_name`.
        notes: what the engine says of its arithmetic and its needs.
        workspace_bytes: scratch memory as the heuristics know it; None where only a built plan tells.
        source: a key of `SOURCES`.
    """

    engine: int
    knobs: tuple[tuple[str, int], ...]
    notes: Notes
    workspace_bytes: int | None
    source: str


def knob_name(knob: int) -> str:
    """The name of a knob's number: that of the enumeration in lower case."""
    try:
        return KnobType(knob).name.lower()
    except ValueError:
        return f"{_KNOB_PREFIX}{knob}"


def knob_number(name: str) -> int:
    """The number of a knob's name.

    Raises:
        ValueError: there is no such knob.
    """
    if name.startswith(_KNOB_PREFIX):
        return int(name.removeprefix(_KNOB_PREFIX))
    try:
        return int(KnobType[name.upper()])
    except KeyError:
        raise ValueError(f"unknown knob {name!r}, expected the name of a cudnnBackendKnobType_t") from None


class EngineSpace(msgspec.Struct, frozen=True):
    """What one engine can be set to.

    Args:
        engine: cuDNN's global index.
        knobs: name, least value, largest value and step of each knob. Not every combination builds.
    """

    engine: int
    knobs: tuple[tuple[str, int, int, int], ...]


def engine_spaces(graph: Descriptor, target: Target) -> list[EngineSpace]:
    """Every engine that has anything to offer for a graph, with its knobs, in the order of their indices."""
    found = []
    spare = Spare(graph.library, DescriptorType.KNOB_INFO)
    try:
        for index in range(graph.get_one(Attribute.OPERATIONGRAPH_ENGINE_GLOBAL_COUNT)):
            try:
                engine = _engine(graph, target, index)
            except CudnnError as exc:
                if exc.not_supported or exc.bad_param:
                    continue
                raise
            knobs = engine.get_descriptors(
                Attribute.ENGINE_KNOB_INFO, DescriptorType.KNOB_INFO, at_most=MOST_KNOBS, spare=spare
            )
            found.append(EngineSpace(index, tuple(map(_range, knobs))))
    finally:
        last_text(graph.library)  # left behind by engines that have nothing to offer
        spare.close()
    return found


def _range(knob: Descriptor) -> tuple[str, int, int, int]:
    low, high, step = (
        int(knob.get_one(attribute))
        for attribute in (
            Attribute.KNOB_INFO_MINIMUM_VALUE,
            Attribute.KNOB_INFO_MAXIMUM_VALUE,
            Attribute.KNOB_INFO_STRIDE,
        )
    )
    return knob_name(knob.get_one(Attribute.KNOB_INFO_TYPE)), low, high, max(step, 1)


def described_configuration(
    graph: Descriptor, target: Target, engine: int, knobs: Mapping[str, int], source: str
) -> tuple[Configuration, Descriptor]:
    """A configuration that nobody proposed, as `heuristic_configurations` describes those it finds.

    Returns:
        The description, and the configuration itself, of which a plan can be built.

    Raises:
        CudnnError: the engine does not run this graph here, or a knob's value is out of its range.
        ValueError: an unknown knob.
    """
    which = _engine(graph, target, engine)
    config = _configuration(which, knobs)
    return Configuration(engine, tuple(knobs.items()), notes_of(which), _workspace_bytes(config), source), config


def heuristic_configurations(graph: Descriptor, target: Target, source: str) -> list[Configuration]:
    """What one source proposes for a graph, best guess first.

    Returns:
        Configurations in cuDNN's order, duplicates left in; empty where the source has nothing to say.
    """
    heuristics = Descriptor(graph.library, DescriptorType.ENGINEHEUR)
    heuristics.set(Attribute.ENGINEHEUR_OPERATION_GRAPH, graph)
    heuristics.set(Attribute.ENGINEHEUR_MODE, SOURCES[source])
    if target.properties is not None:
        heuristics.set(Attribute.ENGINEHEUR_DEVICEPROP, target.properties)
    try:
        heuristics.finalize()
        found = heuristics.get_descriptors(
            Attribute.ENGINEHEUR_RESULTS,
            DescriptorType.ENGINECFG,
            at_most=min(heuristics.count(Attribute.ENGINEHEUR_RESULTS), MOST_CONFIGURATIONS),
        )
    except CudnnError as exc:
        if exc.not_supported:
            return []
        raise
    finally:
        last_text(graph.library)  # left behind by heuristics that succeeded
    knobs = Spare(graph.library, DescriptorType.KNOB_CHOICE)
    try:
        return [_described(config, source, knobs) for config in found]
    finally:
        knobs.close()


def _described(config: Descriptor, source: str, spare: Spare) -> Configuration:
    (engine,) = config.get_descriptors(Attribute.ENGINECFG_ENGINE, DescriptorType.ENGINE, at_most=1)
    knobs = config.get_descriptors(
        Attribute.ENGINECFG_KNOB_CHOICES, DescriptorType.KNOB_CHOICE, at_most=MOST_KNOBS, spare=spare
    )
    return Configuration(
        engine=engine.get_one(Attribute.ENGINE_GLOBAL_INDEX),
        knobs=tuple(
            (
                knob_name(knob.get_one(Attribute.KNOB_CHOICE_KNOB_TYPE)),
                knob.get_one(Attribute.KNOB_CHOICE_KNOB_VALUE),
            )
            for knob in knobs
        ),
        notes=notes_of(engine),
        workspace_bytes=_workspace_bytes(config),
        source=source,
    )


def notes_of(engine: Descriptor) -> Notes:
    """The notes that hang on an engine descriptor."""
    numerical = engine.get(Attribute.ENGINE_NUMERICAL_NOTE)
    behavior = engine.get(Attribute.ENGINE_BEHAVIOR_NOTE)
    return Notes(
        numerical=tuple(_note_name(NumericalNote, note) for note in numerical),
        behavior=tuple(_note_name(BehaviorNote, note) for note in behavior),
    )


def _note_name(kind: type[NumericalNote] | type[BehaviorNote], note: int) -> str:
    try:
        return str(kind(note).name)
    except ValueError:  # newer than the table; it must not be lost, for filters name what they drop
        return f"NOTE_{note}"


def _workspace_bytes(config: Descriptor) -> int | None:
    try:
        return int(config.get_one(Attribute.ENGINECFG_WORKSPACE_SIZE))
    except CudnnError:
        return None


def engine_configuration(graph: Descriptor, target: Target, engine: int, knobs: Mapping[str, int]) -> Descriptor:
    """The finalised configuration of an engine with knobs by name.

    Raises:
        CudnnError: the engine does not run this graph here, or a knob's value is out of its range.
        ValueError: an unknown knob.
    """
    return _configuration(_engine(graph, target, engine), knobs)


def _configuration(engine: Descriptor, knobs: Mapping[str, int]) -> Descriptor:
    library = engine.library
    config = Descriptor(library, DescriptorType.ENGINECFG)
    config.set(Attribute.ENGINECFG_ENGINE, engine)
    if knobs:
        config.set(Attribute.ENGINECFG_KNOB_CHOICES, [_choice(library, *knob) for knob in knobs.items()])
    return config.finalize()


def forget_choices() -> None:
    """Let go of the descriptors that configurations share."""
    _choice.cache_clear()


def _engine(graph: Descriptor, target: Target, index: int) -> Descriptor:
    which = Descriptor(graph.library, DescriptorType.ENGINE)
    which.set(Attribute.ENGINE_OPERATION_GRAPH, graph)
    which.set(Attribute.ENGINE_GLOBAL_INDEX, index)
    if target.properties is not None:
        which.set(Attribute.ENGINE_DEVICEPROP, target.properties)
    return which.finalize()


@functools.lru_cache(maxsize=512)  # few engines with few values each make up most plans
def _choice(library: Library, name: str, value: int) -> Descriptor:
    choice = Descriptor(library, DescriptorType.KNOB_CHOICE)
    choice.set(Attribute.KNOB_CHOICE_KNOB_TYPE, knob_number(name))
    choice.set(Attribute.KNOB_CHOICE_KNOB_VALUE, value)
    return choice.finalize()
