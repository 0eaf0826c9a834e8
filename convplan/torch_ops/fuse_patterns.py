"""What the nodes of a traced graph are to `fuse`: convolutions, batch norms, sums, activations, concatenations, max
pools, writes in place.

Tables and questions about one node; nothing here changes a graph. Modules count by their very class, as a subclass may
compute anything; only convolutions count by what they run.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from convplan._activations import Resolved, resolve
from convplan._errors import SpecError
from convplan.torch_ops.between import Windows
from convplan.torch_ops.fused_modules import Geometry, Norm, Sum

Modules = Mapping[str, nn.Module]

_aten = torch.ops.aten

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _writer(write: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def function(first: Any, second: Any) -> Any:
        return write(first, second)

    function.__name__ = function.__qualname__ = write.__name__
    return function


# `a += b` and the like in a graph. Torch would trace `a = a + b`, and the code it makes of `operator.iadd` gives `a`
# another value where that is a number. Each is found by its name in this module when a graph is unpickled.
iadd, isub, imul, itruediv = map(_writer, (operator.iadd, operator.isub, operator.imul, operator.itruediv))
ifloordiv, imod, ipow = map(_writer, (operator.ifloordiv, operator.imod, operator.ipow))
iand, ior, ixor = map(_writer, (operator.iand, operator.ior, operator.ixor))
IN_PLACE = (iadd, isub, imul, itruediv, ifloordiv, imod, ipow, iand, ior, ixor)

# Modules: class, the activation's name, and the attributes that hold its parameters.
_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.ReLU6: ("hardtanh", ("min_val", "max_val")),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.SiLU: ("silu", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.ELU: ("elu", ("alpha",)),
    nn.Softplus: ("softplus", ("beta", "threshold")),
}

# Functions and methods: name of the activation, and its parameters' names and defaults in the order of arguments.
_Signature = tuple[str, tuple[tuple[str, float], ...]]
_SLOPE = ("leaky_relu", (("negative_slope", 0.01),))
_BOUNDS = ("hardtanh", (("min_val", -1.0), ("max_val", 1.0)))
_CLAMP = ("clamp", (("min", math.nan), ("max", math.nan)))
_SIX: _Signature = ("relu6", ())
_ELU = ("elu", (("alpha", 1.0),))
_SOFTPLUS = ("softplus", (("beta", 1.0), ("threshold", 20.0)))
_FUNCTIONS: dict[object, _Signature] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"), ("relu", ())),
    **dict.fromkeys((F.relu6,), _SIX),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _SLOPE),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _BOUNDS),
    **dict.fromkeys((torch.clamp, torch.clamp_, torch.clip, "clamp", "clamp_", "clip", "clip_"), _CLAMP),
    **dict.fromkeys((F.gelu,), ("gelu", ())),
    **dict.fromkeys((F.silu,), ("silu", ())),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), ("sigmoid", ())),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), ("tanh", ())),
    **dict.fromkeys((F.hardswish,), ("hardswish", ())),
    **dict.fromkeys((F.elu, F.elu_), _ELU),
    **dict.fromkeys((F.softplus,), _SOFTPLUS),
    **dict.fromkeys((_aten.relu.default, _aten.relu_.default), ("relu", ())),
    **dict.fromkeys((_aten.leaky_relu.default, _aten.leaky_relu_.default), _SLOPE),
    **dict.fromkeys((_aten.hardtanh.default, _aten.hardtanh_.default), _BOUNDS),
    **dict.fromkeys((_aten.relu6.default, _aten.relu6_.default), _SIX),
    **dict.fromkeys((_aten.clamp.default, _aten.clamp_.default), _CLAMP),
    **dict.fromkeys((_aten.gelu.default, _aten.gelu_.default), ("gelu", ())),
    **dict.fromkeys((_aten.silu.default, _aten.silu_.default), ("silu", ())),
    **dict.fromkeys((_aten.sigmoid.default, _aten.sigmoid_.default), ("sigmoid", ())),
    **dict.fromkeys((_aten.tanh.default, _aten.tanh_.default), ("tanh", ())),
    **dict.fromkeys((_aten.hardswish.default, _aten.hardswish_.default), ("hardswish", ())),
    **dict.fromkeys((_aten.elu.default, _aten.elu_.default), _ELU),
    **dict.fromkeys((_aten.softplus.default,), _SOFTPLUS),
}

_IN_PLACE_SUMS = (iadd, operator.iadd, "add_", _aten.add_.Tensor)
_SUMS = (operator.add, torch.add, "add", "__add__", _aten.add.Tensor, *_IN_PLACE_SUMS)
_CALLS: dict[object, tuple[int, bool]] = {
    **dict.fromkeys((F.conv1d, torch.conv1d, _aten.conv1d.default, _aten.conv1d.padding), (1, False)),
    **dict.fromkeys((F.conv2d, torch.conv2d, _aten.conv2d.default, _aten.conv2d.padding), (2, False)),
    **dict.fromkeys((F.conv3d, torch.conv3d, _aten.conv3d.default, _aten.conv3d.padding), (3, False)),
    **dict.fromkeys((F.conv_transpose1d, torch.conv_transpose1d, _aten.conv_transpose1d.default), (1, True)),
    **dict.fromkeys((F.conv_transpose2d, torch.conv_transpose2d, _aten.conv_transpose2d.input), (2, True)),
    **dict.fromkeys((F.conv_transpose3d, torch.conv_transpose3d, _aten.conv_transpose3d.input), (3, True)),
}
_BATCH_NORMS = (F.batch_norm, torch.batch_norm, _aten.batch_norm.default)

_JOINS = (torch.cat, torch.concat, torch.concatenate)
_POOLS: dict[object, int] = {
    **dict.fromkeys((nn.MaxPool2d, F.max_pool2d, torch.max_pool2d), 2),
    **dict.fromkeys((nn.MaxPool3d, F.max_pool3d, torch.max_pool3d), 3),
}

# Classes of torch's whose result shares no memory with their input, unless they are told to work in place.
_FRESH = (
    *CONVOLUTIONS, *NORMS, *_MODULES, nn.GELU, nn.Linear, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d,
    nn.AvgPool2d, nn.AvgPool3d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
_FRESH_FUNCTIONS = (operator.add, operator.sub, operator.mul, torch.add, torch.mul, torch.cat, *_CALLS, *_BATCH_NORMS)
_WRITERS = (
    *IN_PLACE, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor, operator.setitem,
)  # fmt: skip


def is_touched(module: nn.Module) -> str:
    """Why a module is not to be taken apart: somebody listens to its calls, or has replaced what they do."""
    hooks = (
        "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
        "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    )  # fmt: skip
    if any(getattr(module, name, None) for name in hooks):
        return "has hooks"
    if "forward" in vars(module) or "__call__" in vars(module):
        return "has a forward of its own, set on the instance"
    if type(module).__call__ is not nn.Module.__call__:
        return "has a __call__ of its own"
    return ""


def computes_plainly(module: nn.Module) -> bool:
    """Whether a module is one of torch's convolutions, or of a class that adds nothing to what it computes."""
    kind = next((kind for kind in CONVOLUTIONS if isinstance(module, kind)), None)
    names = ("forward", "_conv_forward", "_output_padding", "__getattr__", "__getattribute__")
    return kind is not None and all(getattr(type(module), n, None) is getattr(kind, n, None) for n in names)


