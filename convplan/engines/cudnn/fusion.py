"""What follows a convolution, as cuDNN's pointwise nodes (B30): plain data, in one of two forms.

`graph` makes descriptors of it, and `serialized` the text that cuDNN writes about it, so the two cannot differ.

cuDNN has two families of engines for the same sum, and offers each for graphs of its own form only (9.19):

    specialised   convolution -> add alpha * residual -> add bias -> activation, in this order and with nothing else:
                  engines that come ready-made, for fprop, a few activations, and either dense layout
    general       any other order of a few nodes: engines that are compiled at run time, for channels-last tensors

So a problem that fits the first form is asked about in both. In the general one the bias is added first, the residual
is multiplied with a constant instead of through the node's own factor, which those engines do not take, and where the
two forms would be the same graph a node that changes nothing keeps them apart. A specialised graph without a bias gets
one of zeros, as torch's own fused convolution does.

Statistics are a node of their own kind behind a convolution that writes its result: one form, which some ready-made
engines and some compiled ones are for. A gate is ReLU's backward node, for compiled engines.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import msgspec

from convplan._epilogue import MAX_ALIGNMENT_BYTES, Epilogue
from convplan._problem import FLOAT_DTYPES, WRITES, Problem, TensorSpec
from convplan.engines.cudnn.enums import Attribute, PointwiseMode

BACKWARD = (PointwiseMode.RELU_BWD,)  # modes whose operands are gradients
INTERMEDIATE = "float32"  # type of what is never written to memory, and of all arithmetic behind the convolution
VIRTUAL_ALIGNMENT_BYTES = 16  # of tensors that have no address; cuDNN wants a number
SCALE_ALIGNMENT_BYTES = 4  # nothing in a problem says more of it
# What is added has at least this much when a plan runs, whatever the problem says: ready-made engines read a vector of
# less as if it had, and fault (9.19, H200).
ADDED_ALIGNMENT_BYTES = 16
# Activations, of those that cuDNN has at all, that the specialised engines offer.
_SPECIALISED = ("none", "relu", "clamp", "sigmoid", "tanh", "elu")
_WRONG = ("tanh",)  # of these they make NaN where numbers are large (9.19, H200)
# Above its threshold softplus is linear to torch, and never to cuDNN. From here on the difference, exp(-threshold) to
# threshold, is far below what float32 rounds.
LEAST_THRESHOLD = 17.0

SUMS = ("m", "q")  # names of the tensors that statistics are written to, sums first

_Mode = PointwiseMode
Settings = tuple[tuple[Attribute, float], ...]
# One node each: the mode, and which attribute each parameter of the activation is.
_ONE_NODE: dict[str, tuple[PointwiseMode, tuple[Attribute, ...]]] = {
    "relu": (_Mode.RELU_FWD, ()),
    "leaky_relu": (_Mode.RELU_FWD, (Attribute.POINTWISE_RELU_LOWER_CLIP_SLOPE,)),
    "clamp": (_Mode.RELU_FWD, (Attribute.POINTWISE_RELU_LOWER_CLIP, Attribute.POINTWISE_RELU_UPPER_CLIP)),
    "gelu": (_Mode.GELU_FWD, ()),
    "gelu_tanh": (_Mode.GELU_APPROX_TANH_FWD, ()),
    "silu": (_Mode.SWISH_FWD, ()),
    "sigmoid": (_Mode.SIGMOID_FWD, ()),
    "tanh": (_Mode.TANH_FWD, ()),
    "elu": (_Mode.ELU_FWD, (Attribute.POINTWISE_ELU_ALPHA,)),
    "softplus": (_Mode.SOFTPLUS_FWD, (Attribute.POINTWISE_SOFTPLUS_BETA,)),
}
_SWISH_BETA: Settings = ((Attribute.POINTWISE_SWISH_BETA, 1.0),)


def aligned_when_run(alignment_bytes: int) -> int:
    """The alignment of what is added when a plan runs: what has less than engines can read is copied first."""
    return alignment_bytes if alignment_bytes >= ADDED_ALIGNMENT_BYTES else MAX_ALIGNMENT_BYTES


class Node(NamedTuple):
    """y = mode(x, alpha2 * b), elementwise; `b` is empty for modes of one operand. Tensors go by their names.

    Of a backward mode `x` is the gradient that comes in, `b` what the forward mode took, and `y` the gradient of that.
    """

    mode: PointwiseMode
    x: str
    b: str
    y: str
    alpha2: float = 1.0
    settings: Settings = ()


class Fusion(NamedTuple):
    """The nodes behind a convolution, in the order in which they are computed, and their tensors.

    Attributes:
        nodes: the last one writes the problem's output.
        result: name of the tensor that the convolution writes.
        given: tensors that are read or written besides the convolution's own: `z` residual, `b` bias, `s` scale, `g`
            gate, and of statistics `m` sums, `q` sums of squares.
        virtual: names of tensors that are never in memory.
        constants: numbers, by the names of the tensors that hold them; given by value at every run.
        statistics: a last node sums the result's channels, into `m`, and their squares, into `q`.
    """

    nodes: tuple[Node, ...]
    result: str
    given: dict[str, TensorSpec]
    virtual: tuple[str, ...]
    constants: dict[str, float]
    statistics: bool = False


def uid_of(name: str) -> int:
    """cuDNN's identifier of a tensor: of those in memory the letter itself (B27), of `v1` 1001 and of `c1` 2001."""
    return ord(name) if len(name) == 1 else {"v": 1000, "c": 2000}[name[0]] + int(name[1:])


