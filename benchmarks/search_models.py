"""Whole models in processes of their own, for `run_search.py`: a first training step, and a stream of image sizes.

    python benchmarks/search_models.py tune|replay|stock-step                # one training step of a ResNet-50
    python benchmarks/search_models.py stream-stock|stream-convplan          # images of different sizes, one by one
    python benchmarks/search_models.py stream-tune                           # three sizes, so that others run by them

Prints one JSON object on the last line. Time starts with the first line of this file, before torch is imported.
"""

import time

BEGIN = time.perf_counter()

import argparse  # noqa: E402 - what is imported is part of what is timed
import json  # noqa: E402
import random  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

LONGEST, SHORTEST, NARROWEST = 1333, 800, 480  # pixels: the usual limits when images are resized for detection
TUNED_SIZES = ((NARROWEST, 560), (640, 853), (SHORTEST, LONGEST))  # none of those that the stream holds
SMALL_DIVISOR = 12  # of those, where there is no GPU
REGRET_SHAPES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    programs = {
        "tune": tune,
        "replay": lambda options: step(options, "replay"),
        "stock-step": lambda options: step(options, "stock"),
        "stream-stock": lambda options: stream(options, "stock"),
        "stream-convplan": lambda options: stream(options, "convplan"),
        "stream-tune": stream_tune,
    }
    parser.add_argument("program", choices=programs)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=60.0, help="a stream that takes longer is left there")
    parser.add_argument("--budget-s", type=float, default=None, help="Policy.budget_s")
    parser.add_argument("--tuning-limit-s", type=float, default=None, help="Policy.tuning_limit_s")
    parser.add_argument("--regret", action="store_true", help="also how good the stream's choices are, once warm")
    options = parser.parse_args()
    print(json.dumps(programs[options.program](options)))


def policy(options: argparse.Namespace, **changes: Any) -> Any:
    import convplan

    given = {"budget_s": options.budget_s, "tuning_limit_s": options.tuning_limit_s}
    return convplan.Policy(**{name: value for name, value in given.items() if value is not None}, **changes)


def resnet(device: str) -> Any:
    """A ResNet-50 with random weights, channels-last; where there is no GPU, one with a layer a stage."""
    import torch

    torch.manual_seed(0)
    with torch.device(device):
        model = _resnet(small=device == "cpu")
    return model.to(memory_format=torch.channels_last)


def _resnet(small: bool) -> Any:
    try:
        import torchvision
    except ImportError:
        import transformers

        sizes = {"hidden_sizes": [16, 32, 48, 64], "embedding_size": 8, "depths": [1, 1, 1, 1]} if small else {}
        return transformers.ResNetModel(transformers.ResNetConfig(**sizes))
    if small:
        return torchvision.models.resnet18(weights=None)
    return torchvision.models.resnet50(weights=None)


def output(found: Any) -> Any:
    return getattr(found, "pooler_output", found)


def training_step(device: str) -> Callable[[], float]:
    """Forward, backward and update, mixed precision on a GPU; returns the loss."""
    import torch

    model = resnet(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch, size = (64, 224) if device == "cuda" else (2, 64)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.float16, enabled=device == "cuda"):
            loss = output(model(images)).float().square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())  # waits for the GPU

    return run


def tune(options: argparse.Namespace) -> dict[str, Any]:
    import convplan

    records = convplan.tune(training_step(options.device), policy=policy(options))
    return {"problems": len(records), "seconds": time.perf_counter() - BEGIN, "stats": convplan.stats()}


def step(options: argparse.Namespace, side: str) -> dict[str, Any]:
    import torch

    torch.backends.cudnn.benchmark = False
    found: dict[str, Any] = {"side": side, "imported_torch_s": time.perf_counter() - BEGIN}
    if side == "replay":
        begin = time.perf_counter()
        import convplan

        convplan.enable(policy(options, mode="replay"))
        found["enabled_s"] = time.perf_counter() - begin
    run = training_step(options.device)
    found["ready_s"] = time.perf_counter() - BEGIN
    found["loss"] = run()
    found["first_step_done_s"] = time.perf_counter() - BEGIN
    found["first_step_s"] = found["first_step_done_s"] - found["ready_s"]
    begin = time.perf_counter()
    run()
    found["second_step_s"] = time.perf_counter() - begin
    if side == "replay":
        found["stats"] = convplan.stats()
    return found


