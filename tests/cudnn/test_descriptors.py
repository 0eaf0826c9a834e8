"""Descriptors of the real library, without a GPU: from a tensor to a plan that is stored and restored."""

from __future__ import annotations

import gc
import json
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
from building import FILTER, HALF_NHWC, configurations, fprop, plan, tensor

from convplan.engines.cudnn.descriptors import CudnnError, Descriptor, _member, check, live_descriptors, make_handle
from convplan.engines.cudnn.device import Device
from convplan.engines.cudnn.enums import (
    Attribute,
    AttributeType,
    DataType,
    DescriptorType,
    HeurMode,
    KnobType,
    NumericalNote,
    Status,
)
from convplan.engines.cudnn.library import Library

pytestmark = pytest.mark.usefixtures("no_descriptor_left")


@pytest.mark.behaviour("C7")
def test_a_plan_is_enumerated_built_stored_and_restored_without_a_gpu(library: Library, h200: Device) -> None:
    device = h200.descriptor(library)
    graph = fprop(library)
    configs = configurations(graph, device)
    assert len(configs) > 20
    assert all(config.finalized for config in configs)
    found = []
    for config in configs:
        (engine,) = config.get_descriptors(Attribute.ENGINECFG_ENGINE, DescriptorType.ENGINE)
        choices = config.get_descriptors(Attribute.ENGINECFG_KNOB_CHOICES, DescriptorType.KNOB_CHOICE, at_most=64)
        knobs = tuple(
            (choice.get_one(Attribute.KNOB_CHOICE_KNOB_TYPE), choice.get_one(Attribute.KNOB_CHOICE_KNOB_VALUE))
            for choice in choices
        )
        notes = engine.get(Attribute.ENGINE_NUMERICAL_NOTE)
        found.append((engine.get_one(Attribute.ENGINE_GLOBAL_INDEX), knobs, notes))
    assert len({(index, knobs) for index, knobs, _ in found}) == len(configs), "each is another engine or other knobs"
    assert all(isinstance(kind, KnobType) for _, knobs, _ in found for kind, _ in knobs)
    assert any(NumericalNote.TENSOR_CORE in notes for _, _, notes in found)

    # From its identity alone, as a store keeps it: engine, knobs.
    index, knobs, _ = next(row for row in found if row[1])
    engine = (
        Descriptor(library, DescriptorType.ENGINE)
        .set(Attribute.ENGINE_OPERATION_GRAPH, graph)
        .set(Attribute.ENGINE_GLOBAL_INDEX, index)
        .set(Attribute.ENGINE_DEVICEPROP, device)
        .finalize()
    )
    choices = [
        Descriptor(library, DescriptorType.KNOB_CHOICE)
        .set(Attribute.KNOB_CHOICE_KNOB_TYPE, kind)
        .set(Attribute.KNOB_CHOICE_KNOB_VALUE, value)
        .finalize()
        for kind, value in knobs
    ]
    config = Descriptor(library, DescriptorType.ENGINECFG).set(Attribute.ENGINECFG_ENGINE, engine)
    built = plan(config.set(Attribute.ENGINECFG_KNOB_CHOICES, choices).finalize(), device)
    workspace_bytes = built.get_one(Attribute.EXECUTION_PLAN_WORKSPACE_SIZE)
    assert workspace_bytes >= 0
    text = built.get_text(Attribute.EXECUTION_PLAN_JSON_REPRESENTATION)
    assert json.loads(text)["cudnnVersion"] == library.version

    restored = (
        Descriptor(library, DescriptorType.EXECUTION_PLAN)
        .set(Attribute.EXECUTION_PLAN_DEVICEPROP, device)
        .set(Attribute.EXECUTION_PLAN_JSON_REPRESENTATION, text)
        .finalize()
    )
    assert restored.get_one(Attribute.EXECUTION_PLAN_WORKSPACE_SIZE) == workspace_bytes
    assert restored.get_text(Attribute.EXECUTION_PLAN_JSON_REPRESENTATION) == text


def test_values_are_read_back_as_they_were_set(library: Library) -> None:
    descriptor = tensor(library, "x", *HALF_NHWC)
    assert descriptor.get(Attribute.TENSOR_DIMENSIONS) == list(HALF_NHWC[0])
    assert descriptor.get_one(Attribute.TENSOR_DATA_TYPE) is DataType.HALF
    assert descriptor.get_one(Attribute.TENSOR_IS_VIRTUAL) is False
    assert descriptor.get_one(Attribute.TENSOR_UNIQUE_ID) == ord("x")
    assert descriptor.get_one(Attribute.TENSOR_DIMENSIONS) == HALF_NHWC[0][0]
    with pytest.raises(TypeError, match="use get_descriptors"):
        descriptor.get(Attribute.ENGINECFG_ENGINE)
    with pytest.raises(TypeError, match="use get_text"):
        descriptor.get(Attribute.EXECUTION_PLAN_JSON_REPRESENTATION)


