"""GPUs as cuDNN knows them, present or not, and what stands in for their driver where there is none (C7).

cuDNN writes down what it wants to know about a GPU as JSON. With that file, plans for the GPU can be listed, built and
stored on a machine that has no GPU at all; only running them needs the real one. Such files come from strangers, and
cuDNN trusts them (9.19 ends the process over a long device name), so they are checked here before it sees them.

What a plan is built from is deliberately elsewhere (`configs`, `plans`), and so is finding the library (`library`).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from convplan._errors import EngineUnavailable, SpecError
from convplan.engines.cudnn import library as _library
from convplan.engines.cudnn.descriptors import CudnnError, Descriptor
from convplan.engines.cudnn.enums import Attribute, DescriptorType
from convplan.engines.cudnn.library import DRIVER, ENGINE, STUB_ANSWER, Library, version_text

log = logging.getLogger("convplan.engines.cudnn")

OLDEST_WITH_PROPERTIES = 90800  # device properties came with cuDNN 9.8
MAX_BYTES = 65_536  # of a file of properties; cuDNN 9.19 writes 566
MAX_NAME_BYTES = 255  # of a device's name: cuDNN has room for 256 and does not look
MAX_KEYS = 256
VERSION_KEY = "cudnnVersion"  # convplan's addition to the file: which cuDNN wrote it
_WHAT = "device properties"
WRITE_AGAIN = "`convplan doctor --device-properties` writes them where the GPU is"

COMPILE_LIMIT_S = 60.0

# The driver's functions that cuDNN 9.19 looks up by name. It prints a line for each one that is missing, every
# time. Those that load a compiled kernel say yes without doing anything: cuDNN loads what it compiled as part of
# building a plan. All others answer CUDA_ERROR_STUB_LIBRARY, as NVIDIA's own stand-in does, so nothing can ever run.
_ACCEPTING = ("cuModuleUnload", "cuLibraryUnload", "cuKernelSetAttribute")
_GIVING = ("cuModuleLoadData", "cuModuleGetFunction", "cuLibraryLoadData", "cuLibraryGetKernel")
_TELLING = ("cuGetErrorString", "cuGetErrorName")
_REFUSING = (
    "cuInit",
    "cuDriverGetVersion",
    "cuGetProcAddress",
    "cuGetProcAddress_v2",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuCtxGetCurrent",
    "cuCtxGetLimit",
    "cuCtxPopCurrent",
    "cuCtxPushCurrent",
    "cuStreamGetCtx",
    "cuKernelGetAttribute",
    "cuLaunchCooperativeKernel",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuLibraryLoadFromFile",
    "cuLinkAddData",
    "cuLinkComplete",
    "cuLinkCreate",
    "cuLinkDestroy",
    "cuOccupancyMaxPotentialClusterSize",
    "cuTensorMapEncodeIm2col",
    "cuTensorMapEncodeTiled",
)


class Device:
    """A GPU, known by its properties. Equal properties are equal devices.

    Attributes:
        name: such as `NVIDIA H200`.
        compute_capability: such as `9.0`.
        multiprocessors: how many it has; None where the properties do not say.
        cudnn_version: of the cuDNN that wrote the properties, such as 91900; None where the file does not say.
    """

    def __init__(self, properties: Mapping[str, object], cudnn_version: int | None = None) -> None:
        if trouble := _trouble(properties):
            raise SpecError(f"{_WHAT}: {trouble}. {WRITE_AGAIN}")
        self._properties = dict(properties)
        self.cudnn_version = cudnn_version
        self.name = str(properties["deviceName"])
        multiprocessors = properties.get("multiProcessorCount")
        self.multiprocessors = multiprocessors if isinstance(multiprocessors, int) else None
        number = int(str(properties["deviceVer"]))  # 900 is 9.0 and 1210 is 12.1
        self.compute_capability = f"{number // 100}.{number % 100 // 10}"

    @classmethod
    def from_properties(cls, source: str | os.PathLike[str] | bytes) -> Device:
        """A GPU that need not be here.

        Args:
            source: path of a JSON file, or its content as bytes. Written by `convplan doctor --device-properties`, or
                by cuDNN itself.

        Raises:
            SpecError: not such a file; says what was found where.
        """
        if isinstance(source, bytes):
            data, where = source, _WHAT
        else:
            where = os.fspath(source)
            try:
                with Path(source).open("rb") as file:
                    data = file.read(MAX_BYTES + 1)
            except OSError as exc:
                raise SpecError(f"{where}: cannot be read: {exc.strerror or exc}. {WRITE_AGAIN}") from exc
        if len(data) > MAX_BYTES:
            raise SpecError(f"{where}: more than {MAX_BYTES} bytes, expected the properties of one GPU. {WRITE_AGAIN}")
        try:
            found = msgspec.json.decode(data.rstrip(b"\0"))
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
            raise SpecError(f"{where}: not JSON: {exc}. {WRITE_AGAIN}") from exc
        if not isinstance(found, dict):
            raise SpecError(f"{where}: found {type(found).__name__}, expected a JSON object. {WRITE_AGAIN}")
        version = found.pop(VERSION_KEY, None)
        if version is not None and (type(version) is not int or not 0 < version < 2**31):
            raise SpecError(f"{where}: {VERSION_KEY} is {version!r}, expected a number such as 91900. {WRITE_AGAIN}")
        if trouble := _trouble(found):
            raise SpecError(f"{where}: {trouble}. {WRITE_AGAIN}")
        return cls(found, version)

    @classmethod
    def current(cls, index: int = 0) -> Device:
        """A GPU of this machine, asked through cuDNN.

        Args:
            index: among the devices that CUDA shows.

        Raises:
            EngineUnavailable: no cuDNN, no driver, no such GPU, or a cuDNN older than 9.8.
        """
        if (found := _library.driver()) != "real":
            instead = "a stand-in for it" if found == "stub" else "none"
            raise EngineUnavailable(engine=ENGINE, needs=f"an NVIDIA GPU and its driver ({DRIVER}), found {instead}")
        library = _library.load()
        _need_properties(library)
        descriptor = Descriptor(library, DescriptorType.DEVICEPROP)
        try:
            descriptor.set(Attribute.DEVICEPROP_DEVICE_ID, index).finalize()
            text = descriptor.get_text(Attribute.DEVICEPROP_JSON_REPRESENTATION)
        except CudnnError as exc:
            raise EngineUnavailable(engine=ENGINE, needs=f"an NVIDIA GPU with the index {index}: {exc}") from exc
        return cls(msgspec.json.decode(text), library.version)

    def to_json(self) -> bytes:
        """What `from_properties` reads; cuDNN reads it too."""
        version = {} if self.cudnn_version is None else {VERSION_KEY: self.cudnn_version}
        return msgspec.json.encode({**version, **self._properties})

    def descriptor(self, library: Library) -> Descriptor:
        """A finalized DEVICEPROP descriptor, to give to heuristics, engines and plans instead of a handle.

        Raises:
            SpecError: cuDNN refuses the properties, most likely because another version wrote them.
            EngineUnavailable: this cuDNN is older than 9.8.
        """
        _need_properties(library)
        descriptor = Descriptor(library, DescriptorType.DEVICEPROP)
        try:
            descriptor.set(Attribute.DEVICEPROP_JSON_REPRESENTATION, msgspec.json.encode(self._properties))
            return descriptor.finalize()
        except CudnnError as exc:
            writer = "an unknown cuDNN" if self.cudnn_version is None else f"cuDNN {version_text(self.cudnn_version)}"
            raise SpecError(
                f"device properties of {self.name} were written by {writer}, and cuDNN {library.version_text} refuses "
                f"them: {exc}. They belong to one cuDNN version: use that one, or write them again with this one "
                "(convplan doctor --device-properties, where the GPU is)"
            ) from exc

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        return f"<{self.name}, compute capability {self.compute_capability}>"


def _need_properties(library: Library) -> None:
    if library.version < OLDEST_WITH_PROPERTIES:
        wanted = version_text(OLDEST_WITH_PROPERTIES)
        raise EngineUnavailable(
            engine=ENGINE, needs=f"cuDNN {wanted} or newer for device properties, found {library.version_text}"
        )


def _trouble(properties: Mapping[str, object]) -> str:
    """Why these cannot be the properties of a GPU, or would be dangerous to give to cuDNN; empty for good ones."""
    if len(properties) > MAX_KEYS:
        return f"{len(properties)} entries, expected at most {MAX_KEYS}"
    name, number = properties.get("deviceName"), properties.get("deviceVer")
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        return f"deviceName is {str(name)[:80]!r}, expected 1 to {MAX_NAME_BYTES} bytes of printable text"
    if type(number) is not int or not 100 <= number < 10_000:
        return f"deviceVer is {str(number)[:80]!r}, expected 100 times the major and 10 times the minor, such as 900"
    for key, value in properties.items():
        if len(key) > 64 or not key.isprintable():
            return f"found the entry {key[:80]!r}, expected names of at most 64 characters"
        is_size = key.startswith("max") and key.endswith("Size")  # of a grid or a block, in x, y and z
        numbers = value if isinstance(value, list) else [value]
        if key == "deviceName":
            continue
        if isinstance(value, list) != is_size or len(numbers) != (3 if is_size else 1):
            return f"{key} is {str(value)[:80]}, expected {'3 numbers' if is_size else 'one number'}"
        if not all(isinstance(item, int) and 0 <= item < 2**63 for item in numbers):
            return f"{key} is {str(value)[:80]}, expected whole numbers of 0 to 2**63 - 1"
    return ""


_lock = threading.Lock()
_stand_in: ctypes.CDLL | None = None  # kept for ever: cuDNN has taken its functions


def load_for_absent_gpu() -> Library:
    """cuDNN for building plans for a GPU that is not here: a stand-in for the driver first, where there is none.

    With a real driver this is `library.load()`. The stand-in can compile and store plans but run none. It is made with
    the C compiler when it is first needed, and kept in the cache directory.

    Raises:
        EngineUnavailable: no cuDNN; or no driver and no way to make a stand-in.

    Concurrency: safe from several threads; two processes at once may both make the stand-in, and either's is used.
    """
    global _stand_in
    if _library.driver() == "none":
        with _lock:
            if _stand_in is None:
                _stand_in = _load_stand_in()
    return _library.load()


def _load_stand_in() -> ctypes.CDLL:
    path = build_stand_in(cache_folder())
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError:  # damaged since it was made
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(build_stand_in(cache_folder())), mode=ctypes.RTLD_GLOBAL)


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the stand-in is kept: beside the default plan store."""
    from convplan._store import DIRECTORY_VARIABLE

    if directory := environ.get(DIRECTORY_VARIABLE):
        return Path(directory) / "driver"
    import platformdirs

    return Path(platformdirs.user_cache_dir("convplan", appauthor=False)) / "driver"


