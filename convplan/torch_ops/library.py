"""Convolutions as operators of torch's own kind, for whatever traces programs: `torch.compile` and `torch.export`.

    convplan::convolution      (x, w, bias, …)              -> y
    convplan::input_gradient   (dy, w, size, channels_last, …) -> dx
    convplan::weight_gradient  (dy, x, size, channels_last, …) -> dw

All three end in the same arguments: stride, padding (before and after for each spatial dimension, one after the other),
dilation, transposed, output_padding, groups, policy. `size` and `channels_last` say what the result looks like.
`policy` is a policy as JSON (`written`), or empty for the one that holds while the operator runs. Each is linear in
both tensors, and its gradients are the other two.

Each has an overload `kept`, which takes those arguments as one text (`Call`) and has no gradient: it stands in compiled
models, where autograd has done its work. Handing eight arguments through the dispatcher costs as much as all that
convplan does on a hit.

An operator's shapes and strides come from `adapter`, for tensors with and without memory alike, so that what a compiler
was told beforehand is what it gets. Eager calls of convplan's functions do not come here: `functional` is quicker.
What they are to a compiler is in `traced`, and what replaces torch's convolutions in a compiled model in `kept`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import msgspec
import torch

from convplan._choices import state
from convplan._epilogue import Epilogue
from convplan._errors import PolicyError, SpecError
from convplan._policy import Policy
from convplan._problem import Problem, TensorSpec, channels_last_strides, contiguous_strides, output_spatial
from convplan._runtime import check_policy, local
from convplan.torch_ops.adapter import (
    ALIGNMENT_BYTES,
    DTYPE_NAMES,
    ConvArgs,
    NotExpressible,
    check_same_place,
    forward_problem,
    output_layout,
    output_strides,
    spec_of,
    transposed_padding,
    transposed_spatial,
)
from convplan.torch_ops.linear import Caller
from convplan.torch_ops.override import NO_GRADIENTS
from convplan.torch_ops.seen import live_flags
from convplan.torch_ops.undisturbed import undisturbed

Tensor = torch.Tensor
Ints = Sequence[int]
Geometry = tuple[Ints, Ints, Ints, bool, Ints, int, str]
"""The arguments that all three operators end in."""

_DEFAULTS = Policy()
_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_any_autocast = torch._C._is_any_autocast_enabled

ENDING = (
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups, "
    "str policy"
)
# Strides of the inputs are part of a problem, so a compiler must keep those that it was traced with.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_SCHEMAS = (
    f"convolution(Tensor x, Tensor w, Tensor? bias, {ENDING}) -> Tensor",
    f"input_gradient(Tensor dy, Tensor w, SymInt[] size, bool channels_last, {ENDING}) -> Tensor",
    f"weight_gradient(Tensor dy, Tensor x, SymInt[] size, bool channels_last, {ENDING}) -> Tensor",
    "convolution.kept(Tensor x, Tensor w, Tensor? bias, str call) -> Tensor",
    "input_gradient.kept(Tensor dy, Tensor w, SymInt[] size, str call) -> Tensor",
    "weight_gradient.kept(Tensor dy, Tensor x, SymInt[] size, str call) -> Tensor",
)


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The arguments of an operator beside its tensors, as the overloads `kept` take them: as JSON.

    Args:
        stride, padding, dilation, transposed, output_padding, groups, policy: as the operators take them.
        channels_last: of a gradient, whether the result is.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool = False
    groups: int = 1
    policy: str = ""
    channels_last: bool = False

    @classmethod
    def of(cls, args: ConvArgs, policy: str, channels_last: bool = False) -> Call:
        """The same arguments in this form."""
        return cls(
            stride=args.stride, padding=tuple(flat_padding(args)), dilation=args.dilation, transposed=args.transposed,
            output_padding=args.output_padding, groups=args.groups, policy=policy, channels_last=channels_last,
        )  # fmt: skip

    @property
    def text(self) -> str:
        """What the overloads take."""
        return written(msgspec.json.encode(self))

    @property
    def geometry(self) -> Geometry:
        """What the other overloads end in."""
        return (
            self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups, self.policy,
        )  # fmt: skip


AnyCall = TypeVar("AnyCall", bound=Call)


def written(json: bytes) -> str:
    """JSON as operators are given it: its quotation marks and backslashes as in web addresses; plain JSON is read too.

    Where Inductor writes C++, it puts a text between quotation marks as it stands.
    """
    return quote(json, safe="{}[]:,")


@functools.lru_cache(maxsize=4096)
def call_of(text: str) -> Call:
    """The arguments in a text, which may come from a file.

    Raises:
        SpecError: it holds none.
    """
    return decoded(text, Call)


def decoded(text: str, kind: type[AnyCall]) -> AnyCall:
    """The arguments of one kind of operator in a text. Raises as `call_of`."""
    try:
        return msgspec.json.decode(unquote(text), type=kind)
    except msgspec.MsgspecError as exc:
        raise SpecError(f"call is {text[:200]!r}, expected an operator's arguments as JSON: {exc}") from exc


def policy_text(policy: Policy | None) -> str:
    """A policy as the operators take it; empty for None.

    Raises:
        PolicyError: it is no policy, or names an engine that is not registered.
    """
    if policy is None:
        return ""
    fields = msgspec.structs.asdict(check_policy(policy))
    return written(msgspec.json.encode({k: v for k, v in fields.items() if v != getattr(_DEFAULTS, k)}))


@functools.lru_cache(maxsize=256)
def policy_of(text: str) -> Policy | None:
    """The policy that an operator was given; the text may come from a file.

    Raises:
        PolicyError: it is none.
    """
    if not text:
        return None
    try:
        return msgspec.json.decode(unquote(text), type=Policy)
    except msgspec.MsgspecError as exc:
        raise PolicyError(f"policy is {text[:200]!r}, expected a policy as JSON, or an empty text: {exc}") from exc


def flat_padding(args: ConvArgs) -> list[int]:
    """Padding as the operators take it."""
    return [side for pair in args.padding for side in pair]


def args_of(geometry: Geometry) -> ConvArgs:
    """The arguments that all operators end in, but the policy.

    Raises:
        SpecError: as many paddings as dimensions, instead of twice as many.
    """
    stride, padding, dilation, transposed, output_padding, groups, _ = geometry
    if len(padding) != 2 * len(stride):
        raise SpecError(f"padding is {list(padding)}, expected {2 * len(stride)} entries: before and after, in turns")
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return ConvArgs(tuple(stride), pairs, tuple(dilation), transposed, tuple(output_padding), groups)


# --- what comes out


def result_dims(x: Tensor, w: Tensor, args: ConvArgs) -> tuple[int, ...]:
    """Sizes of a convolution's output; they may be symbolic.

    Raises:
        SpecError: tensors that do not fit together.
    """
    if x.dim() != w.dim():
        raise SpecError(f"input {tuple(x.shape)} and weight {tuple(w.shape)} differ in rank, expected the same")
    if x.dtype != w.dtype or x.dtype not in DTYPE_NAMES:
        expected = f"the same, one of {', '.join(DTYPE_NAMES.values())}"
        raise SpecError(f"input is {x.dtype} and weight {w.dtype}, expected {expected}")
    channels, wanted = x.shape[1], w.shape[0] if args.transposed else w.shape[1] * args.groups
    if channels != wanted:
        name = "weight.shape[0]" if args.transposed else "weight.shape[1] * groups"
        raise SpecError(
            f"input has {channels} channels, expected {name} = {wanted} (input {tuple(x.shape)}, weight "
            f"{tuple(w.shape)}, groups={args.groups})"
        )
    if args.transposed:
        return (x.shape[0], w.shape[1] * args.groups, *transposed_spatial(x.shape[2:], w.shape[2:], args))
    sizes = output_spatial(x.shape[2:], w.shape[2:], args.padding, args.stride, args.dilation)
    return (x.shape[0], w.shape[0], *sizes)


def _strides(size: Ints, channels_last: bool) -> tuple[int, ...]:
    return channels_last_strides(size) if channels_last else contiguous_strides(size)


def _fake_convolution(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    args = args_of(geometry)
    dims = result_dims(x, w, args)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != dims[1]):
        raise SpecError(f"bias.shape is {tuple(bias.shape)}, expected ({dims[1]},), one number for each output channel")
    return x.new_empty_strided(dims, output_strides(dims, x, w, args))


def _fake_gradient(dy: Tensor, other: Tensor, size: Ints, channels_last: bool, *geometry: Any) -> Tensor:
    return dy.new_empty_strided(tuple(size), _strides(size, channels_last))


def _fake_kept_convolution(x: Tensor, w: Tensor, bias: Tensor | None, call: str) -> Tensor:
    return _fake_convolution(x, w, bias, *call_of(call).geometry)


def _fake_kept_gradient(dy: Tensor, other: Tensor, size: Ints, call: str) -> Tensor:
    return _fake_gradient(dy, other, size, call_of(call).channels_last)


# --- what runs

Run = Callable[..., Tensor]


def _convolution(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """The kernel of `convplan::convolution`."""
    return _found("convolution", x, w, bias, (), geometry)(x, w, bias)


def _input_gradient(dy: Tensor, w: Tensor, size: Ints, channels_last: bool, *geometry: Any) -> Tensor:
    """The kernel of `convplan::input_gradient`."""
    return _found("input_gradient", dy, w, None, (*size, channels_last), geometry)(dy, w, None)


def _weight_gradient(dy: Tensor, x: Tensor, size: Ints, channels_last: bool, *geometry: Any) -> Tensor:
    """The kernel of `convplan::weight_gradient`."""
    return _found("weight_gradient", dy, x, None, (*size, channels_last), geometry)(dy, x, None)


def _found(
    name: str, first: Tensor, second: Tensor, bias: Tensor | None, result: tuple[int, ...], geometry: Any
) -> Run:
    """What runs a call: a key of the arguments and a look-up, or else worked out now."""
    stride, padding, dilation, transposed, output_padding, groups, policy = geometry
    token, device = state.token, first.get_device()
    key = (
        name, token, first.shape, first.stride(), first.dtype, second.shape, second.stride(), second.dtype,
        None if bias is None else (bias.shape, bias.dtype), result,
        (*stride, *padding, *dilation, transposed, *output_padding, groups), policy, device,
        ALIGNMENT_BYTES[first.data_ptr() & 31], ALIGNMENT_BYTES[second.data_ptr() & 31],
        live_flags(device, first.dtype),
    )  # fmt: skip
    caller = local.callers.used(key)
    if caller is None:
        caller = _NEW[name](first, second, bias, result, geometry)
        local.remember(key, token, caller, device)
    return caller


def watched() -> bool:
    """Whether a mode of torch's wants to hear of operators: a default device is one.

    What comes by the dispatcher has been past it. Compiled code that calls a kernel by itself has not, and then goes by
    the operator, so that the mode hears of that and of nothing inside.
    """
    return _function_modes() > 0 or _dispatch_modes() > 0


def kept_convolution(x: Tensor, w: Tensor, bias: Tensor | None, call: str) -> Tensor:
    """The kernel of `convplan::convolution.kept`."""
    if watched():
        return _ops.convolution.kept(x, w, bias, call)  # type: ignore[no-any-return]
    return _found_kept("convolution", x, w, bias, (), call)(x, w, bias)


def kept_input_gradient(dy: Tensor, w: Tensor, size: Ints, call: str) -> Tensor:
    """The kernel of `convplan::input_gradient.kept`."""
    if watched():
        return _ops.input_gradient.kept(dy, w, size, call)  # type: ignore[no-any-return]
    return _found_kept("input_gradient", dy, w, None, tuple(size), call)(dy, w, None)


def kept_weight_gradient(dy: Tensor, x: Tensor, size: Ints, call: str) -> Tensor:
    """The kernel of `convplan::weight_gradient.kept`."""
    if watched():
        return _ops.weight_gradient.kept(dy, x, size, call)  # type: ignore[no-any-return]
    return _found_kept("weight_gradient", dy, x, None, tuple(size), call)(dy, x, None)


def _found_kept(name: str, first: Tensor, second: Tensor, bias: Tensor | None, size: tuple[int, ...], call: str) -> Run:
    """As `_found`, with a shorter key."""
    token, device = state.token, first.get_device()
    key = (
        name, call, token, first.shape, first.stride(), first.dtype, second.shape, second.stride(), second.dtype,
        None if bias is None else (bias.shape, bias.dtype), size, device,
        ALIGNMENT_BYTES[first.data_ptr() & 31], ALIGNMENT_BYTES[second.data_ptr() & 31],
        live_flags(device, first.dtype),
    )  # fmt: skip
    caller = local.callers.used(key)
    if caller is None:
        given = call_of(call)
        result = (*size, given.channels_last) if size else ()
        caller = _NEW[name](first, second, bias, result, given.geometry)
        local.remember(key, token, caller, device)
    return caller


def new_convolution(x: Tensor, w: Tensor, bias: Tensor | None, result: tuple[int, ...], geometry: Geometry) -> Run:
    """What a forward call with these arguments runs from now on."""
    args = args_of(geometry)
    try:
        problem = forward_problem(x, w, bias, args)
    except NotExpressible:
        pads = [before for before, _ in args.padding]  # the same on both sides: `args_of` of a call to torch
        rest = (list(args.stride), pads, list(args.dilation), True, list(args.output_padding), args.groups)
        return without_autocast(lambda x, w, bias: torch.convolution(x, w, bias, *rest), x.device.type)
    strides = output_strides(problem.output.dims, x, w, args)
    gradients = (x.requires_grad, w.requires_grad)
    return _planned(problem, strides, w, geometry[-1], gradients if torch.is_grad_enabled() else NO_GRADIENTS)


def _new_input_gradient(dy: Tensor, w: Tensor, bias: Tensor | None, result: tuple[int, ...], geometry: Geometry) -> Run:
    check_same_place(dy, w)
    args, size, strides = args_of(geometry), result[:-1], _strides(result[:-1], bool(result[-1]))
    dx = TensorSpec(size, strides, spec_of(dy).dtype)
    try:
        padding = transposed_padding(args) if args.transposed else args.padding
    except NotExpressible:
        return _through_torch(0, dy.new_empty_strided(size, strides), args)
    if args.transposed:
        problem = _problem("fprop", spec_of(dy), spec_of(w), dx, padding, args, dy.device)
    else:
        problem = _problem("dgrad", dx, spec_of(w), spec_of(dy), padding, args, dy.device)
    return _planned(problem, strides, w, geometry[-1])


def _new_weight_gradient(
    dy: Tensor, x: Tensor, bias: Tensor | None, result: tuple[int, ...], geometry: Geometry
) -> Run:
    check_same_place(dy, x)
    args, size, strides = args_of(geometry), result[:-1], _strides(result[:-1], bool(result[-1]))
    dw = TensorSpec(size, strides, spec_of(dy).dtype)
    try:
        padding = transposed_padding(args) if args.transposed else args.padding
    except NotExpressible:
        return _through_torch(1, dy.new_empty_strided(size, strides), args)
    if not args.transposed:
        run = _planned(
            _problem("wgrad", spec_of(x), dw, spec_of(dy), padding, args, dy.device), strides, x, geometry[-1]
        )
        return lambda dy, x, bias: run(x, dy, None)
    problem = _problem("wgrad", spec_of(dy), dw, spec_of(x), padding, args, dy.device)
    return _planned(problem, strides, x, geometry[-1])


_NEW = {
    "convolution": new_convolution,
    "input_gradient": _new_input_gradient,
    "weight_gradient": _new_weight_gradient,
}


def _problem(
    op: Any,
    x: TensorSpec,
    w: TensorSpec,
    y: TensorSpec,
    padding: tuple[tuple[int, int], ...],
    args: ConvArgs,
    device: torch.device,
) -> Problem:
    return Problem(
        op=op, x=x, w=w, y=y, padding=padding, stride=args.stride, dilation=args.dilation, groups=args.groups,
        epilogue=Epilogue(), device=device.type,
    )  # fmt: skip


def _planned(
    problem: Problem,
    strides: tuple[int, ...],
    second: Tensor,
    policy: str,
    gradients: tuple[bool, bool] = NO_GRADIENTS,
) -> Run:
    caller = Caller.of(problem, policy_of(policy), second.get_device(), second, gradients)

    def run(first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
        result = caller(first, second, bias, None)
        # Strides of size-1 dimensions are open to a plan, and a compiler has been told them.
        return result if result.stride() == strides else result.as_strided(result.shape, strides)

    return without_autocast(run, second.device.type)


def _through_torch(place: int, like: Tensor, args: ConvArgs) -> Run:
    """Stock torch's gradient of the input (`place` 0) or of the weight (1), for what a `Problem` cannot express."""
    pads = [before for before, _ in args.padding]
    rest = (list(args.stride), pads, list(args.dilation), args.transposed, list(args.output_padding), args.groups)
    mask = [place == 0, place == 1, False]
    size, strides = like.shape, like.stride()

    def run(dy: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
        like = dy.new_empty_strided(size, strides)
        x, w = (like, other) if place == 0 else (other, like)
        result: Tensor = torch.ops.aten.convolution_backward(dy, x, w, None, *rest, mask)[place]
        return result.contiguous() if result.stride() == strides else like.copy_(result)

    return without_autocast(run, like.device.type)


def without_autocast(run: Run, device: str) -> Run:
    """Casting is done by now, and what engines compute in is theirs to say."""

    def run_plainly(*tensors: Tensor | None) -> Tensor:
        if not _any_autocast():
            return run(*tensors)
        with torch.autocast(device, enabled=False):
            return run(*tensors)

    run_plainly.bare = bare_of(run)  # type: ignore[attr-defined]
    return run_plainly


def bare_of(run: Run) -> Run:
    """What a caller comes to where autocast is off and `out` is None: the same result by fewer frames."""
    bare: Run = getattr(run, "bare", run)
    return bare


# --- gradients


def _setup_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, bias, *geometry = inputs
    ctx.save_for_backward(x, w)
    ctx.geometry, ctx.has_bias, ctx.sizes = tuple(geometry), bias is not None, (x.shape, w.shape)
    ctx.channels_last = output_layout(x, w, args_of(ctx.geometry)) == "channels_last"


def _convolution_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, w = ctx.saved_tensors
    needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
    x_size, w_size = ctx.sizes
    dx = _ops.input_gradient(dy, w, x_size, ctx.channels_last, *ctx.geometry) if needs_x else None
    dw = _ops.weight_gradient(dy, x, w_size, ctx.channels_last, *ctx.geometry) if needs_w else None
    db = dy.sum([0, *range(2, dy.dim())]) if ctx.has_bias and needs_bias else None
    return (dx, dw, db, *[None] * len(ctx.geometry))


def _setup_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, other, _, channels_last, *geometry = inputs
    ctx.save_for_backward(dy, other)
    ctx.geometry, ctx.channels_last, ctx.size = tuple(geometry), channels_last, other.shape


def _input_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dy, w = ctx.saved_tensors
    needs_dy, needs_w = ctx.needs_input_grad[:2]
    to_dy = _ops.convolution(grad, w, None, *ctx.geometry) if needs_dy else None
    to_w = _ops.weight_gradient(dy, grad, ctx.size, ctx.channels_last, *ctx.geometry) if needs_w else None
    return (to_dy, to_w, None, None, *[None] * len(ctx.geometry))


def _weight_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dy, x = ctx.saved_tensors
    needs_dy, needs_x = ctx.needs_input_grad[:2]
    to_dy = _ops.convolution(x, grad, None, *ctx.geometry) if needs_dy else None
    to_x = _ops.input_gradient(dy, grad, ctx.size, ctx.channels_last, *ctx.geometry) if needs_x else None
    return (to_dy, to_x, None, None, *[None] * len(ctx.geometry))


# --- registered


def _register() -> torch.library.Library:
    library = torch.library.Library("convplan", "DEF")
    for schema in _SCHEMAS:
        library.define(schema, tags=TAGS)
    for name, kernel, fake in (
        ("convolution", _convolution, _fake_convolution),
        ("input_gradient", _input_gradient, _fake_gradient),
        ("weight_gradient", _weight_gradient, _fake_gradient),
        ("convolution.kept", kept_convolution, _fake_kept_convolution),
        ("input_gradient.kept", kept_input_gradient, _fake_kept_gradient),
        ("weight_gradient.kept", kept_weight_gradient, _fake_kept_gradient),
    ):
        for device in ("CPU", "CUDA"):
            library.impl(name, undisturbed(kernel), device)
        torch.library.register_fake(f"convplan::{name}", fake, lib=library)
    for name, backward, setup in (
        ("convolution", _convolution_backward, _setup_convolution),
        ("input_gradient", _input_gradient_backward, _setup_gradient),
        ("weight_gradient", _weight_gradient_backward, _setup_gradient),
    ):
        torch.library.register_autograd(f"convplan::{name}", backward, setup_context=setup, lib=library)
    return library


_library = _register()  # kept: torch forgets the operators with it
_ops: Any = torch.ops.convplan

# Whoever loads an exported program imports this module alone.
from convplan.torch_ops import fused_library as _fused_library  # noqa: E402, F401
