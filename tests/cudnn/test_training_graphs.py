"""`benchmarks/training_graphs.py` without a GPU: which graphs for training cuDNN offers engines for, for an H200."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from convplan.engines.cudnn.library import Library

ROOT = Path(__file__).parents[2]
H200 = Path(__file__).with_name("h200-cudnn-9.19.0.deviceprop.json")
OFFERED = (
    "fprop",
    "fprop + statistics",
    "folded -> fprop",
    "folded -> fprop + statistics",
    "wgrad",
    "folded -> wgrad",
    "dgrad",
    "dgrad + relu backward",
    "dgrad + relu backward + norm's sums",
)
NOT_OFFERED = ("relu backward -> dgrad", "relu backward -> wgrad", "relu -> wgrad", "wgrad + bias gradient")


@pytest.fixture
def counts(library: Library, tmp_path: Path) -> dict[str, dict[str, int]]:
    """What the script, run as a user does, writes of its first layer. `library`: cuDNN is there."""
    command = [sys.executable, str(ROOT / "benchmarks" / "training_graphs.py"), "--absent", str(H200), "--layers", "1"]
    environ = {**os.environ, "OUT": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    raw = json.loads((tmp_path / "training_graphs.json").read_text())
    assert (tmp_path / "training_graphs.md").read_text() == done.stdout.removesuffix("\n")
    found: dict[str, dict[str, int]] = raw["offered"]
    return found


def test_cudnn_offers_graphs_with_statistics_and_none_with_a_backward_node_before_the_convolution(
    counts: dict[str, dict[str, int]],
) -> None:
    assert set(counts) == {*OFFERED, *NOT_OFFERED}
    assert {form for form, found in counts.items() if all(found.values())} == set(OFFERED)
    assert {form: list(counts[form].values()) for form in NOT_OFFERED} == {form: [0] for form in NOT_OFFERED}
    assert all(len(found) == 1 for found in counts.values())


def test_a_fused_graph_has_fewer_engines_than_the_convolution_alone(counts: dict[str, dict[str, int]]) -> None:
    for plain in ("fprop", "wgrad", "dgrad"):
        for form in OFFERED:
            if form != plain and plain in form:
                assert sum(counts[form].values()) < sum(counts[plain].values()), form
