"""The passes after a convolution against float64: torch's operations, and Triton's kernels without a GPU.

Triton's interpreter runs the kernels themselves, in a process that chose it before it imported Triton; its compiler
translates them for a GPU that is not there. On one they are tested by tests/gpu/test_kernels_gpu.py.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.normalizing import (
    ACTIVATIONS,
    Case,
    cases,
    corner_offences,
    distances,
    each_alone,
    far_from_zero,
    same_bits,
)
from helpers.plans import run_python

from convplan import kernels
from convplan._epilogue import ACTIVATIONS as KNOWN
from convplan.kernels import Norm, choices

CASES = cases()
# Triton's wheels are for this; elsewhere the package runs by torch's operations alone.
HAS_TRITON = sys.platform == "linux" and platform.machine() == "x86_64"
triton_only = pytest.mark.skipif(not HAS_TRITON, reason="Triton has no wheel for this platform")


def too_far(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if not value <= 1}


def test_cases_have_every_activation() -> None:
    assert {case.activation for case in CASES} == {*KNOWN, "hardtanh"}


# By torch's operations


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_torch_operations_are_right(case: Case) -> None:
    assert too_far(distances(case, steps=6)) == {}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_double_all_digits_are_right(activation: str) -> None:
    for residual in (False, True):
        case = Case((4, 6, 5, 3), torch.float64, activation, residual, sums=residual)
        assert too_far(distances(case)) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contiguous_tensors(dtype: torch.dtype) -> None:
    assert too_far(distances(Case((4, 6, 5, 3), dtype, "relu", True), last=False, steps=6)) == {}


def test_corners_are_torchs() -> None:
    assert corner_offences() == []


def test_two_runs_write_the_same_bits() -> None:
    assert same_bits()


def test_each_gradient_alone_is_the_one_among_all() -> None:
    assert each_alone() == []


def test_a_large_mean_costs_no_digits() -> None:
    assert far_from_zero() <= 1


def test_another_shape_is_refused() -> None:
    y = torch.randn(4, 6, 3, 3)
    with pytest.raises(ValueError, match=r"shape \(1, 6, 1, 1\), expected that of y, \(4, 6, 3, 3\)"):
        kernels.normalize(y, None, Norm(), torch.randn(1, 6, 1, 1))


def test_the_reference_rejects_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((4, 6, 5, 3), torch.float32, "relu", True)
    right = kernels.composed.normalize

    def unbiased(y: torch.Tensor, *more: Any) -> Any:
        out, saved = right(y, *more)
        rows = y.numel() / y.shape[1]
        return out, saved * torch.tensor([[1], [((rows - 1) / rows) ** 0.5]])

    monkeypatch.setattr(kernels.composed, "normalize", unbiased)
    assert {"saved", "grad_y", "grad_weight"} <= too_far(distances(case)).keys()


# What is no number of rows to normalize


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3)], ids=str)
def test_a_single_value_is_refused_as_torch_does(shape: tuple[int, ...]) -> None:
    y = torch.randn(shape)
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as theirs:
        F.batch_norm(y, mean, var, training=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as ours:
        kernels.normalize(y, None, Norm(running_mean=mean, running_var=var))
    assert str(ours.value) == str(theirs.value)
    assert (mean.tolist(), var.tolist()) == ([0] * 3, [1] * 3)


def test_no_rows_at_all() -> None:
    y = torch.randn(0, 3, 4, 4)
    norm = Norm(torch.ones(3), torch.ones(3), torch.zeros(3), torch.ones(3))
    out, saved = kernels.normalize(y, None, norm, None, "relu")
    assert (out.shape, saved.shape) == (y.shape, (2, 3))
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0, 0, 0]
    count = torch.tensor(3)
    kernels.normalize(y, None, Norm(batches=count))
    assert count.item() == 4
    assert kernels.column_sums(y).tolist() == [[0] * 3] * 2
    grads = kernels.normalize_backward(out, y, None, saved, norm, "relu")
    assert [one is not None and float(one.sum()) for one in grads] == [0, 0, 0, 0]
    g, total = kernels.activation_backward(out, out, "relu", from_output=True, bias=True)
    assert (g.shape, total is not None and total.tolist()) == (y.shape, [0] * 3)


def test_running_statistics_of_one_kind_alone_and_of_half() -> None:
    y = torch.randn(6, 4, 3, 3)
    for dtype in (torch.float32, torch.float16):
        mean = torch.ones(4, dtype=dtype)
        kernels.normalize(y, None, Norm(running_mean=mean, momentum=0.5))
        torch.testing.assert_close(mean, (0.5 + 0.5 * y.mean((0, 2, 3))).to(dtype))


def test_what_the_backward_pass_reads() -> None:
    told = {name: kernels.backward_needs(name, ACTIVATIONS[name][1], True) for name in ACTIVATIONS}
    assert told.pop("none") == "nothing"
    assert {name for name, what in told.items() if what == "out"} == {"relu", "leaky_relu", "hardtanh"}
    assert {what for name, what in told.items() if what != "out"} == {"residual"}
    assert kernels.backward_needs("leaky_relu", (-0.5,), True) == "residual"
    assert kernels.backward_needs("silu", (), False) == "nothing"


def test_only_what_is_needed_is_returned() -> None:
    y, grad = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3)
    _, saved = kernels.normalize(y, None, Norm())
    for place in range(4):
        needs = tuple(place == one for one in range(4))
        found = kernels.normalize_backward(grad, y, None, saved, Norm(), needs=needs)  # type: ignore[arg-type]
        assert tuple(one is not None for one in found) == needs


# Triton's kernels, interpreted


@pytest.fixture(scope="module")
def interpreted() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return json.loads(run_python("from helpers.normalizing import main; main()", timeout_s=250))


@triton_only
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_interpreted_kernels_are_right(case: Case, interpreted: Any) -> None:
    found = interpreted[case.id]
    assert isinstance(found, dict), found
    assert too_far(found) == {}


@triton_only
def test_interpreted_kernels_have_torchs_corners(interpreted: Any) -> None:
    assert interpreted["corners"] == []


@triton_only
def test_interpreted_kernels_write_the_same_bits(interpreted: Any) -> None:
    assert interpreted["same bits"] is True


@triton_only
def test_interpreted_each_gradient_alone_is_the_one_among_all(interpreted: Any) -> None:
    assert interpreted["each alone"] == []


@triton_only
def test_interpreted_what_follows_a_convolution_is_right(interpreted: Any) -> None:
    assert len(interpreted["following"]) == 51
    assert too_far(interpreted["following"]) == {}


@triton_only
def test_interpreted_concatenations_and_max_pools_are_torchs(interpreted: Any) -> None:
    assert interpreted["moving"] == []


@triton_only
def test_interpreted_a_large_mean_costs_no_digits(interpreted: Any) -> None:
    assert interpreted["far"] <= 1


# Triton's kernels, compiled


@triton_only
def test_kernels_compile_for_an_absent_gpu_and_read_16_bytes_a_thread(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        patch.delenv("TRITON_INTERPRET", raising=False)
        found = json.loads(run_python("import runpy; runpy.run_module('helpers.compiling', run_name='__main__')"))
    assert len(found) == 30
    for name, counts in found.items():
        wide, narrow = counts["ld wide"], counts["ld all"] - counts["ld wide"]
        # Nothing of the tensors themselves is read in smaller pieces; vectors of one number a column may be.
        assert wide >= (2 if name.startswith(("sums", "moments", "place")) else 4), name
        assert narrow <= 4 + name.startswith("normalize"), name  # which counts batches
        if not name.startswith(("sums", "moments", "finish")):
            assert counts["st wide"] >= 2, name
        assert counts["shared_bytes"] <= 48 * 1024
        assert (counts["max of nan"] > 0) == name.startswith("max_pool")  # which the interpreter does anyway


class Asked:
    """Stands in for a kernel of Triton: notes how it is called, and has a compiled one."""

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.launched: list[Any] = []
        self.function, self.packed_metadata = "function", "packed"

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def call(*arguments: Any, num_warps: int) -> Asked:
            self.compiled.append((grid, num_warps, *arguments))
            return self

        return call

    def run(self, *given: Any) -> None:
        self.launched.append(given)


class On(NamedTuple):
    """Stands in for a tensor on a GPU."""

    address: int
    index: int = 0
    dtype: torch.dtype = torch.float16

    def get_device(self) -> int:
        return self.index

    def data_ptr(self) -> int:
        return self.address


def test_what_is_compiled_is_launched_again_on_the_same_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("convplan.kernels.ready")
    monkeypatch.setattr(module, "_current_device", lambda: 0)
    monkeypatch.setattr(module, "_raw_stream", lambda index: 77)
    kernel, cut = Asked(), choices.passing(100, 64)
    across, down = cut.grid
    ready = module.Ready(kernel, cut, (3, "relu"))
    ready(0, On(520), None)  # what is compiled for an odd address is not kept
    ready(0, On(256), None)
    assert (len(kernel.compiled), kernel.launched) == (2, [])
    ready(0, On(512), None)
    told = (across, down, 1, 77, "function", "packed", None, None, None)
    assert (len(kernel.compiled), kernel.launched) == (2, [(*told, 512, None, 3, "relu")])
    for asked in (3, 4):  # at an odd address, it is Triton's to know what to do, each time
        ready(0, On(520), None)
        assert len(kernel.compiled) == asked
    assert kernel.compiled[-1] == (cut.grid, cut.warps, On(520), None, 3, "relu")
    monkeypatch.setattr(module, "_current_device", lambda: 1)
    ready(1, On(512, 1), None)
    assert (len(kernel.compiled), len(kernel.launched)) == (5, 1)
    ready(1, On(512, 1), None)
    assert (len(kernel.compiled), len(kernel.launched)) == (5, 2)
    entered: list[int] = []
    monkeypatch.setattr(module, "_current_device", lambda: 0)
    monkeypatch.setattr(module.torch.cuda, "device", lambda index: entered.append(index) or nullcontext())
    ready(1, On(512, 1), None)  # not the current one: Triton launches there
    assert (len(kernel.compiled), len(kernel.launched), entered) == (6, 2, [1])


def test_kernels_are_made_ready_for_each_kind_of_call() -> None:
    launches = pytest.importorskip("convplan.kernels.launches")
    half, bfloat16, float32, shape = torch.float16, torch.bfloat16, torch.float32, torch.Size((2, 8, 3, 3))
    kinds = (float32, None, None, None, None)
    given = (shape, half, False, True, kinds, 0.1, 1e-5, "relu", ())
    one = launches._normalizing(*given)
    assert launches._normalizing(torch.Size((2, 8, 3, 3)), *given[1:]) is one
    others: dict[int, Any] = {
        0: torch.Size((2, 8, 3, 4)), 1: bfloat16, 2: True, 3: False, 4: (half, *kinds[1:]), 5: 0.2, 6: 1e-4,
        7: "elu", 8: (1.0,),
    }  # fmt: skip
    for place, other in others.items():
        assert launches._normalizing(*given[:place], other, *given[place + 1 :]) is not one
    assert launches._dtypes(torch.ones(1), None, torch.ones(1).half()) == (float32, None, half)


def test_what_is_absent_makes_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = pytest.importorskip("convplan.kernels.launches")
    seen: list[Any] = []
    monkeypatch.setattr(launches, "_launch", lambda ready, index, *tensors: seen.append(ready))
    y = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    numbers, count = torch.ones(8), torch.tensor(0)
    norms = (
        Norm(), Norm(weight=numbers), Norm(bias=numbers), Norm(running_mean=numbers), Norm(running_var=numbers),
        Norm(batches=count), Norm(batches=count.int()),
    )  # fmt: skip
    for norm in (*norms, *norms):
        launches.normalize(y, torch.ones(2, 8), norm, None, "relu", ())
    assert len({id(one) for one in seen}) == len(norms)
    assert seen[: len(norms)] == seen[len(norms) :]


def follow_on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, capturing: bool, known: bool) -> tuple[bool, list[Any]]:
    """Whether `launches.follow` did something, and what it launched, for tensors that say they are on a GPU."""
    launches = pytest.importorskip("convplan.kernels.launches")
    launched: list[Any] = []
    monkeypatch.setattr(launches, "_launch", lambda ready, index, *tensors: launched.append(ready))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(launches.Ready, "is_known", lambda self, index: known)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    y = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    return launches.follow(y, torch.ones(8), None, None, 1.0, "relu", ()), launched


def test_nothing_is_compiled_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert follow_on_a_gpu(monkeypatch, capturing=True, known=False) == (False, [])
    for capturing, known in ((True, True), (False, True), (False, False)):
        done, launched = follow_on_a_gpu(monkeypatch, capturing=capturing, known=known)
        assert (done, len(launched)) == (True, 1)


def test_what_no_kernel_does_is_left_to_the_caller() -> None:
    y = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    before = y.clone()
    assert not kernels.follow(y, torch.ones(8), y.clone(), None, 1.0, "relu")
    assert torch.equal(y, before)


def test_what_no_kernel_moves_is_left_to_the_caller() -> None:
    x = torch.randn(2, 8, 300, 300).to(memory_format=torch.channels_last)
    assert x.numel() >= kernels.MANY
    assert kernels.concatenate((x, x)) is None
    assert kernels.max_pool(x, (2, 2), (2, 2), (0, 0), (1, 1), False) is None


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, convplan; before = 'torch' in sys.modules; import convplan.kernels; "
    assert run_python(f"{code}print(before, 'triton' in sys.modules)").split() == ["False", "False"]


def test_without_triton_there_is_one_warning_and_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "_launches", None)
    monkeypatch.setattr(kernels, "_gave_up", False)
    monkeypatch.setitem(sys.modules, "convplan.kernels.launches", None)
    monkeypatch.delattr(kernels, "launches", raising=False)
    with caplog.at_level(logging.WARNING, "convplan.kernels"):
        assert kernels._load() is None
        assert kernels._load() is None
    assert [record.name for record in caplog.records] == ["convplan.kernels"]
    assert "torch's operations" in caplog.text


# How the work is cut

SIZES = [(rows, columns) for rows in (1, 2, 63, 3136, 802816, 2**31 + 5) for columns in (1, 3, 24, 64, 256, 2048, 5000)]


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_programs_cover_the_matrix_once(rows: int, columns: int) -> None:
    for cut in (choices.reducing(rows, columns), choices.passing(rows, columns), choices.passing(rows, columns, 16)):
        across, down = cut.grid
        assert across * cut.block_columns >= columns > (across - 1) * cut.block_columns
        assert down * cut.rows_each >= rows > (down - 1) * cut.rows_each
        assert cut.rows_each % cut.block_rows == 0
        assert down <= 65535
        assert cut.block_rows * cut.block_columns <= choices.TILE_ELEMENTS
    partials = choices.reducing(rows, columns).grid[1]
    assert partials <= choices.REDUCING_PROGRAMS
    finish = choices.finishing(partials, columns)
    assert finish.block_rows >= partials
    assert finish.grid[0] * finish.block_columns >= columns


def test_many_channels_have_few_partial_sums() -> None:
    assert choices.reducing(64 * 7 * 7, 2048).grid[1] <= choices.FEW_PARTIALS
    assert choices.reducing(64 * 14 * 14, 1024).grid[1] <= choices.FEW_PARTIALS
    assert choices.reducing(64 * 56 * 56, 64).grid == (1, 523)


def test_alignment_divides() -> None:
    assert [choices.alignment(columns) for columns in (1, 6, 24, 64, 1000, 1001)] == [1, 2, 8, 8, 8, 1]


def test_the_interpreter_is_not_left_on() -> None:
    assert os.environ.get("TRITON_INTERPRET") is None
