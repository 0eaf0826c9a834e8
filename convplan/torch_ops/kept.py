"""`compile_options`: a model that Inductor compiles keeps its convolutions, and with them convplan's plans.

By itself Inductor may turn a convolution into a matrix product, race it against Triton templates, or, where it writes
C++, call a kernel of torch's that goes past `enable()`. The pass here replaces torch's convolutions and their gradients
by convplan's operators (`library`), which Inductor takes as they are. It runs after autograd's graph is split in a
forward and a backward one, on each.

Convolutions that convplan does not plan for stay torch's, and calls of convplan's functions take their short form
(`kept_own`). What is replaced decides nothing: plans are found when the operators run. Of these, generated code calls
the kernels (`kept_calls`).
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._inductor import custom_graph_pass
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from convplan._errors import SpecError
from convplan._policy import Policy
from convplan._problem import channels_last_strides
from convplan.torch_ops import library
from convplan.torch_ops.adapter import (
    DTYPE_NAMES,
    ConvArgs,
    conv_args,
    output_layout,
    suggests_channels_last,
    transposed_padding,
)
from convplan.torch_ops.kept_calls import call_kernels
from convplan.torch_ops.kept_own import OWN, shorten
from convplan.torch_ops.library import policy_text

log = logging.getLogger("convplan.compile")

Tensor = torch.Tensor

_aten = torch.ops.aten
_CONVOLUTION = _aten.convolution.default
_BACKWARD = _aten.convolution_backward.default
_READ_STRIDES = (
    _aten.as_strided.default,
    _aten.as_strided_.default,
    _aten.as_strided_scatter.default,
    _aten.as_strided_copy.default,
)


def compile_options(
    policy: Policy | None = None,
    *,
    mode: str | None = None,
    channels_last: bool | None = None,
    fuse: bool = False,
) -> dict[str, Any]:
    """Options for `torch.compile` with which a compiled model's convolutions run by convplan's plans.

        compiled = torch.compile(model, options=convplan.compile_options())

    They need no `enable()`: the policy goes with the compiled model. Plans are found at the first calls, as ever.

    Args:
        policy: the rules; None: those of `enable()` at the time of each call, else the defaults.
        mode: as torch.compile's, whose own `mode` cannot be given together with options.
        channels_last: whether 2-D and 3-D convolutions run channels-last, with whatever conversion that takes. None:
            Inductor decides, as it does for torch's own; False: in the layouts of the model as written.
        fuse: whether convolutions take in a sum and a ReLU, sigmoid, tanh or bounds that follow, as one plan. What
            else follows, batch norms too, Inductor computes; `convplan.fuse` before compiling takes that in.

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
    return {**options, "post_grad_custom_pre_pass": KeepConvolutions(policy_text(policy), channels_last, fuse)}


# Modules that decide what a compiled graph looks like, or what strides come out.
_SHAPING = ("kept", "kept_own", "kept_fused", "kept_calls", "library", "fused_library", "adapter")

# Told whether a graph is for inference, where torch has such passes; they came after 2.11.
_Pass: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", custom_graph_pass.CustomGraphPass)


class KeepConvolutions(_Pass):  # type: ignore[misc]
    """The pass; two of them with equal settings are equal, and share what Inductor has compiled.

    Args:
        policy: as the operators take it.
        channels_last, fuse: as in `compile_options`.
    """

    def __init__(self, policy: str, channels_last: bool | None, fuse: bool = False) -> None:
        self._settings = (policy, channels_last, fuse)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeepConvolutions) and other._settings == self._settings

    def __hash__(self) -> int:
        return hash(self._settings)

    def uuid(self) -> object:
        """Tells Inductor's cache apart what was compiled with other settings, or another version of the operators."""
        return (
            custom_graph_pass.get_hash_for_files(
                tuple(str(Path(__file__).with_name(f"{name}.py")) for name in _SHAPING)
            ),
            *self._settings,
        )

    def __call__(self, graph: Graph, is_inference: bool | None = None) -> None:
        """Replace the convolutions of one graph."""
        call_kernels()
        policy, wanted, fuse = self._settings
        layouts = _Layouts(graph, wanted, is_inference)
        kept, left, own = 0, 0, 0
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in OWN:
                new = shorten(graph, node, _insert)
                if new is None:
                    layouts.follow(node)
                else:
                    own += 1
                    layouts.replaced(node, new)
                continue
            if node.op != "call_function" or node.target not in (_CONVOLUTION, _BACKWARD):
                layouts.follow(node)
                continue
            call = _Call.of(node, policy)
            if call is None:
                done = False
            elif node.target is _CONVOLUTION:
                done = _replace_forward(graph, node, call, layouts, whole=fuse)
            else:
                done = _replace_backward(graph, node, call, layouts)
            if done:
                kept += 1
            else:
                left += 1
        if kept or left:
            log.info("kept %d calls of convolutions for convplan's plans, left %d to Inductor", kept, left)
        if own:
            log.info("found %d calls of convplan's functions", own)
        if fuse and (kept or own):
            from convplan.torch_ops.kept_fused import fuse_kept

            log.info("fused %d of them with what follows", fuse_kept(graph, _insert))


