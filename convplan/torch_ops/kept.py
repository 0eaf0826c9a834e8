"""`compile_options`: a model that Inductor compiles keeps its convolutions, and with them convplan's plans.

By itself Inductor may turn a convolution into a matrix product, race it against Triton templates, or, where it writes
C++, call a kernel of torch's that goes past `enable()`. The pass here replaces torch's convolutions and their gradients
by convplan's operators (`library`), which Inductor takes as they are. It runs after autograd's graph is split in a
forward and a backward one, on each.

Convolutions that convplan does not plan for stay torch's. What is replaced decides nothing: plans are found when the
operators run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from convplan._errors import SpecError
from convplan._policy import Policy
from convplan._problem import channels_last_strides
from convplan.torch_ops import adapter, library
from convplan.torch_ops.adapter import DTYPE_NAMES, ConvArgs, conv_args, output_layout, transposed_padding
from convplan.torch_ops.library import flat_padding, policy_text

log = logging.getLogger("convplan.compile")

_aten = torch.ops.aten
_CONVOLUTION = _aten.convolution.default
_BACKWARD = _aten.convolution_backward.default


def compile_options(
    policy: Policy | None = None, *, mode: str | None = None, channels_last: bool | None = None
) -> dict[str, Any]:
    """Options for `torch.compile` with which a compiled model's convolutions run by convplan's plans.

        compiled = torch.compile(model, options=convplan.compile_options())

    They need no `enable()`: the policy goes with the compiled model. Plans are found at the first calls, as ever.

    Args:
        policy: the rules; None: those of `enable()` at the time of each call, else the defaults.
        mode: as torch.compile's, whose own `mode` cannot be given together with options.
        channels_last: whether 2-D and 3-D convolutions run channels-last, with whatever conversion that takes. None:
            Inductor decides, as it does for torch's own; False: in the layouts of the model as written.

    Returns:
        Options for Inductor, the backend that torch.compile takes by default. More can be added to the dictionary.

    Raises:
        PolicyError: the policy names an engine that is not registered.
        SpecError: torch.compile has no such mode.
    """
    options: dict[str, Any] = {}
    if mode is not None:
        from torch._inductor import list_mode_options

        modes = list_mode_options()
        if mode not in modes:
            raise SpecError(f"mode is {mode!r}, expected one of {', '.join(modes)}")
        options.update(modes[mode])
    return {**options, "post_grad_custom_pre_pass": KeepConvolutions(policy_text(policy), channels_last)}


class KeepConvolutions(CustomGraphPass):
    """The pass; two of them with equal settings are equal, and share what Inductor has compiled.

    Args:
        policy: as the operators take it.
        channels_last: as in `compile_options`.
    """

    def __init__(self, policy: str, channels_last: bool | None) -> None:
        self._settings = (policy, channels_last)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeepConvolutions) and other._settings == self._settings

    def __hash__(self) -> int:
        return hash(self._settings)

    def uuid(self) -> object:
        """Tells Inductor's cache apart what was compiled with other settings, or another version of the operators."""
        return (get_hash_for_files((__file__, str(library.__file__), str(adapter.__file__))), *self._settings)

    def __call__(self, graph: Graph) -> None:
        """Replace the convolutions of one graph."""
        policy, channels_last = self._settings
        if channels_last is None:
            channels_last = _inductor_wants_channels_last(graph)
        kept, left = 0, 0
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target not in (_CONVOLUTION, _BACKWARD):
                continue
            call = _Call.of(node, policy, channels_last)
            replace = _replace_forward if node.target is _CONVOLUTION else _replace_backward
            if call is not None and replace(graph, node, call):
                kept += 1
            else:
                left += 1
        if kept or left:
            log.info("kept %d calls of convolutions for convplan's plans, left %d to Inductor", kept, left)


def _inductor_wants_channels_last(graph: Graph) -> bool:
    """Inductor's own decision for this graph, which it could not make any more once the convolutions are replaced."""
    from torch._inductor.graph import GraphLowering

    module = graph.owning_module
    return module is not None and bool(GraphLowering.decide_layout_opt(module, is_inference=not torch.is_grad_enabled()))


class _Call(NamedTuple):
    """What both of torch's operators tell about a convolution."""

    x: Node
    w: Node
    args: ConvArgs
    policy: str
    channels_last: bool

    @classmethod
    def of(cls, node: Node, policy: str, channels_last: bool) -> _Call | None:
        """None: a convolution that is not planned for."""
        given: dict[str, Any] = _by_name(node)
        x, w, bias, grad = given["input"], given["weight"], given.get("bias"), given.get("grad_output")
        tensors = [one for one in (x, w, bias, grad) if one is not None]
        if not _are_planned_for([one.meta.get("val") for one in tensors]):
            return None
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        raw = [given[name] for name in names]
        if not all(isinstance(value, int) for one in raw for value in (one if isinstance(one, Sequence) else (one,))):
            return None  # a symbolic stride or the like
        spatial = w.meta["val"].dim() - 2
        if x.meta["val"].dim() != spatial + 2:
            return None
        try:
            args = conv_args(*raw, spatial)
            if args.transposed:
                transposed_padding(args)
        except SpecError as exc:
            log.debug("left to Inductor: %s", exc)
            return None
        return cls(x, w, args, policy, channels_last and spatial > 1)

    @property
    def ending(self) -> tuple[Any, ...]:
        """The arguments that all of convplan's operators end in."""
        args = self.args
        return (
            list(args.stride), flat_padding(args), list(args.dilation), args.transposed, list(args.output_padding),
            args.groups, self.policy,
        )  # fmt: skip


