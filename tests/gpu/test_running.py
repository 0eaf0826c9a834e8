"""Plans in use on a GPU: streams, threads, memory, CUDA graphs, devices, caches, and what `enable()` makes of them."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import convplan
from convplan import CaptureMiss, ConvPlanWarning, Epilogue, Plan, Policy, Problem, SpecError, TensorSpec, _environment
from convplan._planner import plan_problem
from convplan.engines.cudnn.descriptors import live_descriptors

CUDNN = Policy(engines=("cudnn",), effort="instant")
CUDNN_THEN_ATEN = Policy(engines=("cudnn", "aten"), effort="instant")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    from convplan import _runtime

    _runtime.forget()
    convplan.stats(reset=True)
    yield
    convplan.disable()
    torch.cuda.synchronize()


def tensors(
    n: int = 4, c: int = 32, size: int = 28, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(n * 1000 + c + size)
    x = torch.randn(n, c, size, size, device="cuda", generator=generator).to(dtype)
    w = torch.randn(c, c, 3, 3, device="cuda", generator=generator).to(dtype)
    return x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)


def plan_for(x: torch.Tensor, w: torch.Tensor, policy: Policy = CUDNN) -> Plan:
    return convplan.plan(convplan.problem("fprop", x, w, padding=1), policy).build()


def right(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x.double(), w.double(), padding=1)


def close(found: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), right(x, w), rtol=4e-3, atol=4e-2)


@pytest.mark.behaviour("B25")
@pytest.mark.behaviour("B26")
def test_a_plan_on_a_side_stream_while_another_runs() -> None:
    x, w = tensors(n=16, c=64, size=56)
    plan = plan_for(x, w)
    expected = plan.run(x, w)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        with torch.cuda.stream(side):
            found.append(plan.run(x, w))
        found.append(plan.run(x, w))
        junk = torch.empty(2**22, device="cuda").fill_(float("nan"))  # takes freed workspace at once, if it may
        del junk
    torch.cuda.synchronize()
    assert all(torch.equal(one, expected) for one in found)
    close(expected, x, w)


@pytest.mark.behaviour("B25")
def test_work_waits_for_the_stream_it_was_put_on() -> None:
    x, w = tensors()
    plan = plan_for(x, w)
    plan.run(x, w)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        event = torch.cuda.Event()
        plan.run(x, w)
        event.record()
    assert not event.query()  # nothing of it ran on another stream
    torch.cuda.synchronize()
    assert event.query()


@pytest.mark.behaviour("B22")
@pytest.mark.behaviour("B36")
def test_two_threads_of_a_thousand_calls() -> None:
    shapes = [tensors(n=n, c=c, size=s) for n, c, s in ((2, 16, 14), (1, 32, 28), (3, 64, 7), (2, 8, 30))]
    expected = [right(x, w) for x, w in shapes]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for turn in range(1000):
                    x, w = shapes[turn % len(shapes)]
                    y = F.conv2d(x, w, padding=1)
                    if turn % 97 == 0:
                        torch.testing.assert_close(y.double(), expected[turn % len(shapes)], rtol=4e-3, atol=4e-2)
        except BaseException as exc:
            errors.append(exc)

    torch.cuda.synchronize()
    with convplan.enabled(CUDNN):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    stats = convplan.stats()
    assert stats["planned"] == len(shapes)  # the choice is shared, plans are each thread's own
    assert stats["hits"] + stats["misses"] == 2000
    assert (stats["fell_back"], stats["failed"]) == (0, 0)


@pytest.mark.behaviour("B25")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_two_devices() -> None:
    x, w = tensors()
    other = [t.to("cuda:1") for t in (x, w)]
    with convplan.enabled(CUDNN):
        for _ in range(3):
            one, two = F.conv2d(x, w, padding=1), F.conv2d(*other, padding=1)
            assert torch.cuda.current_device() == 0
    assert two.device.index == 1
    close(one, x, w)
    close(two, *other)
    plan = plan_for(x, w)
    assert torch.equal(plan.run(*other).cpu(), plan.run(x, w).cpu())


@pytest.mark.behaviour("B29")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_enabled_is_the_plan_itself_to_the_bit_and_repeats(dtype: torch.dtype) -> None:
    x, w = tensors(n=8, c=64, size=28, dtype=dtype)
    policy = CUDNN.replace(deterministic=True)
    expected = plan_for(x, w, policy).run(x, w)
    with convplan.enabled(policy):
        for _ in range(5):
            assert torch.equal(F.conv2d(x, w, padding=1), expected)


@pytest.mark.behaviour("B28")
@pytest.mark.behaviour("B35")
@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("how", ["new", "fits", "strided", "misaligned"])
def test_every_entry_writes_to_a_callers_tensor(op: str, how: str) -> None:
    x, w = tensors()
    problem = convplan.problem(op, x, w, padding=1)
    first, second = (x, w) if op == "fprop" else (x.clone(), w) if op == "dgrad" else (x, x.clone())
    plan = convplan.plan(problem, CUDNN).build()
    before = first.clone(), second.clone()
    expected = plan.run(first, second)
    spec = problem.output
    out = {
        "new": lambda: None,
        "fits": lambda: torch.empty_strided(spec.dims, spec.strides, dtype=x.dtype, device="cuda"),
        "strided": lambda: torch.empty(*spec.dims, 2, dtype=x.dtype, device="cuda")[..., 0],
        "misaligned": lambda: torch.empty(expected.numel() + 1, dtype=x.dtype, device="cuda")[1:].as_strided(
            spec.dims, spec.strides, 1
        ),
    }[how]()
    found = plan.run(first, second, out=out)
    assert out is None or found is out
    assert torch.equal(found, expected)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])


@pytest.mark.behaviour("B1")
def test_a_plan_refuses_addresses_it_was_not_made_for() -> None:
    x, w = tensors()
    plan = plan_for(x, w)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].as_strided(x.shape, x.stride(), 1)
    with pytest.raises(SpecError, match="alignment_bytes 32"):
        plan.run(shifted, w)


@pytest.mark.behaviour("B1")
def test_enabled_plans_for_the_addresses_that_come() -> None:
    x, w = tensors()
    found = []
    with convplan.enabled(CUDNN):
        for offset in (0, 1, 2, 4, 8, 16):
            shifted = torch.empty(x.numel() + offset, dtype=x.dtype, device="cuda")
            shifted = shifted.as_strided(x.shape, x.stride(), offset).copy_(x)
            found.append(F.conv2d(shifted, w, padding=1))
    for one in found:
        close(one, x, w)
    assert convplan.stats()["planned"] == 5  # 32 bytes twice


@pytest.mark.behaviour("B12")
@pytest.mark.parametrize("limit", [0, 2**20, 2**24, None])
def test_a_workspace_limit_holds(limit: int | None) -> None:
    x, w = tensors(n=16, c=64, size=56, dtype=torch.float32)
    record = convplan.plan(
        convplan.problem("wgrad", x, w, padding=1), CUDNN_THEN_ATEN.replace(workspace_limit_bytes=limit)
    )
    plan = record.build()
    assert limit is None or plan.workspace_bytes <= limit
    assert limit is None or all((e.workspace_bytes or 0) <= limit for e in record.ranking)


@pytest.mark.behaviour("B16")
@pytest.mark.behaviour("B18")
@pytest.mark.behaviour("B23")
def test_out_of_memory_costs_the_plan_and_not_the_convolution() -> None:
    x, w = tensors(n=32, c=64, size=56, dtype=torch.float32)
    x, w = x.contiguous(), w.contiguous()
    problem = convplan.problem("fprop", x, w, padding=1)
    record = convplan.plan(problem, CUDNN_THEN_ATEN.replace(workspace_limit_bytes=2**40))
    hungry = [e for e in record.ranking if (e.workspace_bytes or 0) > 2**22]
    if not hungry:
        pytest.skip("no plan of this problem needs workspace")
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + x.nbytes + 2**23  # for the output, and little else
    assert (hungry[0].workspace_bytes or 0) > 2**23
    torch.cuda.set_per_process_memory_fraction(min(room / total, 1.0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvPlanWarning)
            with convplan.enabled(CUDNN_THEN_ATEN.replace(workspace_limit_bytes=2**40)):
                y = F.conv2d(x, w, padding=1).cpu()
                again = F.conv2d(x, w, padding=1).cpu()
                stats = convplan.stats()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert stats["failed"] >= 1
    torch.testing.assert_close(y.double(), right(x, w).cpu(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(again, y, rtol=1e-2, atol=1e-2)
    assert torch.ones(4, device="cuda").sum().item() == 4  # no CUDA error is left behind


@pytest.mark.timeout(240)
@pytest.mark.behaviour("B20")
def test_ten_thousand_problems_through_a_small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setenv("CONVPLAN_CACHE_LIMIT", "100")
    w = torch.randn(8, 8, 3, 3, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    big = torch.randn(110, 8, 110, 110, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    process = psutil.Process()
    policy = CUDNN.replace(mode="replay", replay_miss="instant")  # nothing is stored
    sizes = [(n, h, v) for n in (1, 2) for h in range(6, 106) for v in range(6, 56)]
    assert len(sizes) == 10_000
    seen = []
    with convplan.enabled(policy):
        for turn, (n, h, v) in enumerate(sizes):
            F.conv2d(big[:n, :, :h, :v].contiguous(memory_format=torch.channels_last), w)
            if turn % 1000 == 999:
                torch.cuda.synchronize()
                gc.collect()
                seen.append((process.memory_info().rss, torch.cuda.memory_allocated(), live_descriptors()))
    assert convplan.stats()["planned"] == 10_000
    resident, allocated, alive = zip(*seen, strict=True)
    assert max(alive) - alive[1] <= 1000  # about 10 for each of the cached plans
    assert allocated[-1] <= allocated[1] + 2**20
    assert resident[-1] <= resident[2] + 200 * 2**20


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("training", [False, True])
def test_what_was_planned_before_runs_inside_a_cuda_graph(training: bool) -> None:
    x, w = tensors()
    w.requires_grad_(training)

    def step() -> torch.Tensor:
        y = F.conv2d(x, w, padding=1)
        return torch.autograd.grad(y, w, y.detach())[0] if training else y

    with convplan.enabled(CUDNN):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                expected = step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        planned = convplan.stats()["planned"]
        with torch.cuda.graph(graph):
            found = step()
        assert convplan.stats()["planned"] == planned
        assert convplan.stats()["fell_back"] == 0
    found.zero_() if not found.requires_grad else None
    x.copy_(x.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    with convplan.enabled(CUDNN):
        expected = step()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("miss", ["stock", "error"])
def test_nothing_is_planned_while_a_cuda_graph_is_captured(miss: str) -> None:
    x, w = tensors(c=24)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # stock torch needs its own warm-up
        F.conv2d(x, w, padding=1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with convplan.enabled(CUDNN.replace(capture_miss=miss)):
        if miss == "error":
            with pytest.raises(CaptureMiss, match="before the capture"), torch.cuda.graph(graph):
                F.conv2d(x, w, padding=1)
        else:
            with pytest.warns(ConvPlanWarning, match="CUDA graph"), torch.cuda.graph(graph):
                y = F.conv2d(x, w, padding=1)
            graph.replay()
        torch.cuda.synchronize()
        assert convplan.stats()["planned"] == 0
        after = F.conv2d(x, w, padding=1)  # is planned as ever
        assert convplan.stats()["planned"] == 1
    close(after, x, w)
    if miss == "stock":
        close(y, x, w)


@pytest.mark.behaviour("B7")
def test_empty_tensors_touch_no_engine() -> None:
    x, w = tensors()
    with convplan.enabled(CUDNN):
        assert F.conv2d(x[:0], w, padding=1).shape == (0, 32, 28, 28)
        grad = torch.autograd.grad(F.conv2d(x[:0], w.requires_grad_(), padding=1).sum(), w)[0]
    assert not grad.any()
    assert convplan.stats()["planned"] == 0


@pytest.mark.behaviour("B8")
@pytest.mark.behaviour("B10")
def test_flags_of_torch_are_followed_as_they_are_now() -> None:
    x, w = tensors(dtype=torch.float32)
    notes = {}
    for tf32 in (True, False):
        for deterministic in (True, False):
            with torch.backends.cudnn.flags(enabled=True, deterministic=deterministic, allow_tf32=tf32):
                record = convplan.plan(convplan.problem("wgrad", x, w, padding=1), Policy(effort="instant"))
            notes[tf32, deterministic] = {note for e in record.ranking for note in e.notes.numerical}
    assert "TENSOR_CORE" in notes[True, False]
    assert "TENSOR_CORE" not in notes[False, False] | notes[False, True]
    assert "NONDETERMINISTIC" not in notes[True, True] | notes[False, True]


@pytest.mark.behaviour("B33")
def test_torchs_switch_for_cudnn_is_followed_at_every_call() -> None:
    x, w = tensors()
    w.requires_grad_()
    with convplan.enabled(Policy(effort="instant")):

        def misses() -> int:
            before = convplan.stats()["misses"]
            y = F.conv2d(x, w, padding=1)
            torch.autograd.grad(y.sum(), w)
            found = convplan.stats()["misses"] - before
            close(y.detach(), x, w.detach())  # a convolution as well
            return found

        assert [misses(), misses()] == [2, 0]
        with torch.backends.cudnn.flags(enabled=False):
            assert [misses(), misses()] == [2, 0]
            record = convplan.plan(convplan.problem("fprop", x, w, padding=1))
            assert "cudnn" not in {e.config.engine for e in record.ranking}
            assert dict(record.environment.items)["cudnn"] == "off"
        assert misses() == 0
    assert "cudnn" in {e.config.engine for e in convplan.plan(convplan.problem("fprop", x, w, padding=1)).ranking}


@pytest.mark.behaviour("B15")
@pytest.mark.behaviour("B17")
def test_measuring_verifies_times_and_ranks_on_the_gpu() -> None:
    x, w = tensors(n=8, c=64, size=28)
    smaller = convplan.problem("fprop", *tensors(n=8, c=64, size=20), padding=1)
    convplan.plan(smaller, Policy(budget_s=0.1))  # cuBLAS's workspaces, which torch keeps for every stream
    gc.collect()
    allocated = torch.cuda.memory_allocated()
    record = convplan.plan(convplan.problem("fprop", x, w, padding=1), Policy(budget_s=0.3))
    assert torch.cuda.memory_allocated() == allocated
    assert record.effort == "measure"
    timed = [e for e in record.ranking if e.median_us]
    assert timed
    assert all(e.verified == "full" or e.verified == "sample" for e in timed)
    assert record.config.engine in ("cudnn", "aten", "matmul", "fft")
    assert not [e for e in record.rejected if e.rejected == "verify"], record.explain()
    close(record.build().run(x, w), x, w)


def test_candidates_are_timed_as_graphs_and_without_where_that_cannot_be() -> None:
    from convplan._measure_cuda import GraphTimer

    x, w = tensors()
    plan = plan_for(x, w)
    gc.collect()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    timer = GraphTimer(torch.device("cuda", 0))

    def launch() -> torch.Tensor:
        return plan.unchecked_run(x, w, None, None)

    def wait() -> float:
        return launch().sum().item()

    for call, captured in ((launch, True), (wait, False), (launch, True)):
        assert timer.sample_us(call, 4) > 0
        assert timer.is_captured(call) is captured
    assert timer.repeats(1e6) == 1
    assert timer.repeats(30.0) > 4
    close(launch(), x, w)
    del timer
    gc.collect()
    assert torch.cuda.memory_allocated() == allocated


def test_planning_times_graphs() -> None:
    x, w = tensors(n=8, c=64, size=28)
    record = plan_problem(
        convplan.problem("fprop", x, w, padding=1), Policy(budget_s=0.3).resolve(), _environment.current("cuda")
    )
    timed = [e for e in record.ranking if e.median_us]
    assert len(timed) > 5
    assert not [str(e.config) for e in timed if e.reason], "not captured"


def test_a_bias_is_added() -> None:
    x, w = tensors()
    bias = torch.randn(32, device="cuda", dtype=torch.float16)
    with convplan.enabled(CUDNN):
        found = F.conv2d(x, w, bias, padding=1)
    torch.testing.assert_close(found, F.conv2d(x, w, bias, padding=1), rtol=4e-3, atol=4e-2)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_bias_behind_a_large_transposed_convolution(layout: torch.memory_format) -> None:
    x, w = (one.to(memory_format=layout) for one in tensors(n=8, c=64, size=64))
    bias = torch.randn(64, device="cuda", dtype=torch.float16)
    with convplan.enabled(CUDNN):
        found = [F.conv_transpose2d(x, w, bias, stride=2, padding=1, output_padding=1) for _ in range(2)]
    expected = F.conv_transpose2d(x.double(), w.double(), bias.double(), stride=2, padding=1, output_padding=1)
    for one in found:
        torch.testing.assert_close(one.double(), expected, rtol=4e-3, atol=4e-2)
    assert convplan.stats()["fell_back"] == 0


@pytest.mark.behaviour("B5")
def test_transposed_convolution_is_dgrad() -> None:
    x, w = tensors()
    with convplan.enabled(CUDNN):
        found = F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1)
    expected = F.conv_transpose2d(x.double(), w.double(), stride=2, padding=1, output_padding=1)
    torch.testing.assert_close(found.double(), expected, rtol=4e-3, atol=4e-2)
    assert convplan.stats()["fell_back"] == 0


@pytest.mark.behaviour("C1")
def test_a_plan_comes_back_from_its_json() -> None:
    from convplan.engines.cudnn.engine import CudnnEngine
    from convplan.engines.cudnn.plans import restore_plan
    from convplan.engines.cudnn.target import present

    x, w = tensors()
    problem = Problem(
        **{
            **{f: getattr(convplan.problem("fprop", x, w, padding=1), f) for f in Problem.__struct_fields__},
            "epilogue": Epilogue(),
        }
    )
    assert isinstance(problem.x, TensorSpec)
    engine = CudnnEngine()
    config = engine.configs(problem, "instant")[0].config
    plan = engine.build_execution_plan(problem, config)
    target = present(0)
    restored = restore_plan(target, plan.serialize(), tuple(map(ord, "xwy")))
    assert restored.workspace_bytes == plan.workspace_bytes
    out, again = torch.empty_like(x), torch.empty_like(x)
    for one, result in ((plan, out), (restored, again)):
        scratch = torch.empty(max(one.workspace_bytes, 1), dtype=torch.uint8, device="cuda")
        one.execute(target.handle, (x.data_ptr(), w.data_ptr(), result.data_ptr(), scratch.data_ptr()))
        torch.cuda.synchronize()
    assert torch.equal(out, again)
    close(out, x, w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_the_functions_where_channels_differ(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(4, 16, 14, 14, device="cuda", dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    w = torch.randn(48, 16, 3, 3, device="cuda", dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    mine, stock = convplan.conv2d(x, w, padding=1, policy=Policy(effort="instant")), F.conv2d(x, w, padding=1)
    dy = torch.randn_like(stock)
    for one, other in zip(torch.autograd.grad(mine, (x, w), dy), torch.autograd.grad(stock, (x, w), dy), strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))