def image_sizes(count: int, divisor: int) -> list[tuple[int, int]]:
    """Different sizes as images have them after resizing for detection: shorter side bounded, longer side too."""
    generator, sizes = random.Random(0), dict[tuple[int, int], None]()
    while len(sizes) < count:
        short = generator.randint(NARROWEST // divisor, SHORTEST // divisor)
        long = min(round(short * generator.uniform(1.0, 2.0)), LONGEST // divisor)
        sizes[(short, long) if generator.random() < 0.7 else (long, short)] = None
    return list(sizes)


def streamed(options: argparse.Namespace) -> tuple[Callable[[tuple[int, int]], float], int]:
    """Runs one image of a size and gives its milliseconds; and by what the sizes are divided."""
    import torch

    torch.backends.cudnn.benchmark = False
    device, divisor = options.device, 1 if options.device == "cuda" else SMALL_DIVISOR
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = resnet(device).eval().to(dtype)

    def run(size: tuple[int, int]) -> float:
        image = torch.randn(1, 3, *size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        begin = time.perf_counter()
        output(model(image)).float().sum().item()  # waits for the GPU
        return (time.perf_counter() - begin) * 1e3

    return run, divisor


def stream_tune(options: argparse.Namespace) -> dict[str, Any]:
    """What a user does once: tune for the smallest, a middle and the largest image."""
    import torch

    import convplan

    run, divisor = streamed(options)
    begin = time.perf_counter()
    with torch.no_grad():
        records = convplan.tune(
            lambda: [run((height // divisor, width // divisor)) for height, width in TUNED_SIZES],
            policy=policy(options),
        )
    return {"problems": len(records), "seconds": time.perf_counter() - begin, "stats": convplan.stats()}


def stream(options: argparse.Namespace, side: str) -> dict[str, Any]:
    import torch

    run, divisor = streamed(options)
    sizes = image_sizes(options.images + 1, divisor)
    with torch.no_grad():
        first_ms = run(sizes.pop())  # what a process does once, before convplan is switched on
        if side == "convplan":
            import convplan

            convplan.enable(policy(options))
        begin, times_ms = time.perf_counter(), []
        for size in sizes:
            times_ms.append(run(size))
            if time.perf_counter() - begin > options.seconds:
                break
        found: dict[str, Any] = {"side": side, "first_ms": first_ms, "times_ms": times_ms, "stats": {}, "regrets": []}
        if side == "convplan":
            found["stats"] = convplan.stats()
            convplan.disable()  # so that looking at what the images ask for is no second sight of it
            if options.regret:
                found["regrets"] = stream_regrets(options, run, sizes[: len(times_ms)])
    return found


def stream_regrets(
    options: argparse.Namespace, run: Callable[[tuple[int, int]], float], sizes: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """For one layer of each of some images from the stream's second half: its choice against the best there is."""
    import convplan
    from convplan import _environment
    from convplan._choices import known
    from convplan._regret import regret_of, tunings

    wanted = policy(options).resolve()
    late = sizes[len(sizes) // 2 :]
    rows = []
    for number, size in enumerate(late[:: max(1, len(late) // REGRET_SHAPES)][:REGRET_SHAPES]):
        with convplan.capture() as asked:
            run(size)
        problem = asked[(7 * number) % len(asked)]
        environment = _environment.current(problem.device)
        choice = known.choices.get(problem, wanted, environment).record
        if choice is None:
            rows.append({"problem": str(problem), "regret": None})
            continue
        found = regret_of([choice, *tunings(problem, wanted, 1)], seconds=0.3)
        rows.append({"problem": str(problem), "regret": found.regrets[0], "chosen": str(choice.config)})
        rows[-1]["effort"] = choice.effort
    return rows


if __name__ == "__main__":
    main()
