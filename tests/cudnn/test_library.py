"""Finding cuDNN: the order of places, what is said of those that do not work, and what a process ends up with.

Files that only have to be found are made up; whatever is loaded is the real library. What can happen once in a process
only (loading, warning) happens in processes of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from convplan import EngineUnavailable
from convplan.engines.cudnn import library as finding
from convplan.engines.cudnn.library import Library, Place

NEEDED = ("graph", "heuristic", "engines_precompiled")
FACTS = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    it = library.load()
    assert library.load() is it
said = [(w.category.__name__, str(w.message)) for w in caught]
print(json.dumps({"path": it.path, "origin": it.origin, "version": it.version, "driver": it.driver,
                  "parts": it.loaded, "can_compile": it.can_compile, "has_nvrtc": it.has_nvrtc,
                  "torch": "torch" in sys.modules, "said": said}))
"""


def elsewhere(code: str, **environ: str) -> dict[str, Any]:
    """What a process of its own prints."""
    header = "from convplan.engines.cudnn import library\n"
    done = subprocess.run(
        [sys.executable, "-c", header + code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environ},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def files(folder: Path, *names: str, content: bytes = b"this is no library") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(content)
    return folder


def made_up(folder: Path) -> Path:
    """A folder that looks as if cuDNN were in it."""
    return files(folder, "libcudnn.so.9", *(f"libcudnn_{name}.so.9" for name in NEEDED))


def copied(library: Library, folder: Path) -> Path:
    """The real library in another place: a copy of the file that is small, links to the others."""
    folder.mkdir(parents=True)
    shutil.copy(library.path, folder / "libcudnn.so.9")
    for part in Path(library.path).parent.glob("libcudnn_*.so.9"):
        (folder / part.name).symlink_to(part)
    return folder


@pytest.mark.behaviour("B32")
def test_the_library_is_loaded_with_its_parts_and_says_from_where(library: Library) -> None:
    assert finding.load() is library
    assert library.version >= finding.OLDEST
    assert library.version_text.startswith("9.")
    assert library.origin in ("torch", "wheel", "system")
    assert Path(library.path).name.startswith("libcudnn.so.9")
    names = [part.name for part in library.loaded]
    assert names[:3] == [f"libcudnn_{name}.so.9" for name in NEEDED]
    assert names[-1] == f"libnvrtc.so.{library.cuda_major}"
    assert all(bool(part.path) != bool(part.trouble) for part in library.loaded)
    assert f"cuDNN {library.version_text} from {library.origin}" in repr(library)


def test_threads_get_the_same_library(library: Library) -> None:
    got: list[Library] = []
    threads = [threading.Thread(target=lambda: got.append(finding.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [library] * 8


@pytest.mark.behaviour("B32")
def test_a_missing_driver_is_one_warning_and_no_runtime_compilation(library: Library) -> None:
    if library.driver == "real":
        pytest.skip("there is a driver")
    facts = elsewhere(FACTS)
    assert facts["driver"] == "none"
    assert not facts["can_compile"]
    (said,) = facts["said"]
    assert said[0] == "ConvPlanWarning"
    assert f"cuDNN {library.version_text}" in said[1]
    assert "without NVIDIA's driver (libcuda.so.1)" in said[1]
    assert "compiled at run time are left out, and no plan can run" in said[1]
    assert not facts["torch"], "finding cuDNN does not import torch"


@pytest.mark.behaviour("B32")
def test_a_missing_compiler_is_said_too(library: Library, tmp_path: Path) -> None:
    folder = copied(library, tmp_path / "cudnn" / "lib")
    code = f"""
import json
from pathlib import Path
it = library.load_from([library.Place("system", Path({str(folder)!r}))])
print(json.dumps({{"said": library.shortcomings(it), "nvrtc": it.loaded[-1], "compile": it.can_compile}}))
"""
    facts = elsewhere(code, CUDA_HOME=str(tmp_path), LD_LIBRARY_PATH="")
    name, path, trouble = facts["nvrtc"]
    if path:
        pytest.skip(f"the system has {name}")
    assert trouble
    assert not facts["compile"]
    assert len(facts["said"]) == 1
    assert name in facts["said"][0]


@pytest.mark.behaviour("B32")
def test_the_library_that_the_process_uses_already_is_the_one(library: Library, tmp_path: Path) -> None:
    folder = copied(library, tmp_path / "elsewhere")
    path = str(folder / "libcudnn.so.9")
    facts = elsewhere(f"import ctypes\nctypes.CDLL({path!r}, mode=ctypes.RTLD_GLOBAL)\n{FACTS}")
    assert facts["path"] == path
    assert facts["origin"] == "system", "it is in none of the known places"


@pytest.mark.behaviour("B32")
def test_the_first_place_that_works_is_used(library: Library, tmp_path: Path) -> None:
    first, second = copied(library, tmp_path / "one"), copied(library, tmp_path / "two")
    where = [("torch", files(tmp_path / "empty")), ("wheel", first), ("system", second)]
    listed = ", ".join(f"library.Place({origin!r}, Path({str(folder)!r}))" for origin, folder in where)
    code = f"""
import json
from pathlib import Path
it = library.load_from([{listed}])
print(json.dumps([it.origin, it.path]))
"""
    assert elsewhere(code) == ["wheel", str(first / "libcudnn.so.9")]


@pytest.mark.behaviour("B32", "B34")
def test_each_place_that_does_not_work_is_named_with_its_reason(tmp_path: Path) -> None:
    old = files(tmp_path / "old", "libcudnn.so.8", "libcudnn.so.8.9.7")
    partial = files(tmp_path / "partial", "libcudnn.so.9", "libcudnn_graph.so.9")
    broken = made_up(tmp_path / "broken")
    empty = files(tmp_path / "empty")
    where = [Place("torch", old), Place("wheel", partial), Place("system", broken), Place("system", empty)]
    with pytest.raises(EngineUnavailable) as caught:
        finding.load_from(where)
    message = str(caught.value)
    assert "engine 'cudnn' is not available: cuDNN 9.1.0 or newer (libcudnn.so.9), found: " in message
    assert f"{old}: found libcudnn.so.8, libcudnn.so.8.9.7, expected libcudnn.so.9, version 9.1.0 or newer" in message
    without = "libcudnn_heuristic.so.9, libcudnn_engines_precompiled.so.9"
    assert f"{partial}: found libcudnn.so.9 without {without}, which it needs" in message
    assert f"{broken}: cannot be loaded: " in message
    assert str(empty) not in message, "places with nothing in them are no news beside the others"
    assert "pip install nvidia-cudnn-cu" in message


def test_nothing_anywhere_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match=f"found: none in {tmp_path}/a, {tmp_path}/b. pip install"):
        finding.load_from([Place("wheel", tmp_path / "a"), Place("system", tmp_path / "b")])


def test_a_library_that_lacks_one_of_cudnns_functions_is_refused(library: Library, tmp_path: Path) -> None:
    folder = copied(library, tmp_path / "wrong")
    (folder / "libcudnn.so.9").unlink()
    shutil.copy(Path(library.path).with_name("libcudnn_graph.so.9"), folder / "libcudnn.so.9")
    code = f"""
import json, ctypes
from pathlib import Path
from convplan import EngineUnavailable
library._FUNCTIONS["cudnnNotAFunction"] = (ctypes.c_int, ())
try:
    library.load_from([library.Place("wheel", Path({str(folder)!r}))])
except EngineUnavailable as exc:
    print(json.dumps(str(exc)))
"""
    assert "undefined symbol: cudnnNotAFunction" in elsewhere(code)


@pytest.mark.behaviour("B34")
def test_the_oldest_version_is_checked_and_named() -> None:
    assert finding.version_trouble(91900) == ""
    assert finding.version_trouble(90100) == ""
    assert finding.version_trouble(90000) == "version 9.0.0, expected 9.1.0 or newer"
    assert finding.version_trouble(8907) == "version 8.9.7, expected 9.1.0 or newer"


@pytest.mark.behaviour("B34")
def test_a_library_that_is_too_old_is_refused_with_both_versions(library: Library, tmp_path: Path) -> None:
    folder = copied(library, tmp_path / "old")
    code = f"""
import json
from pathlib import Path
from convplan import EngineUnavailable
library.OLDEST = 99900
try:
    library.load_from([library.Place("wheel", Path({str(folder)!r}))])
except EngineUnavailable as exc:
    print(json.dumps(exc.needs))
"""
    needs = elsewhere(code)
    assert needs.startswith("cuDNN 9.99.0 or newer")
    assert f"{folder}: found version {library.version_text}, expected 9.99.0 or newer" in needs


def test_a_failure_is_remembered_and_told_again() -> None:
    code = """
import json
from pathlib import Path
from convplan import EngineUnavailable
looked = []
library.places = lambda: looked.append(1) or (library.Place("wheel", Path("/nowhere")),)
said = []
for _ in range(3):
    try:
        library.load()
    except EngineUnavailable as exc:
        said.append(str(exc))
print(json.dumps([said, len(looked)]))
"""
    said, looked = elsewhere(code)
    assert len(said) == 3
    assert len(set(said)) == 1
    assert "/nowhere" in said[0]
    assert looked == 1


# ---- looking


def test_looking_finds_what_loading_uses(library: Library) -> None:
    found = [sighting for sighting in finding.find_report() if sighting.path.endswith("/libcudnn.so.9")]
    assert library.path in [sighting.path for sighting in found]
    assert all(sighting.trouble == "" for sighting in found)


def test_looking_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    report = finding.find_report([Place("wheel", tmp_path / "file" / "lib"), Place("system", None)])
    assert [sighting.origin for sighting in report] == ["wheel", "system"]
    assert report[0].trouble == "no libcudnn"

    def broken() -> tuple[Place, ...]:
        raise ValueError("torch.__spec__ is None")

    monkeypatch.setattr(finding, "places", broken)
    assert finding.find_report()[0].trouble == "could not look: ValueError: torch.__spec__ is None"


@pytest.mark.parametrize(
    ("needs", "origin"),
    [
        pytest.param(["numpy", "nvidia-cudnn-cu13==9.19.0.56; platform_system == 'Linux'"], "torch", id="dependency"),
        pytest.param(["numpy", "nvidia-cudnn-frontend"], "wheel", id="only-the-frontend"),
        pytest.param(None, "wheel", id="needs-nothing"),
    ],
)
@pytest.mark.behaviour("B32")
def test_a_wheel_is_torchs_own_when_torch_depends_on_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, needs: list[str] | None, origin: str
) -> None:
    monkeypatch.setattr(finding.importlib.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(finding, "_package_folders", lambda name: [str(tmp_path / name)])
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/by-path")
    monkeypatch.setenv("CUDNN_PATH", "/opt/cudnn")
    where = finding.places()
    assert where[0] == ("torch", tmp_path / "torch" / "lib")
    assert where[1] == (origin, tmp_path / "nvidia" / "cudnn" / "lib")
    assert {place.origin for place in where[2:]} == {"system"}
    assert [str(place.folder) for place in where[2:5]] == ["/opt/by-path", "/opt/cudnn/lib64", "/opt/cudnn/lib"]
    assert where[-1] == ("system", None), "and last what the system's loader knows"


def test_a_package_that_cannot_be_looked_at_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia", None)
    assert finding._package_folders("nvidia") == []
    assert finding._package_folders("no_such_package_anywhere") == []