def test_at_most_so_many_descriptors_come_back(library: Library, h200: Device) -> None:
    graph, device = fprop(library), h200.descriptor(library)
    heuristic = (
        Descriptor(library, DescriptorType.ENGINEHEUR)
        .set(Attribute.ENGINEHEUR_OPERATION_GRAPH, graph)
        .set(Attribute.ENGINEHEUR_MODE, HeurMode.A)
        .set(Attribute.ENGINEHEUR_DEVICEPROP, device)
        .finalize()
    )
    before = live_descriptors()
    few = heuristic.get_descriptors(Attribute.ENGINEHEUR_RESULTS, DescriptorType.ENGINECFG, at_most=3)
    assert len(few) == 3
    assert live_descriptors() == before + 3
    many = heuristic.get_descriptors(Attribute.ENGINEHEUR_RESULTS, DescriptorType.ENGINECFG, at_most=200)
    assert len(many) > 3, "asking again is possible"
    assert live_descriptors() == before + 3 + len(many), "those that the library did not fill are gone"


def test_an_unknown_number_stays_a_number() -> None:
    assert _member(KnobType, 2) is KnobType.TILE_SIZE
    assert _member(KnobType, 4044) == 4044


# ---- errors


def test_every_status_has_a_name_and_one_kind() -> None:
    for status in Status:
        error = CudnnError(status, "cudnnBackendFinalize", "TENSOR", "x < 1")
        assert error.status_name == status.name
        assert f"cudnnBackendFinalize(TENSOR) returned {status.name} ({int(status)}): x < 1" in str(error)
        kinds = (error.bad_param, error.not_supported, error.internal, error.execution_failed, status < 2000)
        assert sum(kinds) == 1
    assert CudnnError(3099, "f").status_name == "STATUS_3099"
    assert CudnnError(3099, "f").not_supported
    assert CudnnError(Status.INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, "f").out_of_memory
    assert CudnnError(Status.INTERNAL_ERROR_COMPILATION_FAILED, "f").compilation_failed
    assert not CudnnError(Status.INTERNAL_ERROR, "f").out_of_memory
    assert CudnnError(Status.NOT_INITIALIZED, "f").not_initialized


def test_the_library_gives_every_status_the_same_name(library: Library) -> None:
    for status in Status:
        told = library.cdll.cudnnGetErrorString(status).decode()
        assert told in (f"CUDNN_STATUS_{status.name}", "CUDNN_UNKNOWN_STATUS"), status
    assert library.cdll.cudnnGetErrorString(Status.NOT_SUPPORTED_SHAPE) == b"CUDNN_STATUS_NOT_SUPPORTED_SHAPE"


def test_errors_survive_pickling() -> None:
    error = CudnnError(4001, "cudnnBackendFinalize", "EXECUTION_PLAN", "nvrtc: no")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.status, copy.function, copy.what, copy.text) == (4001, *error.__reduce__()[1][1:])
    assert str(copy) == str(error)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param(
            lambda lib: Descriptor(lib, DescriptorType.TENSOR).finalize(),
            r"cudnnBackendFinalize\(TENSOR\) returned BAD_PARAM \(2000\): .*_nbDims",
            id="nothing-set",
        ),
        pytest.param(
            lambda lib: tensor(lib, "x", (1, 2, 3, 4), (24, 12)),
            r"cudnnBackendFinalize\(TENSOR\).*_nbDims != _nbStrides",
            id="ranks-differ",
        ),
        pytest.param(
            lambda lib: tensor(lib, "x", *FILTER).set(Attribute.TENSOR_UNIQUE_ID, 1),
            r"cudnnBackendSetAttribute\(TENSOR_UNIQUE_ID\) returned",
            id="set-after-finalize",
        ),
        pytest.param(
            lambda lib: Descriptor(lib, DescriptorType.TENSOR).get(Attribute.TENSOR_DIMENSIONS),
            r"cudnnBackendGetAttribute\(TENSOR_DIMENSIONS\) returned",
            id="get-before-finalize",
        ),
        pytest.param(
            lambda lib: Descriptor(lib, 99),  # type: ignore[arg-type]
            r"cudnnBackendCreateDescriptor\(descriptor type 99\) returned",
            id="no-such-kind",
        ),
        pytest.param(
            lambda lib: Descriptor(lib, DescriptorType.DEVICEPROP).set(
                Attribute.DEVICEPROP_DEVICE_ID, 0, as_type=AttributeType.INT64
            ),
            r"cudnnBackendSetAttribute\(DEVICEPROP_DEVICE_ID\) returned BAD_PARAM_ATTRIBUTE_TYPE \(2010\): .*INT32",
            id="wrong-type",
        ),
    ],
)
def test_a_wrong_call_says_which_call_what_and_why(library: Library, wrong: Any, message: str) -> None:
    with pytest.raises(CudnnError, match=message):
        wrong(library)


