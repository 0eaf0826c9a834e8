"""Tensors that are not plain ones: subclasses, modes that listen, fakes, and layouts that convplan leaves to torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from helpers.compat import BF16, F32, Case, Place, Tensor
from helpers.compat_semantics import FORMS, FUNCTIONS, given, with_gradients


class Marked(torch.Tensor):
    """A subclass that does nothing."""


class Listening(torch.Tensor):
    """A subclass that writes down which functions are called with it."""

    heard: list[str] = []  # noqa: RUF012 - one list for all, emptied by whoever reads it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.heard.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped(torch.Tensor):
    """A tensor around another, which hears of every operator below autograd."""

    elem: Tensor
    heard: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, elem: Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(
            cls, elem.shape, strides=elem.stride(), dtype=elem.dtype, device=elem.device
        )
        made.elem = elem
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.heard.append(str(func))
        inner = torch.utils._pytree.tree_map_only(cls, lambda t: t.elem, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(Tensor, cls, func(*inner[0], **inner[1]))


class Heard(TorchDispatchMode):
    """Writes down every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


class HeardAbove(torch.overrides.TorchFunctionMode):
    """Writes down every function of torch that Python calls."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def of_a_subclass(kind: Any, which: int, function: str, on: Place) -> Any:
    tensors = [t.as_subclass(kind) if which >> i & 1 else t for i, t in enumerate(given(on, function))]
    if kind is Listening:
        Listening.heard.clear()
    y, grads = with_gradients(on, function, *tensors, padding=1)
    return y, grads, list(getattr(kind, "heard", ()))


def wrapped(which: int, function: str, on: Place) -> Any:
    Wrapped.heard.clear()
    tensors = [Wrapped(t) if which >> i & 1 else Wrapped(t) if i != 1 else t for i, t in enumerate(given(on, function))]
    leaves = [t.requires_grad_() for t in tensors]
    y = getattr(F, function)(*leaves, padding=1)
    return y, torch.autograd.grad(y.sum(), leaves), list(Wrapped.heard)


def heard_by_a_mode(mode: Any, function: str, on: Place) -> Any:
    leaves = [t.detach().requires_grad_() for t in given(on, function)]
    with mode() as ear:
        y = getattr(F, function)(*leaves, stride=2)
        y.sum().backward()
    return y, [t.grad for t in leaves], ear.heard


def counted(function: str, on: Place) -> Any:
    leaves = [t.detach().requires_grad_() for t in given(on, function)]
    with FlopCounterMode(display=False) as counter:
        getattr(F, function)(*leaves).sum().backward()
    return counter.get_total_flops()


def fake(function: str, form: str, on: Place) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = given(on, function)
    with FakeTensorMode() as mode:
        leaves = [FORMS[form](mode.from_tensor(t)).detach().requires_grad_() for t in tensors[:2]]
        y = getattr(F, function)(*leaves, padding=1)
        grads = torch.autograd.grad(y.sum(), leaves)
    return [(t.shape, t.stride(), t.dtype, str(t.device), type(t).__name__) for t in (y, *grads)]


def on_meta(function: str, form: str, on: Place) -> Any:
    x, w, bias = (t.to("meta") for t in given(on, function))
    return with_gradients(on, function, FORMS[form](x), w, bias, padding=1)


def nested(layout: torch.layout, on: Place) -> Any:
    parts = [on.randn(3, 5, 5), on.randn(3, 4, 6)]
    return F.conv2d(torch.nested.nested_tensor(parts, layout=layout, device=on.device), on.randn(2, 3, 3, 3))


def sparse(kind: str, which: int, on: Place) -> Any:
    x, w, bias = given(on, "conv2d")
    make = {"coo": lambda t: t.to_sparse(), "csr": lambda t: t.flatten(1).to_sparse_csr()}[kind]
    return F.conv2d(*(make(t) if which == i else t for i, t in enumerate((x, w))), bias)


def quantized(which: int, on: Place) -> Any:
    x, w, bias = given(on, "conv2d")
    x, w = (
        torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8) if which >> i & 1 else t for i, t in enumerate((x, w))
    )
    return F.conv2d(x, w, bias)


def mkldnn_layout(on: Place) -> Any:
    x, w, bias = given(on, "conv2d")
    return F.conv2d(x.float().to_mkldnn(), w.float(), bias.float()).to_dense()


def distributed(which: int, on: Place) -> Any:
    """A tensor over a mesh of one process: torch's own rules for it call the convolution of its local part."""
    from torch import distributed
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensors = [
            DTensor.from_local(t, mesh, [Replicate()]) if which >> i & 1 else t
            for i, t in enumerate(given(on, "conv2d")[:2])
        ]
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = F.conv2d(*leaves, padding=1)
        return y, torch.autograd.grad(y.sum(), leaves)
    finally:
        distributed.destroy_process_group()


def undefined_storage(on: Place) -> Any:
    x, w, bias = given(on, "conv2d")
    w = w.clone()
    w.untyped_storage().resize_(0)
    return F.conv2d(x[:0], w, bias)


CASES = [
    *(
        Case(f"{kind.__name__.lower()}-{which}-{function}", partial(of_a_subclass, kind, which, function))
        for kind in (Marked, Listening)
        for which in (1, 2, 7)
        for function in ("conv1d", "conv2d", "conv_transpose2d")
    ),
    *(Case(f"wrapped-{which}-{f}", partial(wrapped, which, f)) for which in (5, 7) for f in ("conv2d", "conv1d")),
    *(
        Case(f"{mode.__name__.lower()}-{function}", partial(heard_by_a_mode, mode, function))
        for mode in (Heard, HeardAbove)
        for function in FUNCTIONS
    ),
    *(Case(f"flops-{function}", partial(counted, function)) for function in FUNCTIONS),
    *(
        Case(f"{run.__name__}-{function}-{form}", partial(run, function, form), (F32, BF16), planned=False)
        for run in (fake, on_meta)
        for function in FUNCTIONS
        for form in ("contiguous", "channels-last", "expanded-batch")
    ),
    *(Case(f"nested-{name}", partial(nested, layout), planned=None)
      for name, layout in (("strided", torch.strided), ("jagged", torch.jagged))),
    *(Case(f"sparse-{kind}-{which}", partial(sparse, kind, which), planned=False) for kind in ("coo", "csr")
      for which in (0, 1)),
    *(Case(f"quantized-{which}", partial(quantized, which), planned=False, devices=("cpu",)) for which in (1, 2, 3)),
    *(Case(f"distributed-{which}", partial(distributed, which), planned=None, devices=("cpu",)) for which in (1, 2, 3)),
    Case("mkldnn-layout", mkldnn_layout, planned=False, devices=("cpu",)),
    Case("freed-weight-no-samples", undefined_storage, planned=False),
]  # fmt: skip