def stand_in_source() -> str:
    """The stand-in in C: one line a function."""
    lines = [f"int {name}(void) {{ return {STUB_ANSWER}; }}" for name in _REFUSING]
    lines += [f"int {name}(void) {{ return 0; }}" for name in _ACCEPTING]
    lines += [f"int {name}(void **made) {{ *made = (void *)&cuInit; return 0; }}" for name in _GIVING]
    message = f"{DRIVER} is a stand-in of convplan's: plans can be built, not run"
    lines += [f'int {name}(int error, const char **text) {{ *text = "{message}"; return 0; }}' for name in _TELLING]
    return "\n".join(lines) + "\n"


def build_stand_in(folder: Path) -> Path:
    """The stand-in's file, made if it is not there; another source or machine has a file of its own.

    Raises:
        EngineUnavailable: no C compiler, a compiler that fails, or a folder that cannot be trusted or written.
    """
    source = stand_in_source()
    digest = hashlib.sha256(f"{platform.machine()}\n{source}".encode()).hexdigest()[:16]
    path = folder / f"libcuda-stand-in-{digest}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_if_shared(folder)
        if path.exists():
            _refuse_if_shared(path)
            return path
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            _compile(source, made)
            made.chmod(0o700)
            made.replace(path)  # whole or not at all, whoever else is doing the same
    except OSError as exc:
        raise _unavailable(f"{folder} cannot be used: {exc}") from exc
    log.info("made a stand-in for the missing driver: %s", path)
    return path


