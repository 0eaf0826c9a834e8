"""`convplan demo`: a photograph through three image models, and a room's echo on a tune, stock torch beside convplan.

Real input and real architectures, so that what it prints is what a user may expect: a table for each workload, a line
for each of its convolutions, then the time of the whole. Plans are found once and stored; the second run finds them
there. Weights are random: that changes what the models say, not what their convolutions cost. The workload `fusion`
compares eager torch with what `convplan.fuse` makes of a model, and with single layers fused with what follows them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    import torch

    from convplan._plan import PlanRecord
    from convplan._policy import Policy
    from convplan._problem import Problem

TRAINING_BATCH = 4
IMAGE_SIZE = 224  # pixels, as the models were designed for
SAMPLE_RATE_HZ = 44_100
MUSIC_S = 4.0
ECHO_TAPS = 32_768  # 0.74 s
WHOLE_ROUNDS = 5
WORKLOADS = ("resnet", "convnext", "reverb", "fusion")

Progress = Callable[[str, int, int], object]
"""Told (workload, problems done, problems in all)."""


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One convolution of a workload: how often it runs, and its time in microseconds on both sides."""

    problem: str
    key: str
    uses: int
    chosen: str
    convplan_us: float
    stock_us: float

    @property
    def ratio(self) -> float:
        """Stock torch's time over convplan's; above 1 convplan is faster."""
        return self.stock_us / self.convplan_us


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """A whole piece of work, such as a training step: median milliseconds on both sides, in alternating rounds."""

    what: str
    convplan_ms: float
    stock_ms: float
    rounds: int

    @property
    def ratio(self) -> float:
        """Stock torch's time over convplan's; above 1 convplan is faster."""
        return self.stock_ms / self.convplan_ms


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One workload: its layers, its totals, and what planning did."""

    workload: str
    title: str
    layers: tuple[Layer, ...]
    totals: tuple[Total, ...]
    planning_s: float
    tuned: int
    from_store: int


class _Sides(NamedTuple):
    """One piece of work as stock torch does it, and as it is done under convplan."""

    stock: Callable[[], object]
    convplan: Callable[[], object]


class _Work:
    """A workload: whole pieces of work to time, of which the last runs all convolutions, and layers besides.

    A piece that is one callable is the same on both sides.
    """

    def __init__(
        self, title: str, whole: dict[str, Callable[[], object] | _Sides], layers: tuple[Problem, ...] = ()
    ) -> None:
        self.title = title
        self.whole = {what: one if isinstance(one, _Sides) else _Sides(one, one) for what, one in whole.items()}
        self.layers = layers


def run_demo(
    names: tuple[str, ...] = WORKLOADS, *, progress: Progress | None = None, budget_s: float = 0.4
) -> list[Outcome]:
    """Run the workloads, planning what is not in the store.

    Args:
        names: which of `WORKLOADS`.
        progress: told of each problem that is planned or found.
        budget_s: seconds for racing one problem's candidates.

    Raises:
        ImportError: the packages of the extra `demo` are missing.
    """
    from convplan import Policy

    policy = Policy(budget_s=budget_s)
    makers = {"resnet": _resnet, "convnext": _convnext, "reverb": _reverb, "fusion": _fusion}
    return [_run(name, makers[name](), policy, progress) for name in names]


def _run(name: str, work: _Work, policy: Policy, progress: Progress | None) -> Outcome:
    import convplan

    convplan.stats(reset=True)
    begin = time.perf_counter()
    uses = _count_uses(work)  # one run to see what there is; stored plans are read here

    def planned(done: int, total: int, record: PlanRecord | None) -> None:
        if progress is not None:
            progress(name, done, total)

    records = convplan.tune(uses, policy=policy, progress=planned)
    planning_s = time.perf_counter() - begin
    seen = convplan.stats(reset=True)
    totals = tuple(_time_whole(what, sides, policy) for what, sides in work.whole.items())
    layers = tuple(_layer(record, uses[record.problem]) for record in records)
    return Outcome(
        workload=name,
        title=work.title,
        layers=layers,
        totals=totals,
        planning_s=planning_s,
        tuned=seen["tuned"],
        from_store=seen["from_store"],
    )


def _count_uses(work: _Work) -> Counter[Problem]:
    """Each different convolution of the workload, and how often one run of its largest piece does it."""
    import convplan

    *_, largest = work.whole.values()
    with convplan.enabled(convplan.Policy(effort="instant")), convplan.capture() as seen:
        largest.convplan()
    return Counter(seen.calls) + Counter(work.layers)


def _layer(record: PlanRecord, uses: int) -> Layer:
    from convplan._bench import compare_record

    stock_us, convplan_us = compare_record(record, seconds=0.15)
    return Layer(
        problem=str(record.problem),
        key=record.key,
        uses=uses,
        chosen=str(record.config),
        convplan_us=convplan_us,
        stock_us=stock_us,
    )


def _time_whole(what: str, sides: _Sides, policy: Policy) -> Total:
    """The median of alternating rounds, after one run of each side. Very long work gets fewer rounds."""
    import convplan

    def ours() -> float:
        with convplan.enabled(policy):
            sides.convplan()  # entering has emptied this thread's ready plans; finding them again is not the work
            return _seconds(sides.convplan)

    sides.stock()
    stock_s, ours_s = [_seconds(sides.stock)], [ours()]
    rounds = max(1, min(WHOLE_ROUNDS, math.ceil(10 / (stock_s[0] + 2 * ours_s[0]))))
    for _ in range(rounds - 1):
        stock_s.append(_seconds(sides.stock))
        ours_s.append(ours())
    return Total(
        what=what,
        convplan_ms=statistics.median(ours_s) * 1e3,
        stock_ms=statistics.median(stock_s) * 1e3,
        rounds=rounds,
    )


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def photographs(count: int) -> torch.Tensor:
    """Crops of a photograph that scikit-image bundles, as (count, 3, 224, 224), normalized as the models expect."""
    import torch
    from skimage import data

    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1).float() / 255
    image = torch.nn.functional.interpolate(image[None], size=(320, 320), mode="area")[0]
    room = image.shape[-1] - IMAGE_SIZE
    corners = [(round(room * i / max(count - 1, 1)), round(room * (i % 2))) for i in range(count)]
    crops = torch.stack([image[:, y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for y, x in corners])
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (crops - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)


def _resnet() -> _Work:
    from transformers import ResNetConfig, ResNetForImageClassification

    model = _seeded(lambda: ResNetForImageClassification(ResNetConfig(num_labels=1000)))
    return _image_work("ResNet-50", model)


def _convnext() -> _Work:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    model = _seeded(lambda: ConvNextForImageClassification(ConvNextConfig(num_labels=1000)))
    return _image_work("ConvNeXt-T", model)


def _seeded(make: Callable[[], Any]) -> Any:
    import torch

    torch.manual_seed(0)
    return make()


def _image_work(title: str, model: Any) -> _Work:
    import torch

    images = photographs(TRAINING_BATCH)
    labels = torch.arange(TRAINING_BATCH)

    def forward() -> object:
        model.eval()
        with torch.no_grad():
            return model(pixel_values=images)

    def training_step() -> object:
        model.train()
        model.zero_grad(set_to_none=True)
        model(pixel_values=images, labels=labels).loss.backward()
        return None

    size = f"{TRAINING_BATCH}x3x{IMAGE_SIZE}x{IMAGE_SIZE}, float32"
    return _Work(f"{title}, {size}", {"forward": forward, "training step": training_step})


def music(seconds: float = MUSIC_S) -> torch.Tensor:
    """Two channels of plucked strings (Karplus-Strong), as (1, 2, samples)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    total = round(seconds * SAMPLE_RATE_HZ)
    sound = torch.zeros(2, total)
    for place, frequency_hz in enumerate([220.0, 277.18, 329.63, 440.0, 329.63, 277.18, 220.0, 164.81]):
        begin = round(place * seconds / 8 * SAMPLE_RATE_HZ)
        note = _plucked(frequency_hz, total - begin, generator)
        pan = 0.25 + 0.5 * (place % 2)
        sound[0, begin:] += (1 - pan) * note
        sound[1, begin:] += pan * note
    return sound[None] / sound.abs().max()