def why_not(conv: nn.Module, *, trains: bool = False) -> str:
    """Why a convolution module is left as it is; empty where it is one to plan for.

    Args:
        trains: it may be in training mode.
    """
    if not computes_plainly(conv):
        return f"is a {type(conv).__name__}, which may compute anything"
    touched = is_touched(conv)
    if touched:
        return touched
    own: Any = conv
    for name, tensor in (("weight", own.weight), ("bias", own.bias)):
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter or type(tensor.data) is not torch.Tensor:
            return f"its {name} is no plain parameter"
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_quantized:
            return f"its {name} is {tensor.dtype}, {tensor.layout}"
    if set(own._parameters) != {"weight", "bias"} or own._buffers or own._modules:
        return "has parameters or buffers that convolutions do not have"
    if own.padding_mode != "zeros":
        return f"pads with {own.padding_mode!r}"
    return "is in training mode" if own.training and not trains else ""


def called(node: Node, modules: Modules) -> nn.Module | None:
    """The module that a node calls with one tensor and nothing else."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return modules.get(str(node.target))


def arguments(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """A call's arguments by name; those that were left out are absent."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


# --- convolutions as functions


class Call(NamedTuple):
    """A call of one of torch's functional convolutions."""

    x: Node
    weight: Node
    bias: Node | None
    geometry: Geometry


