"""Finding cuDNN and loading it, with everything that it would otherwise look for in vain.

Places are tried in one order: the wheel that torch depends on (or torch's own folder), a separate wheel, the system. A
libcudnn that is in the process already, because torch runs on CUDA, comes before all of them: two copies would not know
each other's handles. The parts that cuDNN opens by bare name while it works (its sublibraries, NVRTC) are loaded here
first, so that they are found wherever it was found. A stand-in for a missing driver is deliberately elsewhere, in
`device`, and so is every other call of the library, in `descriptors`.

Neither torch nor the library is loaded by importing this; looking (`find_report`) loads nothing either.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import sys
import threading
import warnings
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Literal, NamedTuple

from convplan._errors import ConvPlanWarning, EngineUnavailable

log = logging.getLogger("convplan.engines.cudnn")

Origin = Literal["torch", "wheel", "system"]
Driver = Literal["real", "stub", "none"]

SONAME = "libcudnn.so.9"
DRIVER = "libcuda.so.1"
OLDEST = 90100  # 9.1.0: the first release whose sublibraries and statuses are those of today
STUB_ANSWER = 34  # CUDA_ERROR_STUB_LIBRARY: what NVIDIA's stand-in and the one in `device` answer to every question
ENGINE = "cudnn"
HOW_TO_GET = "pip install nvidia-cudnn-cu13 (or -cu12, as the CUDA of your driver), or a torch built for CUDA"

# name: whether plans can be made without it, and whether it is loaded ahead. Each needs those above it.
SUBLIBRARIES = {
    "graph": ("needed", "ahead"),
    "heuristic": ("needed", "ahead"),
    "engines_precompiled": ("needed", "ahead"),
    "engines_runtime_compiled": ("optional", "ahead"),
    "ops": ("optional", "when used"),
    "cnn": ("optional", "when used"),
    "adv": ("optional", "when used"),
}

_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "cudnnGetVersion": (c_size_t, ()),
    "cudnnGetCudartVersion": (c_size_t, ()),
    "cudnnGetErrorString": (c_char_p, (c_int,)),
    "cudnnGetLastErrorString": (None, (c_char_p, c_size_t)),
    "cudnnCreate": (c_int, (POINTER(c_void_p),)),
    "cudnnDestroy": (c_int, (c_void_p,)),
    "cudnnSetStream": (c_int, (c_void_p, c_void_p)),
    "cudnnBackendCreateDescriptor": (c_int, (c_int, POINTER(c_void_p))),
    "cudnnBackendDestroyDescriptor": (c_int, (c_void_p,)),
    "cudnnBackendFinalize": (c_int, (c_void_p,)),
    "cudnnBackendSetAttribute": (c_int, (c_void_p, c_int, c_int, c_int64, c_void_p)),
    "cudnnBackendGetAttribute": (c_int, (c_void_p, c_int, c_int, c_int64, POINTER(c_int64), c_void_p)),
    "cudnnBackendExecute": (c_int, (c_void_p, c_void_p, c_void_p)),
}


class Place(NamedTuple):
    """A folder that may hold cuDNN; None stands for wherever the system's loader looks."""

    origin: Origin
    folder: Path | None


class Sighting(NamedTuple):
    """What was found in a place: the library's path, or `trouble` that says why there is none to use."""

    origin: Origin
    folder: str
    path: str
    trouble: str


class Part(NamedTuple):
    """One library that belongs to cuDNN: where it is, or why it is missing.

    Attributes:
        name: such as `libcudnn_graph.so.9`.
        path: the file, or the bare name where the system's loader found it; empty when it is missing.
        trouble: why it is missing, empty when it is not.
    """

    name: str
    path: str
    trouble: str = ""