def _plucked(frequency_hz: float, samples: int, generator: torch.Generator) -> torch.Tensor:
    """One string: a burst of noise that runs around a loop and is smoothed at each turn."""
    import torch

    loop = torch.rand(round(SAMPLE_RATE_HZ / frequency_hz), generator=generator) * 2 - 1
    turns = []
    for _ in range(math.ceil(samples / len(loop))):
        turns.append(loop)
        loop = 0.498 * (loop + loop.roll(1))
    return torch.cat(turns)[:samples]


def echo(taps: int = ECHO_TAPS) -> torch.Tensor:
    """A hall's impulse response for two channels, as (2, 1, taps): noise dying away by 60 dB, after a direct sound."""
    import torch

    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 1, taps, generator=generator)
    decay = torch.exp(-6.9 * torch.arange(taps) / taps)
    response = 0.05 * noise * decay
    response[..., 0] = 1.0
    return response.flip(-1)  # conv1d correlates; a filter is convolved


def _reverb() -> _Work:
    import torch
    import torch.nn.functional as F

    sound, response = music(), echo()
    padded = F.pad(sound, (ECHO_TAPS - 1, ECHO_TAPS - 1))

    def wet() -> torch.Tensor:
        with torch.no_grad():
            return F.conv1d(padded, response, groups=2)

    title = f"Convolution reverb, {MUSIC_S:g} s of stereo at {SAMPLE_RATE_HZ} Hz, {ECHO_TAPS} taps"
    return _Work(title, {"reverb": wet})


