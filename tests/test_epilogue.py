"""Epilogues as data: what they accept, what they refuse, and that their text reads back."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convplan import Epilogue, Problem, SpecError
from convplan._epilogue import ACTIVATIONS, ALIASES, parse_epilogue

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-6)
ALIGNMENTS = st.sampled_from([1, 2, 4, 8, 16, 32])


@st.composite
def epilogues(draw: st.DrawFn) -> Epilogue:
    activation = draw(st.sampled_from(sorted(ACTIVATIONS)))
    count = len(ACTIVATIONS[activation].parameters)
    parameters = tuple(draw(st.lists(NUMBERS, min_size=count, max_size=count)))
    if activation == "clamp":
        parameters = tuple(sorted(parameters))
    if activation == "softplus":
        parameters = (abs(parameters[0]) + 0.1, parameters[1])
    return Epilogue(
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        alpha=draw(NUMBERS),
        scale=draw(st.booleans()),
        activation=activation,
        parameters=parameters,
        bias_alignment_bytes=draw(ALIGNMENTS),
        residual_alignment_bytes=draw(ALIGNMENTS),
    )


@given(epilogues())
def test_text_and_json_read_back(epilogue: Epilogue) -> None:
    assert parse_epilogue(str(epilogue).removeprefix("+")) == epilogue
    assert msgspec.json.decode(msgspec.json.encode(epilogue), type=Epilogue) == epilogue


@given(epilogues())
def test_a_problem_with_an_epilogue_reads_back(epilogue: Epilogue) -> None:
    problem = Problem.dense("fprop", (2, 4, 6, 6), (8, 4, 3, 3), dtype="float16", epilogue=epilogue, device="cuda")
    assert Problem.parse(str(problem)) == problem


@pytest.mark.behaviour("B24")
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_parameters_that_are_left_out_have_their_defaults(activation: str) -> None:
    defaults = tuple(value for _, value in ACTIVATIONS[activation].parameters)
    assert Epilogue(activation=activation) == Epilogue(activation=activation, parameters=defaults)


def test_an_alias_is_what_it_stands_for() -> None:
    assert Epilogue(activation="relu6") == Epilogue(activation="clamp", parameters=(0, 6))
    assert Epilogue(activation="swish") == Epilogue(activation="silu")


def test_what_does_not_matter_makes_no_difference() -> None:
    assert Epilogue(alpha=0.5) == Epilogue()
    assert Epilogue(bias=True, bias_alignment_bytes=4) == Epilogue(bias=True)
    assert Epilogue(activation="relu", residual_alignment_bytes=4) == Epilogue(activation="relu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "rellu"}, r"'rellu', expected one of none, relu, leaky_relu.*hardswish.*relu6"),
        ({"activation": "relu", "parameters": (1.0,)}, r"relu got 1 parameters.*no parameters"),
        ({"activation": "relu6", "parameters": (1.0,)}, r"'relu6' with parameters"),
        ({"activation": "clamp", "parameters": (1.0, 0.0)}, r"\(1\.0, 0\.0\), expected low <= high"),
        ({"activation": "softplus", "parameters": (0.0,)}, r"beta is 0\.0, expected a number > 0"),
        ({"activation": "elu", "parameters": (float("nan"),)}, r"alpha is nan, expected a finite number"),
        ({"residual": True, "alpha": float("inf")}, r"alpha is inf, expected a finite number"),
        ({"residual": True, "alpha": 1e31}, r"1e\+31, expected a magnitude of at most"),
        ({"residual": True, "residual_alignment_bytes": 3}, r"residual_alignment_bytes is 3, expected a power of two"),
    ],
)
def test_bad_numbers_are_refused_with_what_was_found(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Epilogue(**fields)


@pytest.mark.parametrize(
    "text", ["bias+bias", "relu+gelu", "bias*2", "scale@4", "relu@4", "bias(1)", "elu(1,", "+", "x y"]
)
def test_malformed_text_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_epilogue(text)


def test_every_alias_stands_for_a_known_activation() -> None:
    assert {name for name, _ in ALIASES.values()} <= ACTIVATIONS.keys()


def test_a_wgrad_has_no_epilogue() -> None:
    with pytest.raises(SpecError, match=r"a wgrad has no epilogue, found \+relu"):
        Problem.dense("wgrad", (2, 4, 6, 6), (8, 4, 3, 3), epilogue=Epilogue(activation="relu"))


@pytest.mark.parametrize(
    ("dtype", "output_dtype", "epilogue", "core", "core_output"),
    [
        ("float16", None, Epilogue(bias=True, activation="relu"), Epilogue(bias=True), "float16"),
        ("float16", None, Epilogue(bias=True, scale=True), Epilogue(), "float16"),
        ("float16", "float32", Epilogue(activation="relu"), Epilogue(), "float32"),
        ("int8", None, Epilogue(bias=True, activation="relu"), Epilogue(), "float32"),
    ],
)
def test_the_core_is_what_torch_computes(
    dtype: str, output_dtype: str | None, epilogue: Epilogue, core: Epilogue, core_output: str
) -> None:
    problem = Problem.dense(
        "fprop", (2, 4, 6, 6), (8, 4, 3, 3), dtype=dtype, output_dtype=output_dtype, epilogue=epilogue
    )
    assert problem.core.epilogue == core
    assert problem.core.output_dtype == core_output
    assert problem.core.core == problem.core