class Library:
    """cuDNN, loaded.

    Attributes:
        cdll: its functions, with argument types.
        version: such as 91900.
        origin: `torch`, `wheel` or `system`.
        path: of the file.
        cuda_major: the CUDA it was built for, such as 13.
        loaded: the parts beside it: sublibraries and NVRTC.
        has_nvrtc: NVRTC is loaded.
        execute_unchecked: `cudnnBackendExecute` for the hot path; it takes `c_void_p` only, which nothing checks.
        packing_unchecked: so with `cudnnBackendCreateDescriptor`, `SetAttribute` and `Finalize`.
        has_runtime_compiled: so are the engines that are compiled at run time.
    """

    def __init__(self, cdll: ctypes.CDLL, origin: Origin, path: str, parts: Sequence[Part]) -> None:
        self.cdll, self.origin, self.path = cdll, origin, path
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(cdll, name)
            function.restype, function.argtypes = result, arguments
        # The same function once more: ctypes takes 0.1 us for looking at the types of three pointers.
        self.execute_unchecked = cdll["cudnnBackendExecute"]
        making = ("CreateDescriptor", "SetAttribute", "Finalize")
        self.packing_unchecked = tuple(cdll[f"cudnnBackend{name}"] for name in making)
        self.version = int(cdll.cudnnGetVersion())
        self.cuda_major = int(cdll.cudnnGetCudartVersion()) // 1000
        nvrtc = _load_nvrtc(self.cuda_major, Path(path).parent)
        self.loaded = (*parts, nvrtc)
        self.has_nvrtc = not nvrtc.trouble
        self.has_runtime_compiled = not any(p.trouble for p in parts if "engines_runtime_compiled" in p.name)

    @property
    def version_text(self) -> str:
        """Such as `9.19.0`."""
        return version_text(self.version)

    @property
    def driver(self) -> Driver:
        """The driver that is in the process now: `stub` is a stand-in that can build plans but run none."""
        return driver()

    @property
    def can_compile(self) -> bool:
        """Engines with the note RUNTIME_COMPILATION can be built: NVRTC, their sublibrary and a driver are there."""
        return self.has_nvrtc and self.has_runtime_compiled and self.driver != "none"

    def __repr__(self) -> str:
        return f"<cuDNN {self.version_text} from {self.origin}: {self.path}>"


def version_text(version: int) -> str:
    """`9.19.0` for 91900, and `8.9.7` for 8907: the digits moved with version 9."""
    if version < 90000:
        return f"{version // 1000}.{version % 1000 // 100}.{version % 100}"
    return f"{version // 10000}.{version % 10000 // 100}.{version % 100}"


def version_trouble(version: int) -> str:
    """Why a version cannot be used, naming it and the oldest that can; empty when it can."""
    if version >= OLDEST:
        return ""
    return f"version {version_text(version)}, expected {version_text(OLDEST)} or newer"


def places() -> tuple[Place, ...]:
    """Where cuDNN may be on this machine, in the order in which the places are tried."""
    wheel: Origin = "torch" if _torch_requires_wheel() else "wheel"
    found = [Place("torch", Path(folder) / "lib") for folder in _package_folders("torch")]
    found += [Place(wheel, Path(folder) / "cudnn" / "lib") for folder in _package_folders("nvidia")]
    variables = [os.environ.get(name, "") for name in ("CUDNN_PATH", "CUDA_HOME", "CUDA_PATH")]
    roots = [Path(value) for value in (*variables, "/usr/local/cuda") if value]
    by_path = [Path(value) for value in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if value]
    usual = [Path(f"/usr/lib/{platform.machine()}-linux-gnu"), Path("/usr/lib64"), Path("/usr/local/lib")]
    folders = [*by_path, *(root / lib for root in roots for lib in ("lib64", "lib")), *usual]
    return (*found, *(Place("system", folder) for folder in dict.fromkeys(folders)), Place("system", None))


def _torch_requires_wheel() -> bool:
    """Whether the installed torch depends on a cuDNN wheel: that wheel is torch's own, any other is separate."""
    try:
        needs = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(re.match(r"nvidia[-_]cudnn[-_]cu\d", need, re.IGNORECASE) for need in needs)


def _package_folders(name: str) -> list[str]:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a package that is half removed, or blocked
        return []
    return list(spec.submodule_search_locations or ()) if spec is not None else []


def examine(place: Place) -> Sighting:
    """Look into a folder, loading nothing."""
    folder = place.folder
    if folder is None:
        return Sighting(place.origin, "the loader's own search", SONAME, "")

    def sighting(path: str = "", trouble: str = "") -> Sighting:
        return Sighting(place.origin, str(folder), path, trouble)

    try:
        path = folder / SONAME
        if not path.is_file():
            others = sorted(file.name for file in folder.glob("libcudnn.so.[0-9]*"))
            if others:
                wanted = f"expected {SONAME}, version {version_text(OLDEST)} or newer"
                return sighting(trouble=f"found {', '.join(others)}, {wanted}")
            return sighting(trouble="no libcudnn")
        needed = [_sublibrary(name) for name, (need, _) in SUBLIBRARIES.items() if need == "needed"]
        missing = [name for name in needed if not (folder / name).is_file()]
        if missing:
            return sighting(trouble=f"found {SONAME} without {', '.join(missing)}, which it needs")
    except OSError as exc:
        return sighting(trouble=f"cannot be read: {exc}")
    return sighting(path=str(path))