class _Layouts:
    """Which convolutions run channels-last, and what that makes of the strides of everything behind them.

    Args:
        graph: as it was before anything was replaced.
        wanted: as in `compile_options`.
        is_inference: whether no gradients will be asked for; None: torch has not said.
    """

    def __init__(self, graph: Graph, wanted: bool | None, is_inference: bool | None) -> None:
        self._graph, self._wanted = graph, wanted
        self._moved: set[Node] = set()
        if any(node.target in _READ_STRIDES for node in graph.nodes):
            self._wanted = False  # what these yield depends on the strides of what they read
        self._by_default = self._wanted is None and _inductor_wants_channels_last(graph, is_inference)

    def is_channels_last(self, call: _Call) -> bool:
        """Whether a convolution is to run channels-last, which is known where its tensors come that way."""
        if self._wanted is None and self._by_default and len(call.args.stride) == 2:
            return True
        return bool(self._wanted) and len(call.args.stride) > 1

    def converts(self, call: _Call) -> bool:
        """Whether a gradient's inputs may be converted to the layout of its result."""
        return self._wanted is not False and len(call.args.stride) > 1

    def channels_last(self, node: Node, *, exactly: bool) -> Node:
        """A node that yields a tensor channels-last; the node itself where it does.

        Args:
            node: yields a tensor of 4 or 5 dimensions.
            exactly: with the strides of size-1 dimensions too. They tell a layout from another where nothing else does.
        """
        value: Tensor = node.meta["val"]
        if value.stride() == channels_last_strides(value.shape) or (not exactly and _is_channels_last(value)):
            return node
        form = torch.channels_last if value.dim() == 4 else torch.channels_last_3d
        return _insert(self._graph, node, _aten.clone.default, (node,), {"memory_format": form})

    def replaced(self, old: Node, new: Node) -> None:
        """Take note of a node that took another's place."""
        if new.meta["val"].stride() != old.meta["val"].stride():
            self._moved.add(new)

    def follow(self, node: Node) -> None:
        """Work out anew what a node yields if strides of what it reads have changed."""
        if not self._moved or not isinstance(node.target, torch._ops.OpOverload):
            return
        before = node.meta.get("val")
        if not isinstance(before, torch.Tensor) or self._moved.isdisjoint(node.all_input_nodes):
            return
        try:
            value = node.target(*map_arg(node.args, _value), **map_arg(node.kwargs, _value))
        except RuntimeError as exc:  # it does not take such strides as it stands, and Inductor sees to that
            log.debug("strides are not followed through %s: %s", node, exc)
            return
        if value.stride() != before.stride():
            node.meta["val"] = value
            self._moved.add(node)


def _inductor_wants_channels_last(graph: Graph, is_inference: bool | None) -> bool:
    """Inductor's own decision for this graph, which it could not make any more once the convolutions are replaced."""
    from torch._inductor.graph import GraphLowering

    if graph.owning_module is None:
        return False
    if is_inference is None:
        traced = getattr(torch._guards.TracingContext.try_get(), "fw_metadata", None)
        is_inference = not getattr(traced, "is_train", True)
    return bool(GraphLowering.decide_layout_opt(graph.owning_module, is_inference=is_inference))


class _Call(NamedTuple):
    """What both of torch's operators tell about a convolution."""

    x: Node
    w: Node
    args: ConvArgs
    policy: str

    @classmethod
    def of(cls, node: Node, policy: str) -> _Call | None:
        """None: a convolution that is not planned for."""
        given = _by_name(node)
        x, w = given["input"], given["weight"]
        tensors = [one for one in (x, w, given.get("bias"), given.get("grad_output")) if one is not None]
        if not _are_planned_for([one.meta.get("val") for one in tensors]):
            return None
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        raw: dict[str, Any] = {name: given[name] for name in names}
        numbers = [one for value in raw.values() for one in (value if isinstance(value, Sequence) else (value,))]
        if not all(isinstance(number, int) for number in numbers):
            return None  # a symbolic stride or the like
        spatial = w.meta["val"].dim() - 2
        if x.meta["val"].dim() != spatial + 2:
            return None
        try:
            args = conv_args(**raw, spatial=spatial)
            if args.transposed:
                transposed_padding(args)
        except SpecError as exc:
            log.debug("left to Inductor: %s", exc)
            return None
        return cls(x, w, args, policy)

    def text(self, channels_last: bool = False) -> str:
        """The arguments as convplan's operators take them; `channels_last` of a gradient that is asked for."""
        return library.Call.of(self.args, self.policy, channels_last).text


