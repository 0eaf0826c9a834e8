"""The real cuDNN, for tests that need no GPU to run."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convplan.engines.cudnn import library as finding
from convplan.engines.cudnn.configs import forget_choices
from convplan.engines.cudnn.descriptors import live_descriptors
from convplan.engines.cudnn.device import Device, load_for_absent_gpu
from convplan.engines.cudnn.engine import CudnnEngine
from convplan.engines.cudnn.enums import Attribute, AttributeType
from convplan.engines.cudnn.graph import forget_parts
from convplan.engines.cudnn.library import Library
from convplan.engines.cudnn.target import Target

H200 = Path(__file__).with_name("h200-cudnn-9.19.0.deviceprop.json")


@pytest.fixture
def library() -> Library:
    """cuDNN, able to build plans here whether or not there is a driver.

    The extra `test` installs it where NVIDIA has wheels for it; there its absence is a failure, elsewhere a skip.
    """
    if not any(
        Path(sighting.path).is_absolute() or "without" in sighting.trouble for sighting in finding.find_report()
    ):
        if (sys.platform, platform.machine()) == ("linux", "x86_64"):
            pytest.fail("cuDNN is not installed; pip install -e '.[test]' does that")
        pytest.skip("cuDNN has no wheel for this platform")
    return load_for_absent_gpu()


@pytest.fixture
def h200() -> Device:
    return Device.from_properties(H200)


@pytest.fixture
def target(library: Library, h200: Device) -> Target:
    """An H200 that is not there, for plans that are built and not run."""
    return Target.absent(h200)


@pytest.fixture
def cudnn(target: Target) -> CudnnEngine:
    """The engine for that GPU."""
    return CudnnEngine(target)


@pytest.fixture
def packed(library: Library, monkeypatch: pytest.MonkeyPatch) -> list[dict[Attribute, list[int]]]:
    """What each variant pack was given, for cuDNN does not give that back: numbers read at the addresses it got."""
    given: list[dict[Attribute, list[int]]] = []
    create, set_attribute, finalize = library.packing_unchecked
    numbers = {AttributeType.INT64: ctypes.c_int64, AttributeType.VOID_PTR: ctypes.c_size_t}

    def creating(*arguments: Any) -> int:
        given.append({})
        return int(create(*arguments))

    def setting(pack: Any, attribute: Any, kind: Any, count: Any, values: Any) -> int:
        status = int(set_attribute(pack, attribute, kind, count, values))
        found = (numbers[AttributeType(kind.value)] * count.value).from_address(
            ctypes.addressof(getattr(values, "_obj", values))
        )
        given[-1][Attribute(attribute.value)] = list(found)
        return status

    monkeypatch.setattr(library, "packing_unchecked", (creating, setting, finalize))
    return given


@pytest.fixture
def no_descriptor_left() -> Iterator[None]:
    """Every descriptor that a test made is destroyed after it."""

    def alive() -> int:
        forget_parts()
        forget_choices()
        gc.collect()
        return live_descriptors()

    before = alive()
    yield
    assert alive() == before
