"""GPUs from their properties, and the stand-in for a missing driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from building import configurations, convolution, plan, tensor

from convplan import EngineUnavailable, SpecError
from convplan.engines.cudnn import device as device_module
from convplan.engines.cudnn import library as finding
from convplan.engines.cudnn.descriptors import Descriptor
from convplan.engines.cudnn.device import Device, build_stand_in, cache_folder, stand_in_source
from convplan.engines.cudnn.enums import Attribute, BehaviorNote, DataType, DescriptorType, PointwiseMode
from convplan.engines.cudnn.library import Library

H200 = Path(__file__).with_name("h200-cudnn-9.19.0.deviceprop.json")

pytestmark = [pytest.mark.behaviour("C7"), pytest.mark.usefixtures("no_descriptor_left")]


def changed(**entries: object) -> bytes:
    return json.dumps({**json.loads(H200.read_bytes()), **entries}).encode()


# ---- properties


def test_a_device_is_read_from_a_file_or_its_bytes(h200: Device) -> None:
    assert (h200.name, h200.compute_capability, h200.cudnn_version) == ("NVIDIA H200", "9.0", None)
    assert Device.from_properties(str(H200)) == Device.from_properties(H200.read_bytes() + b"\0") == h200
    assert hash(Device.from_properties(h200.to_json())) == hash(h200)
    assert repr(h200) == "<NVIDIA H200, compute capability 9.0>"
    assert Device.from_properties(changed(deviceVer=1210)).compute_capability == "12.1"
    assert Device.from_properties(changed(deviceVer=860)).compute_capability == "8.6"
    assert Device.from_properties(changed(deviceName="other")) != h200


def test_the_version_that_wrote_the_properties_goes_with_them() -> None:
    written = Device.from_properties(changed(cudnnVersion=91900))
    assert written.cudnn_version == 91900
    assert Device.from_properties(written.to_json()) == written
    assert json.loads(written.to_json())["cudnnVersion"] == 91900


def test_the_library_takes_the_properties_and_gives_them_back(library: Library, h200: Device) -> None:
    descriptor = h200.descriptor(library)
    assert descriptor.finalized
    text = descriptor.get_text(Attribute.DEVICEPROP_JSON_REPRESENTATION)
    assert Device.from_properties(text.encode()) == h200


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "not JSON", id="empty"),
        pytest.param(b"\xff\xfe", "not JSON", id="not-text"),
        pytest.param(b"{" * 5000, "not JSON", id="nested-deep"),
        pytest.param(b"[" * 60000, "not JSON", id="lists-in-lists"),
        pytest.param(b"[1]", "found list, expected a JSON object", id="list"),
        pytest.param(b"{}", "deviceName is 'None', expected 1 to 255 bytes", id="nothing-in-it"),
        pytest.param(b" " * 70000, "more than 65536 bytes", id="too-long"),
        pytest.param(changed(deviceName="N" * 300), "deviceName is 'NNN.*expected 1 to 255 bytes", id="long-name"),
        pytest.param(changed(deviceName="\u00e9" * 200), "deviceName is .*expected 1 to 255 bytes", id="long-in-bytes"),
        pytest.param(changed(deviceName="a\x1b[2J"), "deviceName is .*printable", id="control-characters"),
        pytest.param(changed(deviceName=7), "deviceName is '7'", id="name-is-a-number"),
        pytest.param(changed(deviceVer="900"), "deviceVer is '900', expected 100 times", id="version-is-text"),
        pytest.param(changed(deviceVer=9), "deviceVer is '9', expected 100 times", id="version-too-small"),
        pytest.param(changed(deviceVer=True), "deviceVer is 'True'", id="version-is-true"),
        pytest.param(changed(multiProcessorCount=-1), "multiProcessorCount is -1, expected whole", id="negative"),
        pytest.param(changed(multiProcessorCount=1.5), "multiProcessorCount is 1.5, expected whole", id="fraction"),
        pytest.param(changed(multiProcessorCount=2**63), "multiProcessorCount is 9223372036854775808", id="64-bits"),
        pytest.param(changed(multiProcessorCount="x" * 999), "multiProcessorCount is x.*whole numbers", id="text"),
        pytest.param(changed(multiProcessorCount=[1]), r"multiProcessorCount is \[1\], expected one", id="a-list"),
        pytest.param(changed(maxGridSize=[]), r"maxGridSize is \[\], expected 3 numbers", id="no-sizes"),
        pytest.param(changed(maxGridSize=[1] * 20), "maxGridSize is .*expected 3 numbers", id="many-sizes"),
        pytest.param(changed(maxGridSize=7), "maxGridSize is 7, expected 3 numbers", id="one-size"),
        pytest.param(changed(more={"a": 1}), "more is {'a': 1}, expected whole", id="nested"),
        pytest.param(changed(**{"k" * 99: 1}), "found the entry 'kkk", id="long-key"),
        pytest.param(changed(**{f"k{i}": i for i in range(300)}), "entries, expected at most 256", id="many-entries"),
        pytest.param(changed(cudnnVersion="9"), "cudnnVersion is '9', expected a number such as 91900", id="version"),
    ],
)
def test_properties_that_are_none_are_refused_with_the_reason(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        Device.from_properties(data)
    assert "convplan doctor --device-properties" in str(caught.value)
    assert len(str(caught.value)) < 500
    file = tmp_path / "gpu.json"
    file.write_bytes(data)
    with pytest.raises(SpecError, match=message) as caught:
        Device.from_properties(file)
    assert str(caught.value).startswith(str(file))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"gone\.json: cannot be read: No such file"):
        Device.from_properties(tmp_path / "gone.json")


def test_properties_of_another_version_are_explained(library: Library) -> None:
    properties = json.loads(H200.read_bytes())
    del properties["l2CacheSize"]
    for version, writer in ((None, "an unknown cuDNN"), (90800, "cuDNN 9.8.0")):
        data = json.dumps(properties if version is None else {**properties, "cudnnVersion": version}).encode()
        with pytest.raises(SpecError) as caught:
            Device.from_properties(data).descriptor(library)
        message = str(caught.value)
        assert f"NVIDIA H200 were written by {writer}, and cuDNN {library.version_text} refuses them" in message
        assert "HasMember" in message, "cuDNN's own words"
        assert "convplan doctor --device-properties" in message


def test_a_cudnn_without_device_properties_is_named(
    library: Library, h200: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "version", 90701)
    with pytest.raises(EngineUnavailable, match=r"cuDNN 9\.8\.0 or newer for device properties, found 9\.7\.1"):
        h200.descriptor(library)


def test_the_device_of_this_machine_is_real_or_an_error(library: Library) -> None:
    if library.driver == "real":
        device = Device.current(0)
        assert device.cudnn_version == library.version
        assert device.descriptor(library).finalized
        with pytest.raises(EngineUnavailable, match="an NVIDIA GPU with the index 999"):
            Device.current(999)
    else:
        with pytest.raises(EngineUnavailable, match=r"an NVIDIA GPU and its driver \(libcuda.so.1\), found a stand-in"):
            Device.current(0)


# ---- building without a driver


def fused(library: Library) -> Descriptor:
    """The graph of gelu(conv(x, w) + b) in fp16, whose engines are all compiled at run time."""
    dims, strides = (4, 64, 16, 16), (64 * 256, 1, 16 * 64, 64)

    def virtual(uid: int) -> Descriptor:
        return (
            Descriptor(library, DescriptorType.TENSOR)
            .set(Attribute.TENSOR_DATA_TYPE, DataType.FLOAT)
            .set(Attribute.TENSOR_DIMENSIONS, dims)
            .set(Attribute.TENSOR_STRIDES, strides)
            .set(Attribute.TENSOR_UNIQUE_ID, uid)
            .set(Attribute.TENSOR_BYTE_ALIGNMENT, 16)
            .set(Attribute.TENSOR_IS_VIRTUAL, True)
            .finalize()
        )

    def pointwise(mode: PointwiseMode, y: Descriptor, x: Descriptor, b: Descriptor | None = None) -> Descriptor:
        kind = Descriptor(library, DescriptorType.POINTWISE).set(Attribute.POINTWISE_MODE, mode)
        kind.set(Attribute.POINTWISE_MATH_PREC, DataType.FLOAT).finalize()
        operation = Descriptor(library, DescriptorType.OPERATION_POINTWISE)
        operation.set(Attribute.OPERATION_POINTWISE_PW_DESCRIPTOR, kind).set(Attribute.OPERATION_POINTWISE_XDESC, x)
        if b is not None:
            operation.set(Attribute.OPERATION_POINTWISE_BDESC, b)
        return operation.set(Attribute.OPERATION_POINTWISE_YDESC, y).finalize()

    x, y = tensor(library, "x", dims, strides), tensor(library, "y", dims, strides)
    w = tensor(library, "w", (64, 64, 3, 3), (576, 1, 192, 64))
    b = tensor(library, "b", (1, 64, 1, 1), (64, 1, 64, 64))
    summed, shifted = virtual(1000), virtual(1001)
    values: dict[str, Any] = {"ALPHA": 1.0, "BETA": 0.0, "CONV_DESC": convolution(library), "W": w, "X": x, "Y": summed}
    operation = Descriptor(library, DescriptorType.OPERATION_CONVOLUTION_FORWARD)
    for name, value in values.items():
        operation.set(Attribute[f"OPERATION_CONVOLUTION_FORWARD_{name}"], value)
    added = pointwise(PointwiseMode.ADD, shifted, summed, b)
    activated = pointwise(PointwiseMode.GELU_FWD, y, shifted)
    graph = Descriptor(library, DescriptorType.OPERATIONGRAPH)
    return graph.set(Attribute.OPERATIONGRAPH_OPS, [operation.finalize(), added, activated]).finalize()


def test_engines_that_are_compiled_at_run_time_build_without_a_gpu(library: Library, h200: Device) -> None:
    assert library.can_compile
    device = h200.descriptor(library)
    configs = configurations(fused(library), device)
    assert configs
    (engine,) = configs[0].get_descriptors(Attribute.ENGINECFG_ENGINE, DescriptorType.ENGINE)
    assert BehaviorNote.RUNTIME_COMPILATION in engine.get(Attribute.ENGINE_BEHAVIOR_NOTE)
    built = plan(configs[0], device)
    text = built.get_text(Attribute.EXECUTION_PLAN_JSON_REPRESENTATION)
    assert len(text) > 20_000, "the compiled kernel is in it"
    restored = Descriptor(library, DescriptorType.EXECUTION_PLAN).set(Attribute.EXECUTION_PLAN_DEVICEPROP, device)
    restored.set(Attribute.EXECUTION_PLAN_JSON_REPRESENTATION, text).finalize()
    workspaces = [p.get_one(Attribute.EXECUTION_PLAN_WORKSPACE_SIZE) for p in (built, restored)]
    assert workspaces[0] == workspaces[1]


needs_no_driver = pytest.mark.skipif(finding.driver() == "real", reason="a machine with a driver needs no stand-in")


def elsewhere(code: str, **environ: str) -> subprocess.Popen[str]:
    header = "from convplan.engines.cudnn import device, library\nfrom pathlib import Path\n"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", header + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environ},
    )


@needs_no_driver
@pytest.mark.behaviour("B32")
def test_with_a_stand_in_there_is_no_warning_and_nothing_on_stderr(library: Library, tmp_path: Path) -> None:
    code = f"""