def refusal(problem: Problem) -> str:
    """Why cuDNN cannot compute a problem's epilogue; empty when it may, and where there is none but a bias."""
    epilogue = problem.epilogue
    if epilogue.is_plain:
        return ""
    if problem.dtype == "float64":
        return f"the epilogue is {str(epilogue)[1:]} of float64, supported: of float32 and narrower types"
    if problem.output.layout == "strided":
        return f"the output has strides {problem.output.strides}, supported with an epilogue: a dense layout"
    if epilogue.activation == "softplus" and epilogue.parameters[1] < LEAST_THRESHOLD:
        return f"softplus's threshold is {epilogue.parameters[1]:g}, supported: {LEAST_THRESHOLD:g} and more"
    return ""


def is_specialised(problem: Problem) -> bool:
    """Whether a problem fits the form that cuDNN has ready-made engines for, which are right."""
    return _fits_specialised(problem) and problem.epilogue.activation not in _WRONG


def _fits_specialised(problem: Problem) -> bool:
    epilogue = problem.epilogue
    return (
        not epilogue.is_plain
        and problem.op == "fprop"
        and problem.dtype in FLOAT_DTYPES
        and not (epilogue.scale or epilogue.statistics)
        and epilogue.activation in _SPECIALISED
        and (epilogue.activation != "clamp" or epilogue.parameters[0] == 0)
    )


def takes_bias(problem: Problem) -> bool:
    """Whether ready-made engines may add the bias of a problem that has nothing else behind its convolution."""
    return (
        problem.epilogue.is_plain
        and problem.epilogue.bias
        and problem.op == "fprop"
        and problem.dtype in FLOAT_DTYPES
        and problem.dtype != "float64"
        and problem.output.layout != "strided"
    )


def nodes_behind(problem: Problem, specialised: bool) -> Fusion | None:
    """What follows the convolution in a problem's graph; None where that is the convolution alone, as it is for a bias
    that is added afterwards."""
    return fusion_of(problem, specialised) if specialised or not problem.epilogue.is_plain else None


@functools.lru_cache(maxsize=64)
def fusion_of(problem: Problem, specialised: bool) -> Fusion:
    """What follows a problem's convolution, in one of the two forms.

    Args:
        problem: with an epilogue that `refusal` has nothing against.
        specialised: the form; only where `is_specialised` or `takes_bias` holds, and always for a bias alone.
    """
    line = _Line(problem.output)
    epilogue = problem.epilogue
    if epilogue.statistics:
        return line.summed(WRITES[problem.op])
    if specialised:
        if epilogue.residual:
            line.add(_Mode.ADD, line.residual(epilogue), alpha2=epilogue.alpha)
        line.add(_Mode.ADD, line.bias(problem))
    elif epilogue.gate:
        line.add(_Mode.RELU_BWD, line.gate())
    else:
        _general(line, problem)
    _activate(line, epilogue)
    return line.finished(WRITES[problem.op])


