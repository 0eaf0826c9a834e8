"""Part of `kept`, where it is asked to fuse: kept convolutions take in the sum and the activation that follow them.

What is looked for is what Inductor leaves of them before its own passes: `add`, `relu`, `sigmoid`, `tanh`, and bounds
on both sides. Batch norms and the other activations have become elementwise operations by then, which Inductor fuses
among themselves; `fuse` before compiling takes them in too. What it made, and convplan's functions, take in what
follows as torch's convolutions do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch.fx import Graph, Node

from convplan._problem import normalize_strides
from convplan.torch_ops.fused_library import CallWithEpilogue, call_with_epilogue_of
from convplan.torch_ops.library import call_of

_aten = torch.ops.aten
_KEPT = torch.ops.convplan.convolution.kept
_FUSED = torch.ops.convplan.fused_convolution.kept

_ACTIVATIONS = {
    _aten.relu.default: "relu",
    _aten.sigmoid.default: "sigmoid",
    _aten.tanh.default: "tanh",
}
Insert = Callable[[Graph, Node, Any, tuple[Any, ...]], Node]


def fuse_kept(graph: Graph, insert: Insert) -> int:
    """Fuse what follows kept convolutions, and say how many took something in.

    Args:
        graph: after torch's convolutions were replaced; strides of all nodes are known.
        insert: makes a node with the history of another, and works out what it yields.
    """
    count = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (_KEPT, _FUSED):
            count += _fuse_one(graph, node, insert)
    return count


def _described(node: Node) -> tuple[tuple[Any, ...], CallWithEpilogue]:
    """The tensors of a kept convolution, with residual and scale, and its other arguments."""
    *tensors, text = node.args
    if node.target is _FUSED:
        return tuple(tensors), call_with_epilogue_of(str(text))
    return (*tensors, None, None), CallWithEpilogue(**msgspec.structs.asdict(call_of(str(text))))


def _fuse_one(graph: Graph, node: Node, insert: Insert) -> bool:
    (x, w, bias, residual, scale), call = _described(node)
    if call.activation != "none":
        return False
    last = node
    user = _only_user(last)
    added = _sum(user, last) if user is not None and residual is None else None
    if user is not None and added is not None:
        last, (residual, alpha) = user, added
        call = msgspec.structs.replace(call, alpha=alpha)
        user = _only_user(last)
    activation, parameters, end = _activation(user, last) if user is not None else ("none", (), last)
    if end is node:
        return False
    call = msgspec.structs.replace(call, activation=activation, parameters=parameters)
    with graph.inserting_before(end):
        new = insert(graph, end, _FUSED, (x, w, bias, residual, scale, call.text))
    if new.meta["val"].stride() != end.meta["val"].stride():
        graph.erase_node(new)
        return False
    end.replace_all_uses_with(new)
    while end is not node:
        before = end
        end = next(one for one in end.all_input_nodes if one is not residual)
        graph.erase_node(before)
    graph.erase_node(node)
    return True


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _sum(node: Node, result: Node) -> tuple[Node, float] | None:
    """What a node adds to a result, where it has the result's shape, dtype and layout, and times what."""
    if node.op != "call_function" or node.target is not _aten.add.Tensor or len(node.args) != 2:
        return None
    first, second = node.args
    alpha = node.kwargs.get("alpha", 1)
    other = second if first is result else first
    if not isinstance(other, Node) or other is result or not isinstance(alpha, (int, float)):
        return None
    if not math.isfinite(alpha) or (alpha != 1 and first is not result):
        return None
    value, own = other.meta.get("val"), result.meta["val"]
    if not isinstance(value, torch.Tensor) or (value.dtype, value.device) != (own.dtype, own.device):
        return None
    sizes = (*value.shape, *own.shape)
    if not all(isinstance(size, int) for size in sizes) or value.shape != own.shape:
        return None  # symbolic sizes may be 1, and broadcast
    same = normalize_strides(own.shape, value.stride()) == normalize_strides(own.shape, own.stride())
    return (other, float(alpha)) if same else None


def _activation(node: Node, last: Node) -> tuple[str, tuple[float, ...], Node]:
    """The activation that begins with a node, its parameters, and the node that it ends with."""
    none = ("none", (), last)
    if node.op != "call_function" or not node.args or node.args[0] is not last or node.kwargs:
        return none
    if node.target in _ACTIVATIONS:
        return _ACTIVATIONS[node.target], (), node
    if node.target in (_aten.clamp.default, _aten.hardtanh.default) and len(node.args) == 3:
        return _bounded(node.args[1], node.args[2], node) or none
    if node.target is _aten.clamp_min.default:
        after = _only_user(node)
        if after is not None and after.target is _aten.clamp_max.default and after.args[0] is node:
            return _bounded(node.args[1], after.args[1], after) or none
    return none


def _bounded(low: Any, high: Any, end: Node) -> tuple[str, tuple[float, ...], Node] | None:
    if not all(isinstance(one, (int, float)) and math.isfinite(one) for one in (low, high)) or low > high:
        return None
    return "clamp", (float(low), float(high)), end
