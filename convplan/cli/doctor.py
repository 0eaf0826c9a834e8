"""`convplan doctor`: what is installed, loaded, missing, and why. It reports; it repairs and changes nothing.

Every probe is guarded on its own, and one that fails becomes a line of the report: this has to run where the rest does
not. So nothing here may import torch outside `_Torch`, which first tries the import in another process, because a torch
built for another machine does not raise, it kills.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import msgspec

from convplan.cli.output import CommandError, Result
from convplan.report import one_line, table

Status = Literal["ok", "warning", "problem"]

IMPORT_LIMIT_S = 120.0  # for importing torch in another process; a cold disk is slow
REQUIRED = ("torch", "msgspec", "sqlalchemy", "platformdirs", "psutil", "typer", "rich")
OPTIONAL = {"numpy": "", "transformers": "demo", "scikit-image": "demo", "pillow": "demo"}  # package: extra
LOADED_LIBRARIES = (
    "torch_cpu",
    "torch_cuda",
    "dnnl",
    "mkl",
    "gomp",
    "iomp",
    "omp",
    "openblas",
    "cudnn",
    "cublas",
    "cuda",
)


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """One line of the report.

    Args:
        section, name: what was looked at.
        value: what was found.
        status: `ok`; `warning` for what works but not fully; `problem` for something that convplan needs and lacks.
        fix: what to do about it.
    """

    section: str
    name: str
    value: str
    status: Status = "ok"
    fix: str = ""


class _Torch:
    """Torch, or the reason why it cannot be imported."""

    def __init__(self) -> None:
        self.trouble = ""
        self.fix = ""
        self._module: ModuleType | None = None
        try:
            self._import()
        except Exception as exc:  # a broken installation may raise anything
            self.trouble = f"{type(exc).__name__}: {exc}"
        if self.trouble and not self.fix:
            self.fix = "install it again: pip install --force-reinstall torch"

    def _import(self) -> None:
        if "torch" not in sys.modules:
            if importlib.util.find_spec("torch") is None:
                self.trouble, self.fix = "not installed", "pip install torch"
                return
            self.trouble = _import_elsewhere("torch")
            if self.trouble:
                return
        import torch

        self._module = torch

    @property
    def cuda(self) -> bool:
        """Torch works, and is built for CUDA."""
        return self._module is not None and self._module.version.cuda is not None

    def need(self) -> ModuleType:
        """The module, for probes that cannot do without."""
        if self._module is None:
            raise _TorchNeededError
        return self._module


class _TorchNeededError(Exception):
    """A probe needs torch, which is not there."""


Probe = Callable[[_Torch], Iterator[Finding]]


def _import_elsewhere(module: str) -> str:
    """What goes wrong when another process imports the module; empty when nothing does."""
    return _run_elsewhere(f"import {module}", "importing it")[1]


def _run_elsewhere(code: str, what: str) -> tuple[str, str]:
    """What another process prints, and what goes wrong there; that is empty when nothing does."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_LIMIT_S,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"{what} takes more than {IMPORT_LIMIT_S:.0f} s"
    if done.returncode < 0:
        return "", f"{what} ends the process with {signal.Signals(-done.returncode).name}"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return "", lines[-1] if lines else f"{what} ends the process with exit code {done.returncode}"
    return done.stdout, ""


def doctor() -> Result:
    """Run every probe."""
    findings = examine()
    problems = [finding for finding in findings if finding.status == "problem"]
    lines: list[str] = []
    for section in dict.fromkeys(finding.section for finding in findings):
        rows = [(f.name, f.value, _mark(f)) for f in findings if f.section == section]
        lines += [table({section: "left", "": "left", " ": "left"}, rows), ""]
    lines.append(
        "Something that convplan needs is missing:" if problems else "Everything that convplan needs is there."
    )
    lines += [f"  {finding.name}: {one_line(finding.value)}. To fix: {finding.fix}" for finding in problems]
    return Result("\n".join(lines), {"ok": not problems, "findings": findings}, ok=not problems)


def _mark(finding: Finding) -> str:
    return "" if finding.status == "ok" else f"[{finding.status}]"


def examine() -> list[Finding]:
    """Every finding, in the order of the sections."""
    torch = _Torch()
    return [finding for section, probe in PROBES.items() for finding in _guarded(section, probe, torch)]


def _guarded(section: str, probe: Probe, torch: _Torch) -> Iterator[Finding]:
    """What a probe finds, and if it fails half way, that."""
    try:
        yield from probe(torch)
    except _TorchNeededError:
        yield Finding(section=section, name=section, value="not known without torch")
    except Exception as exc:  # a probe that fails is a finding
        value = f"could not be found out: {type(exc).__name__}: {exc}"
        yield Finding(section=section, name=section, value=value, status="warning")


def _versions(torch: _Torch) -> Iterator[Finding]:
    import convplan

    yield Finding(section="versions", name="python", value=f"{platform.python_version()} ({sys.executable})")
    yield Finding(section="versions", name="system", value=platform.platform())
    yield Finding(
        section="versions", name="convplan", value=f"{convplan.__version__} ({Path(convplan.__file__).parent})"
    )
    for package in (*REQUIRED, *OPTIONAL):
        yield _package(package, torch)


