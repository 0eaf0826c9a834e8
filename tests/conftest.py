"""What holds for every test: no setting from outside, a cache directory of its own, seeded, and two threads."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest

THREADS = 2  # results of a reduction may depend on the number of threads, so it is the same on every machine

# Threads that wait in a loop take the cores from the ones they wait for: on a busy machine tests take 4 times as long.
# Read once, when torch is first imported; this file is imported before any test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

FLAGS = (
    "mkldnn_enabled",
    "cudnn_enabled",
    "cudnn_benchmark",
    "cudnn_deterministic",
    "float32_matmul_precision",
    "cudnn_allow_tf32",
)
PRECISIONS = [
    ("generic", "all"),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")),
]  # of float32, in torch's newer spelling

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing leaks in from the environment, and no plan is left for another test to find."""
    for name in [name for name in os.environ if name.startswith("CONVPLAN_")]:
        monkeypatch.delenv(name)
    # A name of its own, made only when something is written: most of the thousands of tests write nothing.
    monkeypatch.setenv("CONVPLAN_CACHE_DIR", str(tmp_path_factory.getbasetemp() / f"cache-{next(_numbers)}"))


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Random numbers and the number of threads are the same in every run."""
    import torch

    torch.manual_seed(0)
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


def _torch_flags(torch: Any) -> dict[tuple[str, ...], Any]:
    """Torch's flags: the older spellings first, whose setters change the newer ones too."""
    found: dict[tuple[str, ...], Any] = {}
    for name in FLAGS:
        with contextlib.suppress(RuntimeError):  # where both spellings were mixed
            found[(name,)] = getattr(torch._C, f"_get_{name}")()
    get = getattr(torch._C, "_get_fp32_precision_getter", None)
    return found | ({pair: get(*pair) for pair in PRECISIONS} if get else {})


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """No flag of torch's that a test sets is left for another: its own scopes leave some, and mixed spellings raise."""
    import torch  # here, for there are tests in which it cannot be imported

    before = _torch_flags(torch)
    yield
    if _torch_flags(torch) != before:
        for name, value in before.items():
            if len(name) == 1:
                getattr(torch._C, f"_set_{name[0]}")(value)
            else:
                torch._C._set_fp32_precision_setter(*name, value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where these were run: how many tests carry each number, and how many lists equalled the front end's."""
    passed = terminalreporter.getreports("passed")
    lengths = [value for report in passed for name, value in report.user_properties if name == "oracle"]
    if lengths:
        told = f"{len(lengths)} lists, {sum(lengths)} configurations"
        terminalreporter.write_line(f"equal to those of NVIDIA's front end, in order: {told}")
    if any(report.nodeid.startswith("tests/test_behaviours.py") for report in passed):
        from helpers import behaviours

        terminalreporter.write_line("tests that carry the number of a behaviour:")
        for line in behaviours.lines(behaviours.table()):
            terminalreporter.write_line(f"  {line}")