def find_report(where: Sequence[Place] | None = None) -> list[Sighting]:
    """What there is in each place, most preferred first. Loads nothing and never raises.

    Args:
        where: None: `places()`.
    """
    try:
        return [examine(place) for place in (places() if where is None else where)]
    except Exception as exc:  # for the doctor, who comes when things are broken
        return [Sighting("system", "", "", f"could not look: {type(exc).__name__}: {exc}")]


def _sublibrary(name: str) -> str:
    return f"libcudnn_{name}.so.9"


def _resident(name: str) -> ctypes.CDLL | None:
    """A library that is in the process already, by its soname."""
    try:
        return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | ctypes.RTLD_GLOBAL)
    except OSError:
        return None


class _SymbolInfo(ctypes.Structure):
    _fields_ = (("file", c_char_p), ("base", c_void_p), ("symbol", c_char_p), ("address", c_void_p))


def clear_cuda_error(library: Library) -> int:
    """Have the CUDA runtime forget this thread's last error, and say which it was (0: none, or no runtime is loaded).

    The next call that asks would take it for its own, be it torch's (B18).
    """
    runtime = _resident(f"libcudart.so.{library.cuda_major}")
    return 0 if runtime is None else int(runtime.cudaGetLastError())


def _path_of(cdll: ctypes.CDLL, function: str) -> str:
    """The file that a loaded function comes from."""
    info = _SymbolInfo()
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = (c_void_p, POINTER(_SymbolInfo))
    if not dladdr(ctypes.cast(getattr(cdll, function), c_void_p), ctypes.byref(info)) or not info.file:
        return SONAME
    return os.fsdecode(info.file)


def driver() -> Driver:
    """Which driver the process has; a real one is loaded if it is there. It is not initialized: forks stay possible."""
    try:
        cuda = ctypes.CDLL(DRIVER, mode=ctypes.RTLD_GLOBAL)
        answer = cuda.cuDriverGetVersion(ctypes.byref(c_int()))
    except (OSError, AttributeError):
        return "none"
    return "stub" if answer == STUB_ANSWER else "real"


def load_from(where: Sequence[Place]) -> Library:
    """Load cuDNN from the first of these places that works, ignoring what the process has already. Never cached.

    Raises:
        EngineUnavailable: none works; lists each place with what was found there.
    """
    troubles = []
    for place in where:
        sighting = examine(place)
        if not sighting.trouble:
            try:
                library = _load(sighting)
            except (OSError, AttributeError) as exc:  # no library of this machine, or one without cuDNN's functions
                sighting = sighting._replace(trouble=f"cannot be loaded: {exc}")
            else:
                if not (old := version_trouble(library.version)):
                    return library
                sighting = sighting._replace(trouble=f"found {old}")
        troubles.append(f"{sighting.folder}: {sighting.trouble}")
        log.debug("cuDNN in %s: %s", *sighting[1::2])
    seen = [text for text in troubles if not text.endswith(": no libcudnn")]
    looked = "; ".join(seen) or f"none in {', '.join(str(place.folder) for place in where if place.folder)}"
    needs = f"cuDNN {version_text(OLDEST)} or newer ({SONAME}), found: {looked}. {HOW_TO_GET}"
    raise EngineUnavailable(engine=ENGINE, needs=needs)


def _load(sighting: Sighting) -> Library:
    """Load the parts, then the library, so that it finds them by name. Raises OSError where one is broken."""
    if not Path(sighting.path).is_absolute():
        cdll = ctypes.CDLL(sighting.path, mode=ctypes.RTLD_GLOBAL)
        path = _path_of(cdll, "cudnnGetVersion")
        return Library(cdll, sighting.origin, path, _load_parts(Path(path).parent))
    parts = _load_parts(Path(sighting.path).parent)
    return Library(ctypes.CDLL(sighting.path, mode=ctypes.RTLD_GLOBAL), sighting.origin, sighting.path, parts)