def _package(package: str, torch: _Torch) -> Finding:
    version = _installed_version(package)
    if package == "torch" and torch.trouble:
        value = f"{version} installed, but cannot be imported: {torch.trouble}" if version else torch.trouble
        return Finding(section="versions", name="torch", value=value, status="problem", fix=torch.fix)
    if package == "torch":
        return Finding(section="versions", name="torch", value=str(torch.need().__version__))
    if version:
        return Finding(section="versions", name=package, value=version)
    if package in REQUIRED:
        fix = f"pip install {package}"
        return Finding(section="versions", name=package, value="not installed", status="problem", fix=fix)
    extra = OPTIONAL[package]
    wanted = f" (pip install convplan[{extra}])" if extra else " (not needed)"
    return Finding(section="versions", name=package, value=f"not installed{wanted}")


def _installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor(torch: _Torch) -> Iterator[Finding]:
    from convplan import _environment

    yield Finding(section="processor", name="model", value=_environment.cpu_model())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(section="processor", name="cores", value=f"{usable} usable of {os.cpu_count()}")
    module = torch.need()
    yield Finding(section="processor", name="threads", value=str(module.get_num_threads()))
    for label, value in _environment.current("cpu").items:
        if label in ("capability", "onednn", "matmul_precision", "conv_precision"):
            yield Finding(section="processor", name=label, value=value)


def _gpus(torch: _Torch) -> Iterator[Finding]:
    module = torch.need()
    built = module.version.cuda
    if built is None:
        yield Finding(section="gpu", name="cuda", value="none: this torch is built for the CPU")
        return
    yield Finding(section="gpu", name="cuda", value=f"torch is built for {built}")
    if not module.cuda.is_available():
        yield Finding(section="gpu", name="devices", value="torch sees none: no GPU, or no working driver")
        return
    for index in range(module.cuda.device_count()):
        found = module.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {found.major}.{found.minor}"
        yield Finding(section="gpu", name=f"cuda:{index}", value=f"{found.name}, {memory}, {capability}")


def _cudnn(torch: _Torch) -> Iterator[Finding]:
    """The library that torch would load, found by looking, without loading it."""
    del torch  # also found where torch cannot be imported
    places = [Path(place) / "lib" for place in _package_folders("torch")]
    places += [Path(place) / "cudnn" / "lib" for place in _package_folders("nvidia")]
    files = [
        file for place in places for file in sorted(place.glob("*cudnn*")) if re.search(r"cudnn(64)?[_.]", file.name)
    ]
    versions = [
        f"{distribution.metadata['Name']} {distribution.version}"
        for distribution in importlib.metadata.distributions()
        if (distribution.metadata["Name"] or "").startswith("nvidia-cudnn")
    ]
    found = ", ".join([*dict.fromkeys(versions), *map(str, files[:3])])
    yield Finding(section="gpu", name="cudnn", value=found or "none: torch ships no cuDNN here")


def _package_folders(name: str) -> list[str]:
    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations or ()) if spec is not None else []


def _cudnn_library(torch: _Torch) -> Iterator[Finding]:
    """What the cudnn engine would use: looked for here, loaded in another process, because a broken one may kill."""
    from convplan.engines.cudnn import library

    def finding(name: str, value: str, status: Status = "ok", fix: str = "") -> Finding:
        return Finding(section="cudnn", name=name, value=value, status=status, fix=fix)

    cuda = torch.cuda
    seen = [sighting for sighting in library.find_report() if sighting.trouble != "no libcudnn"]
    for sighting in seen:
        if Path(sighting.path).is_absolute() or sighting.trouble:
            value = sighting.path or f"{sighting.folder}: {sighting.trouble}"
            yield finding(f"in {sighting.origin}", value, "warning" if sighting.trouble else "ok")
    # Where torch runs on CUDA, the cuDNN that torch has loaded is the one that is used.
    printed, trouble = _run_elsewhere(("import torch\n" if cuda else "") + _LOAD_CUDNN, "loading it")
    found: dict[str, Any] = msgspec.json.decode(printed) if not trouble else {"trouble": trouble}
    if "trouble" in found:
        needed = cuda or any(Path(sighting.path).is_absolute() or sighting.trouble for sighting in seen)
        yield finding("used", f"none: {found['trouble']}", "warning" if needed else "ok", library.HOW_TO_GET)
        return
    yield finding("used", f"{found['version']} from {found['origin']}: {found['path']}")
    for name, path, missing in found["parts"]:
        yield finding(name, path or f"missing: {missing}", "warning" if missing else "ok")
    drivers = {"real": "loaded", "none": f"none ({library.DRIVER}): plans can be built for other machines, not run"}
    driver = found["driver"]
    yield finding("driver", drivers.get(driver, driver), "warning" if cuda and driver != "real" else "ok")


