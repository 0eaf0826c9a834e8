"""Tests that run plans on a GPU; without one they are skipped, by name. Findings go to `$OUT`, where that is set."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def findings():
    """A dictionary that ends in `$OUT/gpu_findings.json`: what ran, how often, and what failed with which reason."""
    found: dict[str, object] = {}
    yield found
    if found and os.environ.get("OUT"):
        path = Path(os.environ["OUT"], "gpu_findings.json")
        with Path(f"{path}.lock").open("w") as lock:  # test files run side by side
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**before, **found}, indent=1, default=str) + "\n")
