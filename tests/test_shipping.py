"""Plans tuned by one user, exported, imported by another and replayed from a store that cannot be written.

On a machine with a GPU the model is a ResNet-50 on it, else a small one on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "helpers" / "shipping.py"
ROOT = Path(__file__).parent.parent


def run(home: Path, *command: str) -> str:
    """A Python process of the user whose home that is."""
    home.mkdir(exist_ok=True)
    left_out = ("CONVPLAN_STORE", "CONVPLAN_CACHE_DIR", "XDG_CACHE_HOME")
    environ = {name: value for name, value in os.environ.items() if name not in left_out}
    path = os.pathsep.join(filter(None, (str(ROOT), environ.get("PYTHONPATH", ""))))
    environ |= {"HOME": str(home), "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(
        [sys.executable, *command], env=environ, cwd=home, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def digest_of(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(str(path.relative_to(folder)).encode())
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


@pytest.mark.behaviour("C1")
@pytest.mark.behaviour("C2")
@pytest.mark.behaviour("C6")
@pytest.mark.timeout(300)
def test_another_user_replays_exported_plans_to_the_bit_without_tuning_or_compiling(tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    tuned: dict[str, Any] = json.loads(run(tmp_path / "ann", str(PROGRAM), "tune", str(file)))
    run(tmp_path / "bob", "-m", "convplan", "import", str(file))
    store = tmp_path / "bob" / ".cache" / "convplan"
    assert (store / "plans.sqlite").is_file()
    for path in (*store.iterdir(), store):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = digest_of(store)
    try:
        replayed: dict[str, Any] = json.loads(run(tmp_path / "bob", str(PROGRAM), "replay"))
    finally:
        store.chmod(0o755)
    assert digest_of(store) == before, "nothing was written"
    assert replayed["digest"] == tuned["digest"]
    assert replayed["from_store"] > 10
    for counter in ("planned", "tuned", "compiled", "replay_misses", "fell_back", "failed"):
        assert replayed[counter] == 0, counter