# What models put behind their convolutions: (model, input, weight, keywords of `Problem.dense`, epilogue).
FUSED_LAYERS: tuple[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any], str], ...] = (
    ("ResNet", (1, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}, "residual+bias+relu"),
    ("ResNet", (1, 64, 56, 56), (64, 64, 3, 3), {"padding": 1, "layout": "channels_last"}, "residual+bias+relu"),
    ("ResNet", (1, 64, 56, 56), (256, 64, 1, 1), {"layout": "channels_last"}, "residual+bias+relu"),
    ("MobileNetV2", (1, 96, 56, 56), (96, 1, 3, 3), {"padding": 1, "groups": 96}, "bias+clamp(0,6)"),
    ("MobileNetV3", (1, 240, 28, 28), (240, 1, 3, 3), {"padding": 1, "groups": 240}, "bias+hardswish"),
    ("diffusion U-Net", (1, 128, 64, 64), (128, 128, 3, 3), {"padding": 1}, "bias+silu"),
    ("wav2vec 2.0", (1, 512, 3199), (512, 512, 3), {"stride": 2}, "bias+gelu"),
)


def fused_layers() -> tuple[Problem, ...]:
    """The problems of `FUSED_LAYERS`, in float32."""
    from convplan._epilogue import parse_epilogue
    from convplan._problem import Problem

    return tuple(
        Problem.dense("fprop", x_dims, w_dims, epilogue=parse_epilogue(text), **keywords)
        for _, x_dims, w_dims, keywords, text in FUSED_LAYERS
    )


def _fusion() -> _Work:
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    import convplan

    sizes = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    model = _seeded(lambda: ResNetForImageClassification(ResNetConfig(num_labels=1000, **sizes))).eval()
    images = photographs(1)
    fused = convplan.fuse(model)

    def forward(one: Any) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return one(pixel_values=images)

        return call

    title = f"Fusion: ResNet-18 as it is and fused, 1x3x{IMAGE_SIZE}x{IMAGE_SIZE}, float32, and layers of other models"
    return _Work(title, {"forward, fused": _Sides(forward(model), forward(fused))}, fused_layers())
