"""What is done to a convolution's result before it is written: plain data, no torch, no engines.

    y = activation(scale * convolution + alpha * residual + bias)

Each part is optional. Two more stand alone, for training. With `statistics` nothing is done to the result, and sums of
each channel are written beside it: what a batch normalization needs. With `gate` the result is kept where a tensor is
above 0 and made 0 elsewhere: the backward pass of the ReLU before a convolution. How it is computed is the engines'
business; the reference that judges them is `_verify`'s.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import msgspec

from convplan._errors import SpecError

MAX_ALIGNMENT_BYTES = 32
MAX_PARAMETER = 1e30  # magnitude; keeps arithmetic on untrusted numbers finite in float32


class ActivationInfo(NamedTuple):
    """One row of `ACTIVATIONS`: the names and defaults of its parameters, and how much it can enlarge a difference."""

    parameters: tuple[tuple[str, float], ...] = ()
    slope: float = 1.0  # largest of its derivative, where no parameter makes it larger


ACTIVATIONS: dict[str, ActivationInfo] = {
    "none": ActivationInfo(),
    "relu": ActivationInfo(),
    "leaky_relu": ActivationInfo((("negative_slope", 0.01),)),
    "clamp": ActivationInfo((("low", 0.0), ("high", 6.0))),
    "gelu": ActivationInfo(slope=1.13),
    "gelu_tanh": ActivationInfo(slope=1.13),
    "silu": ActivationInfo(slope=1.1),
    "sigmoid": ActivationInfo(),
    "tanh": ActivationInfo(),
    "hardswish": ActivationInfo(slope=1.5),
    "elu": ActivationInfo((("alpha", 1.0),)),
    "softplus": ActivationInfo((("beta", 1.0), ("threshold", 20.0))),
}
ALIASES: dict[str, tuple[str, tuple[float, ...]]] = {
    "relu6": ("clamp", (0.0, 6.0)),
    "hardtanh": ("clamp", (-1.0, 1.0)),
    "swish": ("silu", ()),
    "identity": ("none", ()),
}


class Epilogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True, cache_hash=True):
    """What is done to the result before it is written: `activation(scale * result + alpha * residual + bias)`.

    Args:
        bias: add one number for each output channel.
        residual: add a tensor with the output's dims, strides and dtype.
        alpha: what the residual is multiplied with.
        scale: multiply the convolution's result with one number for each output channel.
        activation: a key of `ACTIVATIONS`, or of `ALIASES`, which becomes what it stands for.
        parameters: of the activation, in the order of `ACTIVATIONS`; those left out have their defaults.
        bias_alignment_bytes, residual_alignment_bytes: as in `TensorSpec`; 32 where nothing but a bias is added.
        statistics: write the sum and the sum of squares of each output channel too; alone.
        gate: keep the result where a tensor with the output's dims, strides and dtype is above 0, make it 0 elsewhere;
            alone. What becomes of it where that tensor is NaN is left open.

    Raises:
        SpecError: an unknown activation, numbers that it does not take, or statistics or a gate with anything else.
    """

    bias: bool = False
    residual: bool = False
    alpha: float = 1.0
    scale: bool = False
    activation: str = "none"
    parameters: tuple[float, ...] = ()
    bias_alignment_bytes: int = MAX_ALIGNMENT_BYTES
    residual_alignment_bytes: int = MAX_ALIGNMENT_BYTES
    statistics: bool = False
    gate: bool = False

    def __post_init__(self) -> None:
        if self.activation in ALIASES:
            if self.parameters:
                raise SpecError(f"activation is {self.activation!r} with parameters {self.parameters}, expected none")
            name, parameters = ALIASES[self.activation]
            self._set("activation", name)
            self._set("parameters", parameters)
        if self.activation not in ACTIVATIONS:
            known = ", ".join((*ACTIVATIONS, *ALIASES))
            raise SpecError(f"activation is {self.activation!r}, expected one of {known}")
        self._check_parameters()
        self._set("alpha", _number("alpha", self.alpha) if self.residual else 1.0)
        for name, present in (("bias", self.bias and not self.is_plain), ("residual", self.residual)):
            field = f"{name}_alignment_bytes"
            value = getattr(self, field)
            if value not in (1, 2, 4, 8, 16, 32):
                raise SpecError(f"{field} is {value!r}, expected a power of two from 1 to 32")
            if not present:
                self._set(field, MAX_ALIGNMENT_BYTES)
        if self.statistics or self.gate:
            self._check_alone()

    def _check_alone(self) -> None:
        others = self.bias or self.residual or self.scale or self.activation != "none"
        if others or (self.statistics and self.gate):
            name = "statistics" if self.statistics else "gate"
            raise SpecError(f"found {str(self)[1:]} in an epilogue, expected {name} alone, of the convolution itself")

    def _check_parameters(self) -> None:
        expected = ACTIVATIONS[self.activation].parameters
        if len(self.parameters) > len(expected):
            names = ", ".join(name for name, _ in expected) or "no parameters"
            raise SpecError(f"{self.activation} got {len(self.parameters)} parameters, expected at most: {names}")
        given = tuple(
            _number(f"{self.activation}'s {name}", value)
            for (name, _), value in zip(expected, self.parameters, strict=False)
        )
        values = given + tuple(default for _, default in expected[len(given) :])
        if self.activation == "clamp" and values[0] > values[1]:
            raise SpecError(f"clamp's bounds are {values}, expected low <= high")
        if self.activation == "softplus" and values[0] <= 0:
            raise SpecError(f"softplus's beta is {values[0]}, expected a number > 0")
        self._set("parameters", values)

    def _set(self, name: str, value: object) -> None:
        msgspec.structs.force_setattr(self, name, value)

    @property
    def is_plain(self) -> bool:
        """Nothing, or a bias alone: what torch's own convolutions do."""
        return not (self.residual or self.scale or self.statistics or self.gate) and self.activation == "none"

    @property
    def keeps_integers(self) -> bool:
        """Integers in, integers out."""
        if self.activation == "clamp":
            return all(value == int(value) for value in (self.alpha, *self.parameters))
        return self.activation in ("none", "relu") and self.alpha == int(self.alpha)

    @property
    def slope(self) -> float:
        """How much the activation enlarges a difference of its inputs, at most."""
        largest = ACTIVATIONS[self.activation].slope
        return max(largest, *map(abs, self.parameters)) if self.activation in ("leaky_relu", "elu") else largest

    def __str__(self) -> str:
        parts = []
        if self.scale:
            parts.append("scale")
        if self.residual:
            times = "" if self.alpha == 1 else f"*{_text(self.alpha)}"
            parts.append(f"residual{times}{_aligned(self.residual_alignment_bytes)}")
        if self.bias:
            parts.append(f"bias{_aligned(self.bias_alignment_bytes)}")
        if self.activation != "none":
            inside = ",".join(map(_text, self.parameters))
            parts.append(f"{self.activation}({inside})" if inside else self.activation)
        if self.statistics:
            parts.append("statistics")
        if self.gate:
            parts.append("gate")
        return "".join(f"+{part}" for part in parts)