lib = device.load_for_absent_gpu()
device.load_for_absent_gpu()
d = device.Device.from_properties({str(H200)!r}).descriptor(lib)
print(lib.driver, lib.can_compile, lib is library.load(), d.finalized)
"""
    process = elsewhere(code, CONVPLAN_CACHE_DIR=str(tmp_path))
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, "stub True True True\n", "")
    assert [path.name[:17] for path in (tmp_path / "driver").iterdir()] == ["libcuda-stand-in-"]


@needs_no_driver
def test_processes_that_make_the_stand_in_at_once_all_get_a_whole_one(tmp_path: Path) -> None:
    code = "print(device.load_for_absent_gpu().driver)"
    processes = [elsewhere(code, CONVPLAN_CACHE_DIR=str(tmp_path)) for _ in range(4)]
    for process in processes:
        out, err = process.communicate()
        assert (process.returncode, out, err) == (0, "stub\n", "")
    assert len(list((tmp_path / "driver").iterdir())) == 1, "one file, and nothing left of the making"


@needs_no_driver
def test_a_damaged_stand_in_is_made_again(tmp_path: Path) -> None:
    path = build_stand_in(tmp_path / "driver")
    path.write_bytes(b"\x7fELF, and then the disk was full")
    process = elsewhere("print(device.load_for_absent_gpu().driver)", CONVPLAN_CACHE_DIR=str(tmp_path))
    assert process.communicate() == ("stub\n", "")
    assert len(path.read_bytes()) > 1000


def test_a_changed_source_is_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_stand_in(tmp_path)
    made = first.stat().st_mtime_ns
    assert build_stand_in(tmp_path) == first
    assert first.stat().st_mtime_ns == made, "made once"
    source = stand_in_source()
    monkeypatch.setattr(device_module, "stand_in_source", lambda: source + "int cuNewFunction(void) { return 34; }\n")
    second = build_stand_in(tmp_path)
    assert second != first
    assert first.exists()


def test_the_cache_directory_is_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder({"CONVPLAN_CACHE_DIR": "/somewhere"}) == Path("/somewhere/driver")
    assert cache_folder({}).parts[-2:] == ("convplan", "driver")


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        pytest.param("/nowhere/cc", "a C compiler to make one: CC is '/nowhere/cc', which is not there", id="missing"),
        pytest.param("false", "false ended with 1 and said: nothing", id="fails"),
        pytest.param("true", "true ended with 0 and said: nothing", id="makes-nothing"),
    ],
)
def test_a_compiler_that_cannot_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(EngineUnavailable, match=reason) as caught:
        build_stand_in(tmp_path / "driver")
    assert caught.value.engine == "cudnn"
    assert "or a stand-in for it to build plans for a GPU that is not here" in str(caught.value)
    assert list((tmp_path / "driver").iterdir()) == [], "nothing half made is left"


def test_no_compiler_at_all_names_those_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineUnavailable, match=r"found none of cc, gcc, clang\. Install one, or name it in CC"):
        build_stand_in(tmp_path / "driver")


@pytest.mark.parametrize("which", ["folder", "file"])
def test_code_that_others_can_write_is_not_loaded(tmp_path: Path, which: str) -> None:
    path = build_stand_in(tmp_path / "driver")
    (path.parent if which == "folder" else path).chmod(0o777)
    with pytest.raises(EngineUnavailable, match="can be written by other users"):
        build_stand_in(tmp_path / "driver")


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineUnavailable, match=f"{tmp_path}/file/driver cannot be used: "):
        build_stand_in(tmp_path / "file" / "driver")