def _general(line: _Line, problem: Problem) -> None:
    epilogue = problem.epilogue
    residual = line.residual_times_alpha(epilogue) if epilogue.residual else ""
    if _fits_specialised(problem) and epilogue.bias and not epilogue.residual:
        line.add(_Mode.IDENTITY)
    if epilogue.scale:
        line.add(_Mode.MUL, line.vector("s", problem.scale_dtype, SCALE_ALIGNMENT_BYTES))
    if epilogue.bias:
        line.add(_Mode.ADD, line.bias(problem))
    if residual:
        line.add(_Mode.ADD, residual)


def _activate(line: _Line, epilogue: Epilogue) -> None:
    if epilogue.activation == "hardswish":
        before = line.last
        line.add(_Mode.ADD, line.constant(3.0))
        line.add(_Mode.RELU_FWD, settings=((Attribute.POINTWISE_RELU_UPPER_CLIP, 6.0),))
        line.add(_Mode.MUL, before)
        line.add(_Mode.MUL, line.constant(1 / 6))
    elif epilogue.activation != "none":
        mode, attributes = _ONE_NODE[epilogue.activation]
        settings = _SWISH_BETA if mode == _Mode.SWISH_FWD else tuple(zip(attributes, epilogue.parameters, strict=False))
        line.add(mode, settings=settings)


class _Line:
    """A fusion in the making: what the last node gave is what the next one takes."""

    def __init__(self, output: TensorSpec) -> None:
        self._output = output
        self.nodes: list[Node] = []
        self.given: dict[str, TensorSpec] = {}
        self.constants: dict[str, float] = {}
        self._virtual: list[str] = []
        self.result = self.last = self.virtual_tensor()

    def virtual_tensor(self) -> str:
        self._virtual.append(f"v{len(self._virtual) + 1}")
        return self._virtual[-1]

    def constant(self, value: float) -> str:
        name = f"c{len(self.constants) + 1}"
        self.constants[name] = value
        return name

    def residual(self, epilogue: Epilogue) -> str:
        aligned = aligned_when_run(epilogue.residual_alignment_bytes)
        self.given["z"] = msgspec.structs.replace(self._output, alignment_bytes=aligned)
        return "z"

    def gate(self) -> str:
        self.given["g"] = msgspec.structs.replace(self._output, alignment_bytes=MAX_ALIGNMENT_BYTES)
        return "g"

    def residual_times_alpha(self, epilogue: Epilogue) -> str:
        """A node that waits for nothing: cuDNN puts it before all others, so it is made before them."""
        residual = self.residual(epilogue)
        if epilogue.alpha == 1:
            return residual
        self.nodes.append(Node(_Mode.MUL, residual, self.constant(epilogue.alpha), times := self.virtual_tensor()))
        return times

    def bias(self, problem: Problem) -> str:
        """Of a bias alone the problem does not say how it is aligned."""
        own = problem.epilogue.bias_alignment_bytes
        aligned = ADDED_ALIGNMENT_BYTES if problem.epilogue.is_plain else aligned_when_run(own)
        return self.vector("b", problem.bias_dtype, aligned)

    def vector(self, letter: str, dtype: str, alignment_bytes: int) -> str:
        """One number for each channel, broadcast over the rest."""
        channels = self._output.dims[1]
        ones = (1,) * (len(self._output.dims) - 2)
        self.given[letter] = TensorSpec((1, channels, *ones), (channels, 1, *ones), dtype, alignment_bytes)
        return letter

    def add(self, mode: PointwiseMode, b: str = "", *, alpha2: float = 1.0, settings: Settings = ()) -> None:
        before, self.last = self.last, self.virtual_tensor()
        self.nodes.append(Node(mode, before, b, self.last, alpha2, settings))

    def summed(self, output: str) -> Fusion:
        """The result as it is, and its statistics."""
        # The second row begins where the first one ends.
        aligned = math.gcd(4 * self._output.dims[1], ADDED_ALIGNMENT_BYTES)
        for letter in SUMS:
            self.vector(letter, INTERMEDIATE, aligned)
        return Fusion((), output, self.given, (), {}, statistics=True)

    def finished(self, output: str) -> Fusion:
        """The whole, with the tensor `output` as what the last node writes."""
        *before, last = self.nodes
        virtual = tuple(name for name in self._virtual if name != last.y)
        return Fusion((*before, last._replace(y=output)), self.result, self.given, virtual, self.constants)
