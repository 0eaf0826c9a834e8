"""`convplan configs`: what the real cuDNN proposes for a GPU that a file describes, and what is refused and why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch

from convplan._candidates import Live
from convplan._filter import filter_candidates
from convplan._policy import Policy
from convplan._problem import Problem
from convplan._problem_files import parse_problems
from convplan.cli import main
from convplan.engines.base import Candidate
from convplan.engines.cudnn.device import Device
from convplan.engines.cudnn.engine import CudnnEngine
from convplan.engines.cudnn.library import Library
from convplan.engines.cudnn.target import Target

H200 = Path(__file__).with_name("h200-cudnn-9.19.0.deviceprop.json")
ENTRY: dict[str, Any] = {
    "name": "layer",
    "op": "fprop",
    "n": 8,
    "c": 64,
    "k": 64,
    "spatial": [56, 56],
    "filter": [3, 3],
    "padding": [1, 1],
    "stride": [1, 1],
    "dilation": [1, 1],
    "groups": 1,
    "dtype": "float16",
    "layout": "channels_last",
}
DILATED = {"name": "dilated", "dilation": [12, 12], "padding": [12, 12]}
LINE = {"name": "line", "spatial": [800], "filter": [3], "padding": [1], "stride": [1], "dilation": [1]}
CONFIG_KEYS = {"source", "engine", "knobs", "notes", "workspace_bytes", "refused"}
DENY_ALL = {
    "schema": 1,
    "rules": [{"id": "none", "reason": "all hang", "source": "https://example.org/1", "cudnn": {"since": "9.1"}}],
}

pytestmark = pytest.mark.usefixtures("library")


class Ran(NamedTuple):
    """What one run of the command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The error as one line, without the frame that wrong usage is drawn in."""
        return " ".join(self.err.replace("│", " ").split())


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def configs(run: Run, tmp_path: Path) -> Callable[..., Ran]:
    """Runs the command on entries that differ from `ENTRY` as said, for the H200, with further options."""

    def call(*changes: dict[str, Any], options: tuple[object, ...] = ("--json",), device: Path | None = H200) -> Ran:
        file = write(tmp_path, *changes)
        return run("configs", "--problems", file, *(("--device", device) if device else ()), *options)

    return call


def write(folder: Path, *changes: dict[str, Any]) -> Path:
    file = folder / "problems.json"
    file.write_text(json.dumps({"problems": [{**ENTRY, **change} for change in changes]}))
    return file


def on_gpu(change: dict[str, Any]) -> Problem:
    """The problem of an entry, as a program would meet it on a GPU."""
    data = json.dumps({"problems": [{**ENTRY, **change, "device": "cuda"}]}).encode()
    return parse_problems(data)[0].problem


def proposals(problem: Problem, effort: Any = "measure") -> list[Candidate]:
    return list(CudnnEngine(Target.absent(Device.from_properties(H200))).configs(problem, effort))


def without_errata(found: list[Any]) -> list[Any]:
    """The configurations that no rule names: which ones are named changes with the list of rules."""
    left = [one for one in found if not one["refused"].startswith("errata rule ")]
    assert len(left) > len(found) / 2
    return left


def refused_by_note(found: list[Any], note: str) -> dict[bool, set[str]]:
    """The reasons given to configurations with and without a note."""
    reasons: dict[bool, set[str]] = {True: set(), False: set()}
    for one in without_errata(found):
        reasons[note in one["notes"]["numerical"]].add(one["refused"])
    return reasons


# ---- What is listed


def test_a_problem_is_taken_from_a_line_of_a_log_too(configs: Callable[..., Ran], run: Run) -> None:
    (from_file,) = configs({"device": "cuda"}).json
    line = "fprop float16 x=8x64x56x56:cl w=64x64x3x3:cl y=8x64x56x56:cl pad=1,1 cuda"
    (from_line,) = run("configs", "--problem", line, "--device", H200, "--json").json
    assert from_line == {**from_file, "name": line}


@pytest.mark.behaviour("C7")
@pytest.mark.behaviour("B13")
@pytest.mark.parametrize("effort", ["measure", "instant"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="fprop-float16"),
        pytest.param({"op": "dgrad", "dtype": "bfloat16"}, id="dgrad-bfloat16"),
        pytest.param({"op": "wgrad", "dtype": "tf32"}, id="wgrad-tf32"),
        pytest.param({"weight": {"strides": [1000, 90, 20, 3]}}, id="strided-weight"),
        pytest.param({**LINE, "layout": "contiguous"}, id="one-dimension"),
        pytest.param({"transposed": True, "bias": True}, id="transposed-with-bias"),
        pytest.param(DILATED, id="dilated"),
    ],
)
def test_the_list_is_the_engines_in_its_order(configs: Callable[..., Ran], change: dict[str, Any], effort: str) -> None:
    ran = configs(change, options=("--json", "--effort", effort))
    assert ran.code == 0, ran.err
    (answer,) = ran.json
    expected = proposals(on_gpu(change), effort)
    assert len(answer["configs"]) == len(expected) > 5
    for found, candidate in zip(answer["configs"], expected, strict=True):
        assert {"engine": found["engine"], **found["knobs"]} == dict(candidate.config.knobs)
        assert (found["source"], found["workspace_bytes"]) == (candidate.source, candidate.workspace_bytes)
        assert found["notes"] == json.loads(msgspec.json.encode(candidate.notes))
        assert found["refused"] == candidate.refused, "errata, and this policy forbids nothing else"
    sources = [one["source"] for one in answer["configs"]]
    assert set(sources) <= ({"mode_a", "fallback"} if effort == "instant" else {"mode_a", "mode_b", "fallback"})
    assert sources[0] == "mode_a"
    assert sources[-1] == "fallback"


def test_json_is_a_list_with_stable_keys_in_the_files_order(configs: Callable[..., Ran]) -> None:
    found = configs({"name": "b"}, {"name": "a", "op": "wgrad"}, {"name": "none", "n": 0}).json
    assert isinstance(found, list)
    assert [answer["name"] for answer in found] == ["b", "a", "none"]
    assert all(set(answer) == {"name", "configs", "reason"} for answer in found)
    for one in [*found[0]["configs"], *found[1]["configs"]]:
        assert set(one) == CONFIG_KEYS
        assert set(one["notes"]) == {"numerical", "behavior"}
        assert all(type(value) is int for value in (one["engine"], *one["knobs"].values()))
        assert one["workspace_bytes"] is None or one["workspace_bytes"] >= 0
        assert "engine" not in one["knobs"]
    assert [bool(answer["reason"]) for answer in found] == [False, False, True]


def test_the_table_says_the_same(configs: Callable[..., Ran]) -> None:
    ran = configs({}, {"name": "plain", "op": "wgrad", "dtype": "float32"}, {"name": "none", "n": 0}, options=())
    layer, plain, _ = configs({}, {"name": "plain", "op": "wgrad", "dtype": "float32"}, {"name": "none", "n": 0}).json
    assert ran.code == 0
    first, second, third, summary = ran.out.rstrip("\n").split("\n\n")
    title, heading, *rows = first.splitlines()
    assert title.startswith("layer: fprop float16 x=8x64x56x56:cl ")
    assert title.endswith(" cuda")
    assert heading.split() == ["source", "engine", "knobs", "workspace", "notes", "refused"]
    assert len(rows) == len(layer["configs"])
    for row, one in zip(rows, layer["configs"], strict=True):
        assert row.split()[:2] == [one["source"], str(one["engine"])]
        assert all(f"{name}={value}" in row for name, value in one["knobs"].items())
    reason = "carries TENSOR_CORE and the policy does not allow TF32"
    said = [one["refused"] for one in plain["configs"]].count(reason)
    assert sum(row.rstrip().endswith(reason) for row in second.splitlines()) == said > 1
    assert third.splitlines()[1] == "none: the problem is empty"
    assert summary.startswith(f"3 problems: {len(layer['configs']) + len(plain['configs'])} configurations, ")
    refused = sum(bool(one["refused"]) for answer in (layer, plain) for one in answer["configs"])
    assert f", {refused} of them refused; 1 problems without any (NVIDIA H200, compute capability 9.0" in summary
    assert ran.err.splitlines() == ["[1/3] layer", "[2/3] plain", "[3/3] none"], "progress is for stderr"


def test_a_name_cannot_move_the_cursor(configs: Callable[..., Ran]) -> None:
    ran = configs({"name": "a\x1b[2Jb\nc", "n": 0}, options=())
    assert ran.code == 1
    assert "\x1b" not in ran.out
    assert len(ran.out.splitlines()) == 4


def test_nothing_is_stored_and_an_empty_file_is_an_empty_list(
    configs: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVPLAN_STORE", str(tmp_path / "plans.sqlite"))
    ran = configs()
    assert (ran.code, ran.json) == (0, [])
    assert configs({}).code == 0
    assert not (tmp_path / "plans.sqlite").exists()


# ---- What is refused


@pytest.mark.behaviour("B10")
def test_tf32_is_decided_by_the_file(configs: Callable[..., Ran]) -> None:
    strict, free = configs({"op": "wgrad", "dtype": "float32"}, {"name": "tf32", "op": "wgrad", "dtype": "tf32"}).json
    with_note, without = refused_by_note(strict["configs"], "TENSOR_CORE").values()
    assert with_note == {"carries TENSOR_CORE and the policy does not allow TF32"}
    assert without == {""}
    assert {one["refused"] for one in without_errata(free["configs"])} == {""}
    assert [(one["engine"], one["knobs"]) for one in strict["configs"]] == [
        (one["engine"], one["knobs"]) for one in free["configs"]
    ]


@pytest.mark.behaviour("B8")
def test_deterministic_refuses_what_is_not(configs: Callable[..., Ran]) -> None:
    change = {"op": "wgrad", "dtype": "tf32"}
    (answer,) = configs(change, options=("--json", "--deterministic")).json
    with_note, without = refused_by_note(answer["configs"], "NONDETERMINISTIC").values()
    assert with_note == {"carries NONDETERMINISTIC and the policy asks for deterministic"}
    assert without == {""}


@pytest.mark.behaviour("B8")
def test_torchs_flag_decides_where_no_option_does(configs: Callable[..., Ran]) -> None:
    change = {"op": "wgrad", "dtype": "tf32"}
    torch.backends.cudnn.deterministic = True
    try:
        (follows,), (decided,) = (
            configs(change, options=("--json", *more)).json for more in ((), ("--no-deterministic",))
        )
    finally:
        torch.backends.cudnn.deterministic = False
    assert any("NONDETERMINISTIC" in one["refused"] for one in follows["configs"])
    assert not any(one["refused"] for one in without_errata(decided["configs"]))


@pytest.mark.behaviour("B12")
def test_a_workspace_limit_refuses_what_is_over_it(configs: Callable[..., Ran]) -> None:
    (answer,) = configs({"op": "wgrad"}, options=("--json", "--workspace-limit", "1MiB")).json
    found = without_errata(answer["configs"])
    over = [one for one in found if (one["workspace_bytes"] or 0) > 2**20]
    assert 0 < len(over) < len(found)
    for one in found:
        size = one["workspace_bytes"]
        assert one["refused"] == (f"workspace {size} bytes is over the limit of 1048576 bytes" if one in over else "")


@pytest.mark.behaviour("B11")
def test_errata_refuse_and_say_which_rule(
    configs: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(DENY_ALL))
    monkeypatch.setenv("CONVPLAN_ERRATA", str(mine))
    ran = configs({})
    assert ran.code == 0
    refused = [one["refused"] for one in ran.json[0]["configs"]]
    assert all(reason.startswith("errata rule ") for reason in refused)
    assert "errata rule none: all hang" in refused
    mine.write_text("{}")
    ran = configs({})
    assert ran.code == 1
    assert ran.json["error"]["type"] == "ErrataError"
    assert f"error: {mine}: " in ran.err


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ((), Policy(deterministic=False, allow_tf32=False, workspace_limit_bytes=2**40)),
        (("--deterministic", "--workspace-limit", "64KiB"), Policy(deterministic=True, workspace_limit_bytes=2**16)),
    ],
)
def test_the_filter_is_the_planners(configs: Callable[..., Ran], options: tuple[str, ...], policy: Policy) -> None:
    change = {"op": "wgrad", "dtype": "float32"}
    problem = on_gpu(change)
    engine = CudnnEngine(Target.absent(Device.from_properties(H200)))
    live = [Live(candidate, engine) for candidate in engine.configs(problem, "measure")]
    kept, rejected = filter_candidates(live, problem, policy.replace(allow_tf32=False))
    assert kept
    assert rejected
    found = configs(change, options=("--json", *options)).json[0]["configs"]
    reasons = [one["refused"] for one in found if one["refused"]]
    assert reasons == [evidence.reason for evidence in rejected]
    assert len(found) - len(reasons) == len(kept)


# ---- Problems without an answer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"n": 0}, "the problem is empty", id="empty"),
        pytest.param(
            {"output": {"strides": [1, 1, 1, 1]}}, "the output has strides (1, 1, 1, 1), supported: ", id="overlapping"
        ),
        pytest.param(
            {"input": {"alignment_bytes": 1}},
            "cudnnBackendFinalize(TENSOR) returned BAD_PARAM (2000): ",
            id="unaligned",
        ),
        pytest.param({"op": "dgrad", "dtype": "int8"}, "cuDNN proposes no configuration", id="no-engine"),
    ],
)
def test_a_problem_without_configurations_has_a_reason_and_stops_no_other(
    configs: Callable[..., Ran], change: dict[str, Any], reason: str
) -> None:
    ran = configs({"name": "odd", **change}, {})
    assert ran.code == 0
    odd, layer = ran.json
    assert odd["configs"] == []
    assert odd["reason"].startswith(reason)
    assert len(layer["configs"]) > 5
    assert layer["reason"] == ""


def test_without_a_configuration_for_any_problem_the_answer_is_no_with_each_reason(configs: Callable[..., Ran]) -> None:
    changes = {"name": "empty", "n": 0}, {"name": "odd", "op": "dgrad", "dtype": "int8"}
    reasons = ["the problem is empty", "cuDNN proposes no configuration"]
    ran = configs(*changes)
    assert ran.code == 1
    assert [one["name"] for one in ran.json] == ["empty", "odd"]
    assert [one["configs"] for one in ran.json] == [[], []]
    assert [one["reason"] for one in ran.json] == reasons
    text = configs(*changes, options=())
    assert text.code == 1
    assert [line for line in text.out.splitlines() if line.startswith("none: ")] == [f"none: {one}" for one in reasons]
    assert "2 problems: 0 configurations, 0 of them refused; 2 problems without any" in text.out


def test_configurations_that_are_all_refused_are_configurations(configs: Callable[..., Ran]) -> None:
    """What could not run is listed with the reason: that is what the command was asked."""
    change = {"dtype": "float8_e4m3fn", "layout": "contiguous"}  # all that cuDNN has for it needs workspace
    ran = configs(change, options=("--json", "--workspace-limit", "0"))
    assert ran.code == 0
    assert ran.json[0]["configs"]
    assert all(one["refused"] for one in ran.json[0]["configs"])


# ---- Errors


def test_without_a_gpu_it_says_how_to_describe_one(configs: Callable[..., Ran]) -> None:
    ran = configs({}, device=None)
    if torch.cuda.is_available():
        assert ran.code == 0
        assert len(ran.json[0]["configs"]) > 5
        return
    assert ran.code == 1
    assert ran.json["error"]["type"] == "EngineUnavailable"
    assert "engine 'cudnn' is not available: a GPU that torch can use" in ran.err
    assert "--device FILE.json, which `convplan doctor --device-properties --out FILE.json` writes" in ran.err
    assert configs({}, device=None, options=()).out == ""


def test_properties_of_another_cudnn_are_explained(
    configs: Callable[..., Ran], library: Library, tmp_path: Path
) -> None:
    properties = json.loads(H200.read_bytes())
    del properties["l2CacheSize"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**properties, "cudnnVersion": 90800}))
    ran = configs({}, device=other)
    assert ran.code == 1
    assert ran.json["error"]["type"] == "SpecError"
    assert f"were written by cuDNN 9.8.0, and cuDNN {library.version_text} refuses them" in ran.err
    assert "convplan doctor --device-properties" in ran.err


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not JSON"), ("[]", "found list, expected a JSON object"), ("{}", "deviceName is")]
)
def test_a_malformed_description_is_one_line(
    configs: Callable[..., Ran], tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(content)
    ran = configs({}, device=file, options=())
    assert (ran.code, ran.out) == (1, "")
    (line,) = ran.err.splitlines()
    assert line.startswith(f"error: {file}: {message}")


def test_a_malformed_problem_file_is_one_line(configs: Callable[..., Ran], tmp_path: Path) -> None:
    ran = configs({"dtype": "float8"})
    assert ran.code == 1
    assert ran.json["error"]["type"] == "PlanFileError"
    assert f'error: {tmp_path / "problems.json"}: problems[0].dtype: found "float8", expected one of' in ran.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param((), "--problems", id="no-problems"),
        pytest.param(("--problems", "nofile.json"), "nofile.json", id="no-problem-file"),
        pytest.param(("--problems", H200, "--device", "nofile.json"), "nofile.json", id="no-device-file"),
        pytest.param(
            ("--problems", H200, "--effort", "much"), "effort is 'much', expected one of instant, measure", id="effort"
        ),
        pytest.param(
            ("--problems", H200, "--workspace-limit", "much"), "found 'much', expected a number of bytes", id="limit"
        ),
    ],
)
def test_wrong_usage_ends_with_2(run: Run, argv: tuple[object, ...], message: str) -> None:
    ran = run("configs", *argv)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.complaint


def test_the_command_is_declared_without_loading_what_it_needs() -> None:
    code = """
import contextlib, io, sys
from convplan.cli import main
out = io.StringIO()
with contextlib.redirect_stdout(out):
    assert main(["--help"]) == 0
assert " configs " in out.getvalue()
loaded = [name for name in sys.modules if name in ("torch", "convplan.cli.gpus") or "cudnn" in name]
sys.exit(str(loaded) if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