def _by_name(node: Node) -> dict[str, Any]:
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _are_planned_for(values: Sequence[Any]) -> bool:
    """Whether tensors are of a kind that convplan plans for; rank and sizes are not looked at, except for empty ones."""
    first = values[0]
    return (
        all(isinstance(value, torch.Tensor) and value.layout == torch.strided for value in values)
        and first.device.type in ("cpu", "cuda")
        and first.dtype in DTYPE_NAMES
        and 3 <= first.dim() <= 5
        and all(value.device == first.device and value.dtype == first.dtype for value in values)
        and not any(isinstance(size, int) and size == 0 for value in values for size in value.shape)
    )


def _replace_forward(graph: Graph, node: Node, call: _Call) -> bool:
    bias = _by_name(node)["bias"]
    # As Inductor does for torch's own: added apart, it becomes part of whatever follows.
    apart = bias is not None and bias.meta["val"].device.type != "cpu"
    with graph.inserting_before(node):
        arguments = (call.x, call.w, None if apart else bias, *call.ending)
        new = _insert(graph, node, torch.ops.convplan.convolution.default, arguments, call.channels_last)
        if apart:
            shape = [bias.meta["val"].shape[0], *[1] * len(call.args.stride)]
            column = _insert(graph, node, _aten.reshape.default, (bias, shape))
            new = _insert(graph, node, _aten.add.Tensor, (new, column))
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


def _replace_backward(graph: Graph, node: Node, call: _Call) -> bool:
    """Up to three nodes take the place of one; False, and nothing changed, where its results are not taken apart."""
    dy = _by_name(node)["grad_output"]
    users = list(node.users)
    if any(_result_of(user) is None for user in users):
        return False
    x_val, w_val = call.x.meta["val"], call.w.meta["val"]
    is_last = call.channels_last or output_layout(x_val, w_val, call.args) == "channels_last"
    for user in users:
        place = _result_of(user)
        with graph.inserting_before(user):
            if place == 2:
                over = [0, *range(2, x_val.dim())]
                new = _insert(graph, user, _aten.sum.dim_IntList, (dy, over))
            else:
                target, other, like = (
                    (torch.ops.convplan.input_gradient.default, call.w, call.x)
                    if place == 0
                    else (torch.ops.convplan.weight_gradient.default, call.x, call.w)
                )
                arguments = (dy, other, _sizes(graph, like), is_last, *call.ending)
                new = _insert(graph, user, target, arguments, call.channels_last)
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)
    return True


def _result_of(user: Node) -> int | None:
    """Which of several results a node takes; None where it does something else with them."""
    import operator

    if user.op != "call_function" or user.target is not operator.getitem or user.args[1] not in (0, 1, 2):
        return None
    return int(user.args[1])  # type: ignore[arg-type]


def _sizes(graph: Graph, like: Node) -> list[Any]:
    """Sizes of a tensor as arguments: numbers, or nodes where they are symbolic."""
    found: list[Any] = []
    for dim, size in enumerate(like.meta["val"].shape):
        if isinstance(size, int):
            found.append(size)
            continue
        node = graph.call_function(_aten.sym_size.int, (like, dim))
        node.meta["val"] = size
        found.append(node)
    return found


def _insert(
    graph: Graph, old: Node, target: Callable[..., Any], arguments: tuple[Any, ...], channels_last: bool = False
) -> Node:
    """A node with the history of `old`, and with what it yields worked out on tensors without memory."""
    node = graph.call_function(target, arguments)
    node.meta.update({key: value for key, value in old.meta.items() if key not in ("val", "tensor_meta")})

    def value(argument: Any) -> Any:
        if isinstance(argument, Node):
            return argument.meta["val"]
        return [value(one) for one in argument] if isinstance(argument, list) else argument

    values = [value(argument) for argument in arguments]
    if channels_last:
        values = [_as_channels_last(one) if isinstance(one, torch.Tensor) and one.dim() > 3 else one for one in values]
    node.meta["val"] = target(*values)
    # The strides that Inductor must see to before the operator is called.
    node.meta["eager_input_vals"] = (tuple(values), {})
    return node


def _as_channels_last(value: torch.Tensor) -> torch.Tensor:
    return value.new_empty_strided(value.shape, channels_last_strides(value.shape))
