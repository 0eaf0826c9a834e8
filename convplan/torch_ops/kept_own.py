"""Part of `kept`: convplan's own operators in a compiled graph, called in their short form.

They are there where a program calls convplan's functions, or was made by `fuse`. By the time the pass runs autograd has
done its work, so that the overloads `kept` can stand for them, whose arguments cost the dispatcher less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch.fx import Graph, Node

from convplan.torch_ops.fused_library import CallWithEpilogue
from convplan.torch_ops.library import Call

_ops: Any = torch.ops.convplan
_CONVOLUTION = _ops.convolution.default
_GRADIENTS = {
    _ops.input_gradient.default: _ops.input_gradient.kept,
    _ops.weight_gradient.default: _ops.weight_gradient.kept,
}
_FUSED = _ops.fused_convolution.default
OWN = (_CONVOLUTION, _FUSED, *_GRADIENTS)

Insert = Callable[[Graph, Node, Any, tuple[Any, ...]], Node]


def shorten(graph: Graph, node: Node, insert: Insert) -> Node | None:
    """Put the short form in the place of one call; None, and nothing changed, where a number in it is a symbol.

    Args:
        graph: with strides of all nodes known.
        node: a call of one of `OWN`.
        insert: makes a node with the history of another, and works out what it yields.
    """
    given: list[Any] = [*node.args]
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given += [node.kwargs[name] for name in names[len(given) :]]
    call = _call(given[-7:])
    if call is None:
        return None
    target, operands = _ops.convolution.kept, tuple(given[:3])
    if node.target in _GRADIENTS:
        target, channels_last = _GRADIENTS[node.target], given[3]
        call = msgspec.structs.replace(call, channels_last=channels_last)
    elif node.target is _FUSED:
        alpha, activation, parameters = given[5:8]
        target, operands = _ops.fused_convolution.kept, tuple(given[:5])
        call = CallWithEpilogue(
            **msgspec.structs.asdict(call), alpha=alpha, activation=activation, parameters=tuple(parameters)
        )
    with graph.inserting_before(node):
        new = insert(graph, node, target, (*operands, call.text))
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _call(geometry: list[Any]) -> Call | None:
    stride, padding, dilation, transposed, output_padding, groups, policy = geometry
    numbers = (*stride, *padding, *dilation, *output_padding, groups)
    if not all(isinstance(number, int) for number in numbers):
        return None
    return Call(
        stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation), transposed=transposed,
        output_padding=tuple(output_padding), groups=groups, policy=policy,
    )  # fmt: skip