def functional_call(node: Node) -> Call | None:
    """The convolution that a node computes from tensors, where all of its numbers are known."""
    if node.op != "call_function" or node.target not in _CALLS:
        return None
    spatial, transposed = _CALLS[node.target]
    ending = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    given = arguments(node, ("input", "weight", "bias", "stride", "padding", *ending))
    x, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    if not isinstance(x, Node) or not isinstance(weight, Node) or not isinstance(bias, (Node, type(None))):
        return None
    try:
        geometry = Geometry(
            spatial=spatial,
            stride=_numbers(given.get("stride", 1), spatial),
            padding=given["padding"]
            if isinstance(given.get("padding"), str)
            else _numbers(given.get("padding", 0), spatial),
            dilation=_numbers(given.get("dilation", 1), spatial),
            transposed=transposed,
            output_padding=_numbers(given.get("output_padding", 0), spatial),
            groups=operator.index(given.get("groups", 1)),
        )
    except TypeError:  # a number that is computed
        return None
    return Call(x, weight, bias, geometry)


def _numbers(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    values = values * count if len(values) == 1 else values
    return tuple(map(operator.index, values))


# --- what follows


def norm_of(node: Node, modules: Modules, constant: Callable[[Any], torch.Tensor | None]) -> Norm | str:
    """The batch norm that a node computes with numbers that stay as they are, or why it is none.

    Args:
        node: a node of the graph.
        modules: by the paths that nodes name.
        constant: the tensor that a node yields every time; None where it yields others.
    """
    module = called(node, modules)
    if type(module) in NORMS:
        return _module_norm(module)
    if node.op != "call_function" or node.target not in _BATCH_NORMS:
        return ""
    eager = node.target is F.batch_norm
    order = ("mean", "var", "weight", "bias") if eager else ("weight", "bias", "mean", "var")
    given = arguments(node, ("input", *order, "training", "momentum", "eps"))
    given |= {name: given.pop(f"running_{name}") for name in ("mean", "var") if f"running_{name}" in given}
    if given.get("training", False) is not False:
        return "the batch norm takes its statistics from the batch"
    tensors = {name: constant(given.get(name)) for name in order}
    if tensors["mean"] is None or tensors["var"] is None:
        return "the batch norm's statistics are computed"
    if any(given.get(name) is not None and tensors[name] is None for name in order):
        return "the batch norm's weight or bias is computed"
    return Norm(tensors["mean"], tensors["var"], tensors["weight"], tensors["bias"], float(given.get("eps", 1e-5)))


def _module_norm(module: Any) -> Norm | str:
    touched = is_touched(module)
    if touched:
        return f"the batch norm {touched}"
    if module.training:
        return "the batch norm is in training mode"
    if module.running_mean is None or module.running_var is None:
        return "the batch norm takes its statistics from the batch"
    if any(
        type(t) not in (torch.Tensor, nn.Parameter) for t in (*module._parameters.values(), module.running_mean)
        if t is not None
    ):  # fmt: skip
        return "the batch norm's numbers are no plain tensors"
    return Norm(module.running_mean, module.running_var, module.weight, module.bias, module.eps)


def sum_of(node: Node, result: Node) -> tuple[Sum, Node] | str:
    """How a node adds another tensor to `result`, and that tensor; or why it does not."""
    if node.op not in ("call_function", "call_method") or node.target not in _SUMS:
        return ""
    given = arguments(node, ("input", "other"))
    first, second, alpha = given.get("input"), given.get("other"), given.get("alpha", 1)
    if set(given) - {"input", "other", "alpha"} or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        return "it is added in an unusual way"
    if not isinstance(first, Node) or not isinstance(second, Node):
        return "a number is added"
    if first is second:
        return "it is added to itself"
    in_place = node.target in _IN_PLACE_SUMS
    if first is result:
        return Sum(float(alpha), convolution_first=True, in_place=in_place), second
    if alpha != 1:
        return "alpha belongs to the convolution's side of the sum"
    return Sum(1.0, convolution_first=False, in_place=in_place), first


def activation_of(node: Node, modules: Modules) -> Resolved | str:
    """The activation that a node computes, or why it is none that plans compute."""
    module = called(node, modules)
    found: tuple[str, tuple[Any, ...]] | None = None
    if module is not None:
        if type(module) in _MODULES or type(module) is nn.GELU:
            touched = is_touched(module)
            if touched:
                return f"{node.target} {touched}"
            own: Any = module
            if type(module) is nn.GELU:
                found = _gelu(own.approximate)
            else:
                name, attributes = _MODULES[type(module)]
                found = name, tuple(getattr(own, attribute) for attribute in attributes)
    elif node.op in ("call_function", "call_method") and node.target in _FUNCTIONS:
        name, parameters = _FUNCTIONS[node.target]
        given = arguments(node, ("input", *(key for key, _ in parameters)))
        found = (
            _gelu(given.get("approximate", "none"))
            if name == "gelu"
            else (name, tuple(given.get(key, default) for key, default in parameters))
        )
    if found is None:
        return ""
    try:
        return resolve((found[0], *found[1]))
    except SpecError as exc:
        return str(exc)


def _gelu(approximate: str) -> tuple[str, tuple[Any, ...]]:
    return ("gelu_tanh" if approximate == "tanh" else "gelu"), ()


# --- what stands between convolutions


def joined(node: Node) -> tuple[tuple[Node, ...], int] | None:
    """The tensors that a node puts side by side, and along which dimension; None where it does something else."""
    if node.op != "call_function" or node.target not in _JOINS:
        return None
    given = arguments(node, ("tensors", "dim"))
    dim = given.pop("axis", given.pop("dim", 0))
    tensors = given.pop("tensors", None)
    if given or type(dim) is not int or not isinstance(tensors, (list, tuple)):
        return None
    parts = tuple(one for one in tensors if isinstance(one, Node))
    return (parts, dim) if len(parts) == len(tensors) > 1 else None


def pooled(node: Node, modules: Modules) -> tuple[Node, Windows] | None:
    """What a node takes the largest numbers of, and in which windows; None where it does something else."""
    module = called(node, modules)
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if module is not None:
        spatial = _POOLS.get(type(module), 0)
        if not spatial or is_touched(module):
            return None
        given = {name: getattr(module, name) for name in names} | {"input": node.args[0]}
    elif node.op == "call_function" and node.target in _POOLS:
        spatial, given = _POOLS[node.target], arguments(node, ("input", *names))
    else:
        return None
    x, kernel = given.get("input"), given.get("kernel_size")
    if set(given) - {"input", *names} or given.get("return_indices", False) is not False or not isinstance(x, Node):
        return None
    stride, ceil_mode = given.get("stride"), given.get("ceil_mode", False)
    try:
        windows = Windows(
            kernel=_numbers(kernel, spatial),
            stride=_numbers(kernel if stride is None or stride == [] else stride, spatial),
            padding=_numbers(given.get("padding", 0), spatial),
            dilation=_numbers(given.get("dilation", 1), spatial),
            ceil_mode=ceil_mode,
        )
    except TypeError:  # a number that is computed
        return None
    sound = type(ceil_mode) is bool and all(len(one) == spatial for one in windows[:4])
    return (x, windows) if sound else None


# --- memory


def writes(node: Node, modules: Modules) -> list[Node]:
    """The inputs that a node may write into."""
    inputs = node.all_input_nodes
    first = [one for one in node.args[:1] if isinstance(one, Node)]
    if node.op == "call_module":
        module = modules.get(str(node.target))
        if module is not None and type(module).__module__.startswith("torch.nn.modules"):
            return first if getattr(module, "inplace", False) else []
        return [] if getattr(module, "writes_nothing", False) else inputs  # somebody's own module may do anything
    if getattr(node.target, "writes_nothing", False):
        return []
    if node.op == "call_method":
        name = str(node.target)
        return first if name.endswith("_") and not name.endswith("__") else []
    if node.op != "call_function":
        return []
    name = getattr(node.target, "__name__", "").split(".")[0]
    is_flagged = node.kwargs.get("inplace") or (name in _TAKE_INPLACE and any(one is True for one in node.args))
    if "out" in node.kwargs:
        return inputs
    return first if node.target in _WRITERS or is_flagged or (name.endswith("_") and name[:1] != "_") else []


_TAKE_INPLACE = (
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "hardswish", "hardsigmoid",
    "rrelu", "threshold", "dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d",
)  # fmt: skip


def is_fresh(node: Node, modules: Modules) -> bool:
    """Whether what a node yields lies in memory that no other node's result shares."""
    written = writes(node, modules)
    if node.op == "call_module":
        module = modules.get(str(node.target))
        known = type(module) in _FRESH or getattr(module, "writes_nothing", False)
    else:
        known = node.op == "call_function" and (
            getattr(node.target, "writes_nothing", False)
            or node.target in _FRESH_FUNCTIONS
            or node.target in _FUNCTIONS
        )
    if not known:
        return False
    return all(len(target.users) == 1 and is_fresh(target, modules) for target in written)
