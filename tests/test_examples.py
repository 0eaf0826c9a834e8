"""Every example runs as a user would run it, with warnings as errors, in a process and with a store of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = 50

# What each must have shown; a line of its output that could only come from the thing it is about.
SHOWN = {
    "01_one_call.py": ("largest difference from torch:", "'hits': 9", "SpecError: weight.shape[1] is 16"),
    "02_plan_once_run_often.py": ("problem: fprop float32", "chosen", "ran: fft"),
    "03_share_plans.py": (
        "exported 5 plans",
        "imported: 5 added, 0 kept",
        "imported: 0 added, 5 kept",
        "2 plans from the store, 0 tuned",
    ),
    "04_train_under_enable.py": ("step 39: loss", "'fell_back': 0"),
    "05_your_own_engine.py": ("shifts", "largest difference from torch:"),
}


def test_every_example_is_known_and_short() -> None:
    assert [path.name for path in EXAMPLES] == sorted(SHOWN)
    assert [path.name for path in EXAMPLES if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CONVPLAN_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for line in SHOWN[path.name]:
        assert line in done.stdout, done.stdout
    # Nothing is written but the store.
    assert {entry.name for entry in tmp_path.iterdir()} <= {"cache"}