def test_an_engine_that_does_not_exist_is_not_supported(library: Library, h200: Device) -> None:
    engine = Descriptor(library, DescriptorType.ENGINE).set(Attribute.ENGINE_OPERATION_GRAPH, fprop(library))
    engine.set(Attribute.ENGINE_GLOBAL_INDEX, 100_000).set(Attribute.ENGINE_DEVICEPROP, h200.descriptor(library))
    with pytest.raises(CudnnError) as caught:
        engine.finalize()
    assert caught.value.not_supported
    assert not engine.finalized


def test_closed_and_missing_descriptors_are_refused_before_the_library_sees_them(library: Library) -> None:
    closed = tensor(library, "x", *FILTER)
    closed.close()
    for wrong in (closed, None):
        operation = Descriptor(library, DescriptorType.OPERATION_CONVOLUTION_FORWARD)
        with pytest.raises(ValueError, match=r"OPERATION_CONVOLUTION_FORWARD_X was given .*expected open descriptors"):
            operation.set(Attribute.OPERATION_CONVOLUTION_FORWARD_X, wrong)


def test_restoring_a_plan_for_no_gpu_is_an_error_and_not_the_end_of_the_process(library: Library) -> None:
    descriptor = Descriptor(library, DescriptorType.EXECUTION_PLAN)
    descriptor.set(Attribute.EXECUTION_PLAN_JSON_REPRESENTATION, '{"cudnnVersion":91900}')
    with pytest.raises(ValueError, match="set EXECUTION_PLAN_HANDLE or EXECUTION_PLAN_DEVICEPROP first"):
        descriptor.finalize()


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"cudnnVersion":90100,"schemaVersion":1}'])
def test_a_damaged_plan_is_refused(library: Library, h200: Device, text: str) -> None:
    descriptor = Descriptor(library, DescriptorType.EXECUTION_PLAN)
    descriptor.set(Attribute.EXECUTION_PLAN_DEVICEPROP, h200.descriptor(library))
    with pytest.raises(CudnnError, match="EXECUTION_PLAN"):
        descriptor.set(Attribute.EXECUTION_PLAN_JSON_REPRESENTATION, text).finalize()


def test_success_raises_nothing(library: Library) -> None:
    check(library, 0, "cudnnBackendExecute")


# ---- ownership


def test_a_descriptor_is_destroyed_with_its_object_and_keeps_its_children(library: Library) -> None:
    before = live_descriptors()
    graph = fprop(library)
    gc.collect()
    assert live_descriptors() == before + 6, "graph, operation, convolution, three tensors"
    graph.close()
    graph.close()
    gc.collect()
    assert live_descriptors() == before
    assert repr(graph) == "<OPERATIONGRAPH descriptor, closed>"
    for _ in range(50):
        fprop(library)
    gc.collect()
    assert live_descriptors() == before


def test_threads_make_and_drop_descriptors_at_once(library: Library, h200: Device) -> None:
    before = live_descriptors()
    counts: list[int] = []

    def work() -> None:
        device = h200.descriptor(library)
        counts.extend(len(configurations(fprop(library), device)) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert len(counts) == 40
    assert len(set(counts)) == 1
    assert live_descriptors() == before


def test_a_process_that_still_holds_descriptors_ends_in_peace(library: Library) -> None:
    code = """
import warnings
warnings.simplefilter("ignore")
from convplan.engines.cudnn.descriptors import Descriptor, DescriptorType
from convplan.engines.cudnn.library import load
kept = [Descriptor(load(), DescriptorType.TENSOR) for _ in range(100)]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_handle_needs_a_gpu(library: Library) -> None:
    if library.driver == "real":
        handle = make_handle(library)
        handle.set_stream(0)
        handle.close()
        handle.close()
        assert handle.pointer == 0
    else:
        with pytest.raises(CudnnError, match="cudnnCreate returned NOT_INITIALIZED") as caught:
            make_handle(library)
        assert caught.value.not_initialized