def _refuse_if_shared(path: Path) -> None:
    """Refuse what others could have written: the file is code that runs in this process."""
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _unavailable(f"{path} can be written by other users, expected one that only its owner can write")


def _compile(source: str, target: Path) -> None:
    chosen = shlex.split(os.environ.get("CC", ""))
    command = chosen or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not command or shutil.which(command[0]) is None:
        found = f"CC is {' '.join(chosen)!r}, which is not there" if chosen else "found none of cc, gcc, clang"
        raise _unavailable(f"a C compiler to make one: {found}. Install one, or name it in CC")
    flags = ["-x", "c", "-shared", "-fPIC", "-O1", "-nostdlib", f"-Wl,-soname,{DRIVER}", "-o", str(target), "-"]
    try:
        done = subprocess.run(
            [*command, *flags],
            input=source,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise _unavailable(f"{command[0]} took more than {COMPILE_LIMIT_S:.0f} s to make one") from exc
    if done.returncode or not target.exists():
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise _unavailable(f"{command[0]} ended with {done.returncode} and said: {said}")


def _unavailable(reason: str) -> EngineUnavailable:
    needs = f"a driver ({DRIVER}), or a stand-in for it to build plans for a GPU that is not here: {reason}"
    return EngineUnavailable(engine=ENGINE, needs=needs)
