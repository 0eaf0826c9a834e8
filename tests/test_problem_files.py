"""Problem files: what an entry means, what is refused and how, and that what is written reads back the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import torch.nn.functional as F

from convplan import _problem_files
from convplan._epilogue import Epilogue
from convplan._errors import PlanFileError
from convplan._policy import Policy
from convplan._problem import Problem, TensorSpec
from convplan._problem_files import (
    SCHEMA_PATH,
    NamedProblem,
    parse_problems,
    problem_file_schema,
    read_problems,
    write_problems,
)

ENTRY: dict[str, Any] = {
    "name": "layer",
    "model": "ResNet-50",
    "suite": "dense",
    "op": "fprop",
    "n": 2,
    "c": 6,
    "k": 4,
    "spatial": [9, 8],
    "filter": [3, 3],
    "padding": [1, 1],
    "stride": [2, 1],
    "dilation": [1, 1],
    "groups": 2,
    "dtype": "float32",
    "layout": "channels_last",
}
DELETED = object()


def entry(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**ENTRY, **changes}.items() if value is not DELETED}


def content(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"comment": "from a test", "problems": entries}).encode()


def parse(**changes: Any) -> NamedProblem:
    (found,) = parse_problems(content(entry(**changes)))
    return found


# ---- what an entry means


def test_a_file_of_layer_shapes_is_read_in_its_order(tmp_path: Path) -> None:
    file = tmp_path / "suite.json"
    file.write_bytes(content(entry(), entry(name="other", op="wgrad")))
    first, second = read_problems(file)
    assert (first.name, first.model, first.suite, first.op) == ("layer", "ResNet-50", "dense", "fprop")
    assert (second.name, second.problem.op) == ("other", "wgrad")
    expected = Problem.dense(
        "fprop", (2, 6, 9, 8), (4, 3, 3, 3), layout="channels_last", padding=1, stride=(2, 1), groups=2
    )
    assert first.problem == expected


def test_padding_may_be_a_pair_for_each_dimension() -> None:
    problem = parse(padding=[[0, 1], 2]).problem
    assert problem.padding == ((0, 1), (2, 2))
    assert problem.y.dims == (2, 4, 4, 10)


@pytest.mark.parametrize(("spelled", "dtype", "tf32"), [("tf32", "float32", True), ("float32", "float32", False)])
def test_tf32_is_float32_with_a_policy_that_allows_it(spelled: str, dtype: str, tf32: bool) -> None:
    named = parse(dtype=spelled, device="cuda")
    assert (named.problem.dtype, named.allow_tf32) == (dtype, tf32)
    assert named.policy(Policy()).allow_tf32 is tf32
    assert named.policy(Policy(allow_tf32=not tf32)).allow_tf32 is not tf32, "what the user says comes first"


@pytest.mark.parametrize(
    ("dtype", "output"),
    [("int8", "int32"), ("int8", "float32"), ("float8_e4m3fn", "bfloat16"), ("float8_e5m2", "float8_e4m3fn")],
)
@pytest.mark.parametrize(("op", "written"), [("fprop", "y"), ("dgrad", "x"), ("wgrad", "w")])
def test_the_output_dtype_is_that_of_the_tensor_that_is_written(op: str, written: str, dtype: str, output: str) -> None:
    own = parse(op=op, dtype=dtype).problem
    assert {own.x.dtype, own.w.dtype, own.y.dtype} == {dtype}
    problem = parse(op=op, dtype=dtype, output_dtype=output).problem
    assert {name: getattr(problem, name).dtype for name in "xwy"} == {**dict.fromkeys("xwy", dtype), written: output}
    turned = parse(op=op, dtype=dtype, output_dtype=output, transposed=True).problem
    assert (turned.dtype, turned.output_dtype) == (dtype, output)


def test_one_tensor_may_have_the_other_fp8_type() -> None:
    problem = parse(dtype="float8_e4m3fn", weight={"dtype": "float8_e5m2"}, output_dtype="float32").problem
    assert [spec.dtype for spec in (problem.x, problem.w, problem.y)] == ["float8_e4m3fn", "float8_e5m2", "float32"]


@pytest.mark.parametrize("changes", [{"dtype": "tf32"}, {"dtype": "float16", "device": "cuda"}], ids=["cpu", "fp16"])
def test_the_policy_is_left_alone_where_tf32_means_nothing(changes: dict[str, Any]) -> None:
    assert parse(**changes).policy(Policy()) == Policy()


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({"dtype": "float64"}, "channels_last"),
        (
            {"dtype": "float64", "spatial": [9] * 3, "filter": [3] * 3}
            | {name: [1] * 3 for name in ("padding", "stride", "dilation")},
            "contiguous",
        ),
        ({"spatial": [9], "filter": [3], "padding": [1], "stride": [1], "dilation": [1]}, "contiguous"),
        ({}, "channels_last"),
    ],
    ids=["float64", "3-D float64", "1-D", "2-D"],
)
@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_what_is_written_has_the_layout_that_torch_writes(op: str, changes: dict[str, Any], written: str) -> None:
    problem = parse(op=op, **changes).problem
    assert problem.output.layout == written
    assert {spec.layout for spec in problem.inputs} == {"channels_last"}


@pytest.mark.parametrize(("op", "planned"), [("fprop", "dgrad"), ("dgrad", "fprop"), ("wgrad", "wgrad")])
@pytest.mark.behaviour("B5")
def test_a_transposed_entry_is_a_problem_with_exchanged_roles(op: str, planned: str) -> None:
    named = parse(op=op, transposed=True, output_padding=[1, 0])
    problem = named.problem
    assert (problem.op, named.op) == (planned, op)
    assert problem.y.dims == (2, 6, 9, 8), "y is the input of the call"
    assert problem.w.dims == (6, 2, 3, 3)
    assert problem.x.dims == (2, 4, 18, 8), "x is its output"


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "extra"),
    [
        pytest.param(2, 1, 1, 0, id="plain"),
        pytest.param(3, 1, 1, 2, id="largest-below-stride"),
        pytest.param(2, 3, 4, 3, id="from-the-stride-on"),
        pytest.param(1, 2, 3, 2, id="stride-1-all-padding-taken"),
    ],
)
def test_a_transposed_entry_computes_what_torch_does(stride: int, padding: int, dilation: int, extra: int) -> None:
    problem = parse(
        n=2,
        c=3,
        k=2,
        spatial=[5],
        filter=[3],
        padding=[padding],
        stride=[stride],
        dilation=[dilation],
        groups=1,
        transposed=True,
        output_padding=[extra],
    ).problem
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(problem.y.dims, dtype=torch.float64, generator=generator)
    weight = torch.randn(problem.w.dims, dtype=torch.float64, generator=generator)
    expected = F.conv_transpose1d(given, weight, None, stride, padding, extra, 1, dilation)
    assert problem.x.dims == tuple(expected.shape)

    x = torch.zeros(problem.x.dims, dtype=torch.float64, requires_grad=True)
    y = F.conv1d(F.pad(x, problem.padding[0]), weight, None, problem.stride, 0, problem.dilation)
    y.backward(given)
    torch.testing.assert_close(x.grad, expected)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"dtype": "float8"}, r'problems\[0\]\.dtype: found "float8", expected one of .*tf32', id="dtype"),
        pytest.param(
            {"dtype": "int32"}, r'problems\[0\]\.dtype: found "int32", expected one of .*int8', id="never-read"
        ),
        pytest.param(
            {"output_dtype": "tf32"}, r'\.output_dtype: found "tf32", expected one of .*, int32$', id="output-tf32"
        ),
        pytest.param(
            {"output_dtype": "float16"},
            r"problems\[0\] \('layer'\): .*y float16; expected y, which fprop writes, to be float32$",
            id="output-dtype",
        ),
        pytest.param(
            {"weight": {"dtype": "int8"}},
            r'weight\.dtype: found "int8", expected one of float8_e4m3fn, float8_e5m2$',
            id="tensor-dtype",
        ),
        pytest.param(
            {"weight": {"dtype": "float8_e5m2"}}, r"\('layer'\): dtypes differ: .*w float8_e5m2", id="mixed-dtypes"
        ),
        pytest.param({"op": "forward"}, r"problems\[0\]\.op: found .*expected one of fprop, dgrad, wgrad", id="op"),
        pytest.param({"n": "2"}, r'problems\[0\]\.n: found "2", expected int', id="text-for-number"),
        pytest.param({"n": 2.0}, r"problems\[0\]\.n: found 2\.0, expected int", id="fraction"),
        pytest.param({"bias": 1}, r"problems\[0\]\.bias: found 1, expected bool", id="number-for-bool"),
        pytest.param({"k": DELETED}, r"problems\[0\]: found no field 'k', expected it", id="missing"),
        pytest.param(
            {"kernel": [3, 3]}, r"problems\[0\]: found unknown field 'kernel', expected one of .*filter", id="unknown"
        ),
        pytest.param(
            {"output": {"stride": [1]}},
            r"\.output: found unknown field 'stride', expected .*strides",
            id="unknown-below",
        ),
        pytest.param({"stride": [0, 1]}, r"stride\[0\]: found 0, expected int >= 1", id="zero-stride"),
        pytest.param(
            {"padding": [1, -1]},
            r"problems\[0\] \('layer'\): padding is \(1, -1\), expected values >= 0",
            id="negative-padding",
        ),
        pytest.param(
            {"padding": [[1, 2, 3], 1]}, r"padding\[0\]: found \[1,2,3\], expected array of length 2", id="triple"
        ),
        pytest.param({"stride": [1]}, "stride: found 1 entries, expected 2", id="too-few"),
        pytest.param({"spatial": [1, 1, 1, 1]}, "spatial: found .*expected array of length <= 3", id="4-D"),
        pytest.param({"groups": 4}, "groups: found 4, expected a divisor of c = 6 and k = 4", id="groups"),
        pytest.param({"n": 10**30}, r"problems\[0\].*10{30}.*at most 2\*\*48", id="huge"),
        pytest.param({"filter": [30, 30]}, "dilated filter size is 30, padded input size is 11", id="empty-output"),
        pytest.param({"bias": True, "op": "dgrad"}, "bias: found true with op dgrad", id="bias-of-gradient"),
        pytest.param({"output_padding": [1, 1]}, 'output_padding: found without "transposed"', id="output-padding"),
        pytest.param(
            {"transposed": True, "output_padding": [2, 0]}, "output_padding: found 2, expected less than", id="too-much"
        ),
        pytest.param(
            {"transposed": True, "output_padding": [2, 0], "dilation": [3, 1]},
            "output_padding: found 2 with stride 2 and padding 1 at the end",
            id="no-padding-to-take",
        ),
        pytest.param({"transposed": True, "padding": [20, 1]}, "output size is -", id="transposed-empty"),
        pytest.param({"input": {"strides": [1, 1]}}, r"input\.strides: found \[1,1\]", id="strides"),
    ],
)
def test_a_wrong_entry_is_named_with_what_was_found_and_expected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanFileError, match=message) as caught:
        parse_problems(content(entry(**changes)), source="suite.json")
    assert str(caught.value).startswith("suite.json: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "found malformed JSON", id="empty"),
        pytest.param(b'{"problems": [', "found malformed JSON", id="cut-short"),
        pytest.param(b"\xff\xfe", "found malformed JSON", id="binary"),
        pytest.param(b'{"problems": [{"name": "\xff"}]}', "found malformed JSON", id="not-utf-8"),
        pytest.param(b"[" * 100_000, "expected object|malformed", id="deep"),
        pytest.param(b'{"problems": [{"n": ' + b"1" * 10_000 + b"}]}", r"problems\[0\]\.n: ", id="long-number"),
        pytest.param(b"[]", r"the file: found \[\], expected object", id="list"),
        pytest.param(b"{}", "the file: found no field 'problems'", id="no-problems"),
        pytest.param(
            b'{"plans": []}', "the file: found unknown field 'plans', expected one of comment, problems", id="plans"
        ),
        pytest.param(b'{"problems": {}}', "problems: found {}, expected array", id="object"),
    ],
)
def test_a_file_of_something_else_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(PlanFileError, match=message):
        parse_problems(data)


def test_names_are_unique() -> None:
    with pytest.raises(PlanFileError, match=r"problems\[2\]\.name: found 'layer' as in problems\[0\]"):
        parse_problems(content(entry(), entry(name="other"), entry()))


def test_size_and_number_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large.json"
    file.write_bytes(content(entry()))
    monkeypatch.setattr(_problem_files, "MAX_FILE_BYTES", 100)
    with pytest.raises(PlanFileError, match=r"large\.json: found more than 100 bytes"):
        read_problems(file)
    assert jsonschema_of_problems()["maxItems"] == 100_000


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match=r"none\.json: cannot be read: No such file"):
        read_problems(tmp_path / "none.json")


# ---- writing

PROBLEMS = {
    "float16": Problem.dense("fprop", (2, 6, 9, 8), (4, 3, 3, 3), dtype="float16", layout="channels_last", groups=2),
    "gradients": Problem.dense("dgrad", (2, 6, 9), (4, 6, 3), dtype="float64", padding=[(1, 2)], stride=2),
    "weights": Problem.dense("wgrad", (2, 6, 5, 6, 7), (4, 6, 1, 2, 3), padding=[(0, 1), 2, (3, 0)], dilation=2),
    "bias": Problem.dense("fprop", (2, 6, 9, 8), (4, 6, 3, 3), epilogue=Epilogue(bias=True)),
    "transposed-bias": Problem.dense("dgrad", (2, 6, 10), (4, 6, 3), stride=2, padding=1, epilogue=Epilogue(bias=True)),
    "mixed-layouts": Problem(
        op="fprop",
        x=TensorSpec((2, 6, 9, 8), (1_000, 1, 100, 10), "float32", 4),
        w=TensorSpec.dense((4, 6, 3, 3), "float32"),
        y=TensorSpec.dense((2, 4, 7, 6), "float32", "channels_last"),
        padding=((0, 0), (0, 0)),
        stride=(1, 1),
        dilation=(1, 1),
    ),
    "expanded-gradient": Problem(
        op="wgrad",
        x=TensorSpec.dense((2, 6, 9), "bfloat16"),
        w=TensorSpec.dense((4, 6, 3), "bfloat16"),
        y=TensorSpec((2, 4, 7), (0, 0, 0), "bfloat16", 2),
        padding=((0, 0),),
        stride=(1,),
        dilation=(1,),
        device="cuda",
    ),
    "empty": Problem.dense("fprop", (0, 6, 9), (4, 6, 3)),
    "int8": Problem.dense("fprop", (2, 6, 9), (4, 6, 3), dtype="int8", device="cuda"),
    "int8-int32": Problem.dense(
        "fprop", (2, 6, 9, 8), (4, 6, 3, 3), dtype="int8", output_dtype="int32", layout="channels_last"
    ),
    "int8-gradient": Problem.dense("dgrad", (2, 6, 9), (4, 6, 3), dtype="int8", output_dtype="float32"),
    "fp8-weights": Problem.dense("wgrad", (2, 6, 9), (4, 6, 3), dtype="float8_e5m2", output_dtype="bfloat16"),
    "fp8-transposed": Problem.dense(
        "dgrad", (2, 6, 10), (4, 6, 3), dtype="float8_e4m3fn", output_dtype="float16", epilogue=Epilogue(bias=True)
    ),
    **{
        f"fp8-mixed-{op}-{y}": Problem(
            op=op,
            x=TensorSpec((2, 6, 9), (60, 10, 1), "float8_e4m3fn", 1),
            w=TensorSpec.dense((4, 6, 3), "float8_e5m2"),
            y=TensorSpec.dense((2, 4, 7), y),
            padding=((0, 0),),
            stride=(1,),
            dilation=(1,),
        )
        for op, y in (("fprop", "float32"), ("fprop", "float8_e5m2"), ("dgrad", "float8_e4m3fn"))
    },
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_reads_back_the_same(name: str, tmp_path: Path) -> None:
    file = tmp_path / "captured.json"
    assert write_problems(file, [PROBLEMS[name]], comment="captured") == 1
    (found,) = read_problems(file)
    assert found.problem == PROBLEMS[name]


def test_names_and_transposition_read_back_the_same(tmp_path: Path) -> None:
    written = parse_problems(
        content(
            entry(transposed=True, output_padding=[1, 0]),
            entry(name="tf32", dtype="tf32", device="cuda"),
            entry(name="dgrad", op="dgrad", transposed=True, bias=False),
        )
    )
    write_problems(tmp_path / "again.json", written)
    assert read_problems(tmp_path / "again.json") == written


def test_plain_problems_get_different_names(tmp_path: Path) -> None:
    write_problems(tmp_path / "captured.json", PROBLEMS.values())
    names = [named.name for named in read_problems(tmp_path / "captured.json")]
    assert len(set(names)) == len(PROBLEMS)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(PlanFileError, match="taken: cannot be written"):
        write_problems(tmp_path / "taken", PROBLEMS.values())
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# ---- the published schema


def jsonschema_of_problems() -> dict[str, Any]:
    schema = json.loads(problem_file_schema())
    found: dict[str, Any] = schema["$defs"]["ProblemFile"]["properties"]["problems"]
    return found


def test_the_published_schema_is_current() -> None:
    assert SCHEMA_PATH.read_text(encoding="utf-8") == problem_file_schema(), "run scripts/write_problem_schema.py"


def test_the_published_schema_accepts_and_refuses_what_reading_does(tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(problem_file_schema()))
    write_problems(tmp_path / "all.json", PROBLEMS.values())
    assert validator.is_valid(json.loads((tmp_path / "all.json").read_bytes()))
    for changes in ({"dtype": "float8"}, {"n": "2"}, {"kernel": 3}, {"stride": [0, 1]}, {"k": DELETED}):
        assert not validator.is_valid(json.loads(content(entry(**changes)))), changes