_LOAD_CUDNN = """
import json, warnings
from convplan._errors import ConvPlanError
from convplan.engines.cudnn.library import load
warnings.simplefilter("ignore")
try:
    it = load()
    found = {"version": it.version_text, "origin": it.origin, "path": it.path, "parts": it.loaded, "driver": it.driver}
except ConvPlanError as exc:
    found = {"trouble": getattr(exc, "needs", str(exc))}
print(json.dumps(found))
"""


def device_properties(out: Path | None) -> Result:
    """Describe the first GPU of this machine, so that plans can be built for it elsewhere.

    Args:
        out: the file to write; None: the JSON is the command's output.
    """
    from convplan.engines.cudnn.device import Device
    from convplan.engines.cudnn.library import version_text

    device = Device.current()
    written = device.to_json()
    if out is None:
        return Result(written.decode(), msgspec.json.decode(written))
    try:
        out.write_bytes(written)
    except OSError as exc:
        raise CommandError(f"{out} cannot be written: {exc.strerror or exc}", type(exc).__name__) from exc
    version = version_text(device.cudnn_version or 0)
    return Result(
        f"{out}: {device.name}, compute capability {device.compute_capability}, as cuDNN {version} knows it",
        {"file": str(out), "name": device.name, "compute_capability": device.compute_capability, "cudnn": version},
    )


def _loaded(torch: _Torch) -> Iterator[Finding]:
    """Which copies of the libraries that compute are in this process: two of one kind often explain slowness."""
    torch.need()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        yield Finding(section="loaded libraries", name="libraries", value="only known on Linux")
        return
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if line.count("/"))
    pattern = re.compile(rf"lib({'|'.join(LOADED_LIBRARIES)})\w*[-.].*so")
    for path in paths:
        if pattern.match(Path(path).name):
            yield Finding(section="loaded libraries", name=Path(path).name, value=path)


def _store(torch: _Torch) -> Iterator[Finding]:
    del torch
    from convplan._errors import StoreError
    from convplan._store import PlanStore

    def finding(name: str, value: str, status: Status = "ok") -> Finding:
        fix = "move the file away or set CONVPLAN_STORE to another place" if status == "problem" else ""
        return Finding(section="store", name=name, value=value, status=status, fix=fix)

    try:
        store = PlanStore.default()
    except StoreError as exc:
        yield finding("location", str(exc), "problem")
        return
    yield finding("location", store.location)
    if "://" not in store.location and not Path(store.location).exists():
        yield from _future_store(Path(store.location), finding)
        return
    with store:
        try:
            rows = list(store.rows())
        except StoreError as exc:
            yield finding("readable", f"no: {exc.reason}", "problem")
            return
        unusable = sum(bool(row.trouble) for row in rows)
        yield finding("readable", "yes")
        yield finding("plans", f"{len(rows)}" + (f", {unusable} unusable (see convplan check)" if unusable else ""))
        yield finding("row schemas", ", ".join(sorted({str(row.schema) for row in rows})) or "none yet")
        try:
            store.delete(key_prefix="-")  # no key begins like this: takes the write lock, and changes nothing
        except StoreError as exc:
            yield finding("writable", f"no: {exc.reason}; new plans are only kept in memory", "warning")
        else:
            yield finding("writable", "yes")


def _future_store(path: Path, finding: Callable[..., Finding]) -> Iterator[Finding]:
    """A store that nobody has written to yet. It is not made here: looking changes nothing."""
    folder = next(parent for parent in path.parents if parent.exists())
    yield finding("plans", "none yet: the store is made when the first plan is stored")
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        yield finding("writable", "yes")
    else:
        yield finding("writable", f"no: {folder} cannot be written; new plans are only kept in memory", "warning")


def _engines(torch: _Torch) -> Iterator[Finding]:
    torch.need()
    from convplan._problem import OPS, Problem
    from convplan.engines import registry

    try:
        names = registry.names()
    except Exception as exc:  # without engines nothing can be planned
        value, fix = f"cannot be loaded: {type(exc).__name__}: {exc}", "install convplan again"
        yield Finding(section="engines", name="engines", value=value, status="problem", fix=fix)
        return
    for name in names:
        engine = registry.get(name)
        answers = []
        for op in OPS:
            support = engine.supports(Problem.dense(op, (1, 8, 16, 16), (8, 8, 3, 3), padding=1))
            answers.append(f"{op} {'yes' if support.ok else f'no ({support.reason})'}")
        used = "" if engine.by_default else "; runs only where a policy names it"
        yield Finding(section="engines", name=name, value=f"3x3, float32, cpu: {', '.join(answers)}{used}")


def _variables(torch: _Torch) -> Iterator[Finding]:
    del torch
    from convplan._store import hide_password

    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith("CONVPLAN_")}
    for name, value in found.items():
        yield Finding(section="environment variables", name=name, value=hide_password(value))
    if not found:
        yield Finding(section="environment variables", name="CONVPLAN_*", value="none set")


PROBES: dict[str, Probe] = {
    "versions": _versions,
    "processor": _processor,
    "gpu": _gpus,
    "cudnn": _cudnn,
    "cudnn library": _cudnn_library,
    "loaded libraries": _loaded,
    "engines": _engines,
    "store": _store,
    "environment variables": _variables,
}
