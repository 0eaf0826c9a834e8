"""Networks of timm and torchvision on a GPU, forward and backward, in stock torch and under `enable()`.

Several processes share the networks among them, and the machine's GPUs too, because a network waits for the host most
of its time.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from convplan import Policy
from helpers.compat_models import Run, compare

PROCESSES = 8


class Compared(NamedTuple):
    """What came of one network: what differs, or why it did not run."""

    wrong: list[str]
    absent: str
    took_s: float


class Networks:
    """Processes that run networks. A network that was not asked for runs nowhere.

    Args:
        rows: package, name, and whether it is laid out channels last.
        cache_dir: where each process keeps its store, in a folder of its own.
    """

    def __init__(self, rows: list[tuple[str, str, bool]], cache_dir: str) -> None:
        context = multiprocessing.get_context("spawn")
        count = min(PROCESSES, len(rows))
        self._pool = ProcessPoolExecutor(count, context, _begin, (context.Value("i", 0), cache_dir))
        self._found: dict[tuple[str, str], Future[Compared]] = {
            (package, name): self._pool.submit(_compared, package, name, channels_last)
            for package, name, channels_last in rows
        }

    def of(self, package: str, name: str, seconds: float) -> Compared | None:
        """What came of a network; None where it takes longer than so many seconds from now."""
        found = self._found[package, name]
        wait([found], max(seconds, 0.0))
        return found.result() if found.done() else None

    def end(self) -> None:
        """Those that run are left alone no longer than they take."""
        self._pool.shutdown(cancel_futures=True)


def _begin(number: Any, cache_dir: str) -> None:
    with number.get_lock():
        own, number.value = number.value, number.value + 1
    os.environ["CONVPLAN_CACHE_DIR"] = str(Path(cache_dir, str(own)))
    warnings.simplefilter("ignore")  # the models' own
    torch.set_num_threads(2)
    torch.cuda.set_device(own % torch.cuda.device_count())
    torch.backends.cudnn.allow_tf32 = False


def _compared(package: str, name: str, channels_last: bool) -> Compared:
    begin = time.monotonic()
    found = build(package, name)
    if isinstance(found, str):
        return Compared([], found, 0.0)
    model, image = found[0].cuda().eval(), found[1].cuda()
    if channels_last and image.dim() == 4:
        model, image = model.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    wrong = compare(model, {"image": image}, run, Policy(effort="instant"))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return Compared(wrong, "", time.monotonic() - begin)


def build(package: str, name: str) -> tuple[Any, torch.Tensor] | str:
    """The model with random weights, and inputs of the smallest size it takes; or why there is none."""
    torch.manual_seed(0)
    if package == "timm":
        try:
            import timm
        except ModuleNotFoundError as error:
            return str(error)
        if name not in timm.list_models():
            return f"timm {timm.__version__} has no {name}"
        model = timm.create_model(name, pretrained=False, num_classes=10)
        fixed = getattr(model, "patch_embed", None) is not None or name.startswith(("xcit", "coat", "visformer"))
        size = 224 if fixed else 128
        return model, torch.randn(2, 3, size, size)
    try:
        from torchvision import models
    except ModuleNotFoundError as error:
        return str(error)
    arguments = {"weights": None} | ({"weights_backbone": None} if name.startswith(("lraspp", "deeplab")) else {})
    arguments |= {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    dims = {"s3d": (1, 3, 16, 224, 224)} | dict.fromkeys(("r3d_18", "r2plus1d_18", "mc3_18"), (2, 3, 16, 64, 64))
    return models.get_model(name, **arguments), torch.randn(*dims.get(name, (2, 3, 128, 128)))


def run(model: Any, given: dict[str, Any]) -> Run:
    """The outputs, and the gradients of the parameters and of the image."""
    model.zero_grad(set_to_none=True)
    image = given["image"].detach().requires_grad_()
    found = model(image)
    outputs = torch.utils._pytree.tree_leaves(dict(found) if hasattr(found, "items") else found)
    torch.stack([t.double().square().mean() for t in outputs]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [t.detach() for t in outputs], gradients | {"image": image.grad}