_PART = re.compile(
    r"(?P<name>[a-z_]+)(?:\((?P<inside>[-0-9.e,]*)\))?(?:\*(?P<alpha>-?[0-9][-0-9.e]*))?(?:@(?P<aligned>[0-9]{1,2}))?"
)


def parse_epilogue(text: str) -> Epilogue:
    """The epilogue that `str(epilogue)` wrote, without the first `+`.

    Raises:
        SpecError: it is no such text.
    """
    fields: dict[str, object] = {}
    for word in text.split("+") if text else ():
        part = _PART.fullmatch(word)
        if part is None:
            raise SpecError(
                f"found {word!r} in an epilogue, expected scale, residual, bias, statistics, gate or an activation"
            )
        name = part["name"]
        found: dict[str, object] = {}
        if name in ("scale", "residual", "bias", "statistics", "gate"):
            found[name] = True
            if part["aligned"]:
                found[f"{name}_alignment_bytes"] = int(part["aligned"])
            if part["alpha"]:
                found["alpha"] = _parsed(part["alpha"])
        else:
            found["activation"] = name
            if part["inside"]:
                found["parameters"] = tuple(map(_parsed, part["inside"].split(",")))
        misplaced = (
            (name in ("scale", "statistics", "gate") and part["aligned"])
            or (name != "residual" and part["alpha"])
            or ("activation" in found and part["aligned"])
            or ("activation" not in found and part["inside"] is not None)
        )
        if misplaced or fields.keys() & found.keys():
            raise SpecError(f"found {word!r} in an epilogue, expected each once, as residual*0.5@16+bias+relu")
        fields |= found
    return Epilogue(**fields)  # type: ignore[arg-type]


def _aligned(alignment_bytes: int) -> str:
    return "" if alignment_bytes == MAX_ALIGNMENT_BYTES else f"@{alignment_bytes}"


def _text(value: float) -> str:
    """A number without `+`, which separates the parts."""
    return f"{value!r}".replace("e+", "e").removesuffix(".0")


def _parsed(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SpecError(f"found {text!r} in an epilogue, expected a number") from None


def _number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SpecError(f"{what} is {value!r}, expected a finite number")
    if abs(value) > MAX_PARAMETER:
        raise SpecError(f"{what} is {value!r}, expected a magnitude of at most {MAX_PARAMETER:g}")
    return float(value)