def _load_parts(folder: Path) -> list[Part]:
    """The sublibraries beside the library, those that making plans uses loaded.

    Raises:
        OSError: one that is needed cannot be loaded.
    """
    parts = []
    for name, (need, when) in SUBLIBRARIES.items():
        part = Part(_sublibrary(name), str(folder / _sublibrary(name)))
        try:
            if when == "ahead":
                ctypes.CDLL(part.path, mode=ctypes.RTLD_GLOBAL)
            elif not Path(part.path).is_file():
                raise FileNotFoundError(f"not in {folder}")
        except OSError as exc:
            if need == "needed":
                raise
            part = Part(part.name, "", str(exc))
        parts.append(part)
    return parts


def _load_nvrtc(cuda_major: int, folder: Path) -> Part:
    """The compiler for engines that are compiled at run time, of the CUDA version that cuDNN was built for."""
    name = f"libnvrtc.so.{cuda_major}"
    site = folder.parent.parent  # of a wheel: site-packages/nvidia
    beside = (site / f"cu{cuda_major}" / "lib", site / "cuda_nvrtc" / "lib", folder)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    files = [str(place / name) for place in (*beside, Path(home) / "lib64")]
    if (present := _resident(name)) is not None:
        return Part(name, _path_of(present, "nvrtcVersion"))
    troubles = []
    for file in (*(file for file in files if Path(file).is_file()), name):
        try:
            ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
        except OSError as exc:
            troubles.append(str(exc))
        else:
            return Part(name, file)
    return Part(name, "", "; ".join(troubles))


_lock = threading.Lock()
_outcome: Library | EngineUnavailable | None = None


def load() -> Library:
    """cuDNN for this process: loaded at the first call, the same ever after.

    When NVRTC or the driver is missing, a `ConvPlanWarning` says once what cannot be done without it; engines that
    need it are to be left out where `Library.can_compile` is False.

    Raises:
        EngineUnavailable: none that can be used; says what was found where, what is needed, and how to get it. Later
            calls raise the same without looking again.

    Concurrency: safe from several threads; all get the same library.
    """
    global _outcome
    with _lock:
        first = _outcome is None
        if _outcome is None:
            try:
                _outcome = _find()
            except EngineUnavailable as exc:
                _outcome = exc
        outcome = _outcome
    if isinstance(outcome, EngineUnavailable):
        raise EngineUnavailable(engine=outcome.engine, needs=outcome.needs)
    if first:
        log.info("using %r", outcome)
        for message in shortcomings(outcome):
            warnings.warn(message, ConvPlanWarning, stacklevel=2)
    return outcome


def _find() -> Library:
    if not sys.platform.startswith("linux"):
        raise EngineUnavailable(engine=ENGINE, needs=f"Linux, found {sys.platform}")
    present = _resident(SONAME)
    if present is None:
        return load_from(places())
    path = _path_of(present, "cudnnGetVersion")
    parts: list[Part] = []
    with contextlib.suppress(OSError):  # it works already, whatever its folder looks like
        parts = _load_parts(Path(path).parent)
    library = Library(present, _origin_of(path), path, parts)
    if old := version_trouble(library.version):
        raise EngineUnavailable(engine=ENGINE, needs=f"a newer cuDNN: this process uses {path}, {old}. {HOW_TO_GET}")
    return library


def _origin_of(path: str) -> Origin:
    folder = Path(path).resolve().parent
    for place in places():
        if place.folder is not None and place.folder.resolve() == folder:
            return place.origin
    return "torch" if "torch" in sys.modules else "system"


def shortcomings(library: Library) -> list[str]:
    """What this library cannot do here, one sentence in a list, or none."""
    missing = []
    if library.driver == "none":
        missing.append(f"NVIDIA's driver ({DRIVER})")
    nvrtc = library.loaded[-1]
    missing += [f"{nvrtc.name} ({nvrtc.trouble})"] if nvrtc.trouble else []
    if not library.has_runtime_compiled:
        missing.append(_sublibrary("engines_runtime_compiled"))
    if not missing:
        return []
    return [
        f"cuDNN {library.version_text} ({library.path}) works here without {' and '.join(missing)}: engines that are "
        "compiled at run time are left out" + (", and no plan can run" if library.driver == "none" else "")
    ]
