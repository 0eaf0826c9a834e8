"""Streams, threads and devices under `enable()`: memory given back and taken again, gradients, replicas side by side.

`test_running.py` shows the same of single plans; here it is whole calls of torch's functions, with their backward.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convplan
from convplan import Policy

CUDNN = Policy(engines=("cudnn",), effort="instant")
CUDNN_THEN_ATEN = Policy(engines=("cudnn", "aten"), effort="instant")
SLEEP_CYCLES = 20_000_000  # about 10 ms: long enough for the host to be far ahead
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    from convplan import _runtime

    _runtime.forget()
    convplan.stats(reset=True)
    yield
    convplan.disable()
    torch.cuda.synchronize()


def tensors(seed: int, n: int = 4, c: int = 32, size: int = 40, device: str = "cuda") -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(n, c, size, size, generator=generator).to(device, torch.float16)
    w = (torch.randn(c, c, 3, 3, generator=generator) / 17).to(device, torch.float16)
    return x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double().cpu(), expected.double().cpu(), rtol=4e-3, atol=4e-2)


def spoil(like: Tensor) -> None:
    """Take memory of this size on the current stream, write what no result may hold, and give it back."""
    torch.full_like(like, float("nan"))


@pytest.mark.behaviour("B25")
@pytest.mark.behaviour("B26")
def test_a_chain_over_streams_whose_tensors_are_freed_while_they_are_used() -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    data = [tensors(seed) for seed in range(3)]
    right = [F.conv2d(F.conv2d(x.double(), w.double(), padding=1), w.double(), padding=1) for x, w in data]
    with convplan.enabled(CUDNN):
        for x, w in data:  # everything is planned before
            F.conv2d(x, w, padding=1)
        torch.cuda.synchronize()
        for _ in range(10):
            found = []
            for turn, (x, w) in enumerate(data):
                first, second = streams[turn], streams[(turn + 1) % 3]
                with torch.cuda.stream(first):
                    torch.cuda._sleep(SLEEP_CYCLES // 20)
                    y = F.conv2d(x, w, padding=1)
                second.wait_stream(first)
                with torch.cuda.stream(second):
                    z = F.conv2d(y, w, padding=1)
                    y.record_stream(second)
                    found.append(z)
                del y
                with torch.cuda.stream(first):
                    spoil(z)  # of the size that was given back
                spoil(z)
            torch.cuda.synchronize()
            for one, expected in zip(found, right, strict=True):
                close(one, expected)
    assert convplan.stats()["fell_back"] == 0


@pytest.mark.behaviour("B26")
@pytest.mark.behaviour("C8")
def test_gradients_on_side_streams_while_the_main_stream_works() -> None:
    data = [tensors(seed) for seed in range(2)]
    expected = []
    for x, w in data:
        x64, w64 = x.double().requires_grad_(), w.double().requires_grad_()
        expected.append(torch.autograd.grad(F.conv2d(x64, w64, padding=1).square().sum().mul(0.01), (x64, w64)))
    streams = [torch.cuda.Stream() for _ in data]
    torch.cuda.synchronize()
    with convplan.enabled(CUDNN):
        for _ in range(10):
            found = []
            for stream, (x, w) in zip(streams, data, strict=True):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(SLEEP_CYCLES // 20)
                    leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
                    y = F.conv2d(*leaves, padding=1)
                    found.append(torch.autograd.grad(y.float().square().sum().mul(0.01), leaves))
                spoil(x)
            torch.cuda.synchronize()
            for ours, right in zip(found, expected, strict=True):
                for one, other in zip(ours, right, strict=True):
                    scale = other.abs().max()
                    assert ((one.double() - other).abs().max() / scale).item() < 2e-2
    assert convplan.stats()["fell_back"] == 0


def network(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2, groups=4))
    return model.to(device)


@pytest.mark.behaviour("B22")
@pytest.mark.behaviour("B36")
@pytest.mark.parametrize("devices", [(0, 0), pytest.param((0, 1), marks=two_gpus)], ids=["one-gpu", "two-gpus"])
def test_replicas_in_threads_as_data_parallel_makes_them(devices: tuple[int, int]) -> None:
    from torch.nn.parallel import parallel_apply

    whole = network("cuda:0")
    images = torch.randn(8, 3, 24, 24, device="cuda:0")
    reference = copy.deepcopy(whole).double()
    right = reference(images.double())
    right.square().mean().backward()
    replicas = [copy.deepcopy(whole).to(f"cuda:{index}") for index in devices]
    parts = [(part.to(f"cuda:{index}"),) for part, index in zip(images.chunk(2), devices, strict=True)]
    with convplan.enabled(CUDNN_THEN_ATEN), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(5):
            for replica in replicas:
                replica.zero_grad(set_to_none=True)
            outputs = parallel_apply(replicas, parts, devices=list(devices))
            torch.cat([one.to("cuda:0") for one in outputs]).square().mean().backward()
            assert torch.cuda.current_device() == 0
    found = torch.cat([one.to("cuda:0") for one in outputs])
    torch.testing.assert_close(found.double(), right, rtol=1e-3, atol=1e-4)
    for parameters in zip(*(one.parameters() for one in replicas), reference.parameters(), strict=True):
        *ours, other = [parameter.grad.to("cuda:0").double() for parameter in parameters]
        torch.testing.assert_close(sum(ours), other, rtol=1e-2, atol=1e-4)
    assert convplan.stats()["fell_back"] == 0


@two_gpus
@pytest.mark.behaviour("B25")
def test_gradients_on_another_device_than_the_current_one() -> None:
    x, w = tensors(1, device="cuda:1")
    x64, w64 = x.double().requires_grad_(), w.double().requires_grad_()
    expected = torch.autograd.grad(F.conv2d(x64, w64, padding=1).square().sum().mul(0.01), (x64, w64))
    x.requires_grad_(), w.requires_grad_()
    with convplan.enabled(CUDNN):
        for _ in range(3):
            assert torch.cuda.current_device() == 0
            found = torch.autograd.grad(F.conv2d(x, w, padding=1).float().square().sum().mul(0.01), (x, w))
    assert all(one.device.index == 1 for one in found)
    for one, other in zip(found, expected, strict=True):
        assert ((one.double() - other).abs().max() / other.abs().max()).item() < 2e-2
    assert convplan.stats()["fell_back"] == 0


@pytest.mark.behaviour("B26")
def test_threads_with_streams_of_their_own_share_the_allocator() -> None:
    data = [tensors(seed, size=24 + 8 * seed) for seed in range(4)]
    right = [F.conv2d(x.double(), w.double(), padding=1) for x, w in data]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for turn in range(120):
                    place = (turn + number) % len(data)
                    x, w = data[place]
                    y = F.conv2d(x, w, padding=1)
                    spoil(y)
                    if turn % 13 == 0:
                        stream.synchronize()
                        close(y, right[place])
        except BaseException as exc:
            errors.append(exc)

    torch.cuda.synchronize()
    with convplan.enabled(CUDNN):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert convplan.stats()["fell_back"] == 0


def test_ranges_reach_nvtx_and_the_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    popped: list[int] = []
    push, pop = torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop

    def watched_push(name: str) -> int:
        pushed.append(name)
        return push(name)

    def watched_pop() -> int:
        popped.append(pop())
        return popped[-1]

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", watched_push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", watched_pop)
    x, w = tensors(0)
    with convplan.enabled(CUDNN):
        F.conv2d(x, w, padding=1)
        assert pushed == []
        with convplan.profiling():
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities, acc_events=True) as seen:
                for _ in range(2):
                    F.conv2d(x, w, padding=1)
                torch.cuda.synchronize()
    config = convplan.plan(convplan.problem("fprop", x, w, padding=1), CUDNN).config
    name = f"convplan {config} {convplan.problem('fprop', x, w, padding=1)}"
    assert [one for one in pushed if one != "convplan"] == [name, name]  # that one asks whether torch has NVTX
    assert len(popped) == len(pushed)
    assert name in {event.name for event in seen.events()}