def _by_name(node: Node) -> dict[str, Any]:
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _are_planned_for(values: Sequence[Any]) -> bool:
    """Whether tensors are of a kind that convplan plans for; of their sizes, only that none is known to be 0."""
    first = values[0]
    return (
        all(isinstance(value, torch.Tensor) and value.layout == torch.strided for value in values)
        and first.device.type in ("cpu", "cuda")
        and first.dtype in DTYPE_NAMES
        and 3 <= first.dim() <= 5
        and all(value.device == first.device and value.dtype == first.dtype for value in values)
        and not any(isinstance(size, int) and size == 0 for value in values for size in value.shape)
    )


def _replace_forward(graph: Graph, node: Node, call: _Call, layouts: _Layouts, *, whole: bool) -> bool:
    bias = _by_name(node)["bias"]
    # As Inductor does for torch's own: added apart, it becomes part of whatever follows.
    apart = bias is not None and bias.meta["val"].device.type != "cpu" and not whole
    x, w = call.x, call.w
    with graph.inserting_before(node):
        if layouts.is_channels_last(call):
            x, w = layouts.channels_last(x, exactly=True), layouts.channels_last(w, exactly=False)
        arguments = (x, w, None if apart else bias, call.text())
        new = _insert(graph, node, torch.ops.convplan.convolution.kept, arguments)
        if apart:
            shape = [bias.meta["val"].shape[0], *[1] * len(call.args.stride)]
            column = _insert(graph, node, _aten.reshape.default, (bias, shape))
            new = _insert(graph, node, _aten.add.Tensor, (new, column))
    layouts.replaced(node, new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


def _replace_backward(graph: Graph, node: Node, call: _Call, layouts: _Layouts) -> bool:
    """Up to three nodes take the place of one; False, and nothing changed, where its results are not taken apart."""
    users = list(node.users)
    if any(_place(user) is None for user in users):
        return False
    operands = {"dy": _by_name(node)["grad_output"], "x": call.x, "w": call.w}
    x_value, dy_value = call.x.meta["val"], operands["dy"].meta["val"]
    is_last = (
        layouts.is_channels_last(call)
        or output_layout(x_value, call.w.meta["val"], call.args) == "channels_last"
        # Channels-last because the forward was made to be, while what was saved for here is as it came.
        or (layouts.converts(call) and suggests_channels_last(dy_value))
    )

    def operand(name: str) -> Node:
        node: Node = operands[name]
        if is_last and layouts.converts(call):
            node = operands[name] = layouts.channels_last(node, exactly=name == "dy")
        return node

    for user in users:
        with graph.inserting_before(node):
            if _place(user) == 2:
                arguments: tuple[Any, ...] = (operands["dy"], [0, *range(2, x_value.dim())])
                new = _insert(graph, user, _aten.sum.dim_IntList, arguments)
            elif _place(user) == 0:
                arguments = (operand("dy"), operand("w"), _sizes(graph, call.x), call.text(is_last))
                new = _insert(graph, user, torch.ops.convplan.input_gradient.kept, arguments)
            else:
                # Where both mean the same memory, the strides are to be those that the weight's size-1 dimensions have.
                either = _value(call.w).is_contiguous() and _is_channels_last(_value(call.w))
                arguments = (operand("dy"), operand("x"), _sizes(graph, call.w), call.text(is_last and not either))
                new = _insert(graph, user, torch.ops.convplan.weight_gradient.kept, arguments)
        layouts.replaced(user, new)
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)
    return True


def _place(user: Node) -> int | None:
    """Which of several results a node takes; None where it does something else with them."""
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


def _value(node: Node) -> Any:
    return node.meta["val"]


def _is_channels_last(value: Tensor) -> bool:
    """Whether its elements lie channels-last, whatever strides its size-1 dimensions have."""
    forms = {4: torch.channels_last, 5: torch.channels_last_3d}
    return value.dim() in forms and value.is_contiguous(memory_format=forms[value.dim()])


def _insert(
    graph: Graph,
    old: Node,
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: dict[str, Any] | None = None,
) -> Node:
    """A node with the history of `old`, and with what it yields worked out on tensors without memory."""
    named = named or {}
    node = graph.call_function(target, arguments, named)
    node.meta.update({key: value for key, value in old.meta.items() if key not in ("val", "tensor_meta")})
    values = map_arg(arguments, _value)
    node.meta["val"] = target(*values, **named)
    # The strides that Inductor must see to before an operator of convplan's is called.
    node.meta["eager_input_vals"] = (values, {})
    return node
