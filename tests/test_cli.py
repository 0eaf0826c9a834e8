"""The command, through its real entry point: what it prints where, its JSON keys, and its exit codes.

Results are on stdout, everything else on stderr. Times and keys vary and are stripped.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from helpers.fresh import fresh_process, registered

import convplan
from convplan import _environment, _runtime
from convplan._bench import BenchReport
from convplan._plan import Evidence, PlanRecord
from convplan._store import PlanStore
from convplan.cli import arguments, main
from convplan.cli import demo as demo_module
from convplan.engines import registry
from convplan.engines.base import YES, Built, Candidate, EngineConfig

QUICK = ("--engines", "aten", "--budget-s", "0.01")
ENTRY: dict[str, Any] = {
    "name": "layer",
    "op": "fprop",
    "n": 1,
    "c": 4,
    "k": 4,
    "spatial": [8, 8],
    "filter": [3, 3],
    "padding": [1, 1],
    "stride": [1, 1],
    "dilation": [1, 1],
    "groups": 1,
    "dtype": "float32",
}
UNTUNED = convplan.Policy(engines=("aten",), effort="instant")
LINE = "fprop float32 x=1x4x8x8 w=4x4x3x3 y=1x4x8x8 pad=1,1 cpu"  # the same problem
MODEL = """
import torch

class Unusable(Exception):
    pass

def step():
    layer = torch.nn.Conv2d(3, 4, 3)
    layer(torch.ones(1, 3, 8, 8)).sum().backward()

def fails():
    raise Unusable("no data")

number = 3
"""


class Ran(NamedTuple):
    """What one run of the command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """A process of its own, as far as plans are concerned."""
    with fresh_process():
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """A file of two problems."""
    file = tmp_path / "problems.json"
    entries = [ENTRY, {**ENTRY, "name": "gradient", "op": "wgrad"}]
    file.write_text(json.dumps({"comment": "", "problems": entries}))
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    return file


@pytest.fixture
def stored(run: Run, problems: Path) -> list[str]:
    """Keys of two stored plans."""
    ran = run("tune", "--problems", problems, *QUICK, "--json")
    assert ran.code == 0, ran.err
    _runtime.forget()
    return [problem["key"] for problem in ran.json["problems"]]


class Wrong:
    """An engine whose results are all zeros."""

    name = "wrong"
    by_default = False

    def supports(self, problem: convplan.Problem) -> object:
        return YES

    def configs(self, problem: convplan.Problem, effort: str) -> list[Candidate]:
        return [Candidate(EngineConfig(self.name))]

    def build(self, problem: convplan.Problem, config: EngineConfig, policy: convplan.Policy) -> Built:
        def zeros(first: torch.Tensor, second: torch.Tensor, bias: object, out: object) -> torch.Tensor:
            return torch.zeros(problem.output.dims)

        return Built(zeros, 0)


@pytest.fixture
def wrong_engine() -> Iterator[str]:
    with registered(Wrong()):
        yield Wrong.name


# ---- the frame


def test_help_lists_every_command(run: Run) -> None:
    ran = run("--help")
    assert ran.code == 0
    commands = ["doctor", "demo", "tune", "replay-check", "bench", "configs", "list", "explain", "verify", "export"]
    commands += ["import", "check", "clear", "errata"]
    assert [name for name in commands if f" {name} " not in ran.out] == []
    assert run("--version").out == f"convplan {convplan.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param((), id="nothing"),
        pytest.param(("plant",), id="unknown-command"),
        pytest.param(("list", "--colour"), id="unknown-option"),
        pytest.param(("tune",), id="nothing-to-tune"),
        pytest.param(("tune", "nofile.py:step"), id="no-file"),
        pytest.param(("tune", "step"), id="no-colon"),
        pytest.param(("tune", "--problems", "nofile.json"), id="no-problem-file"),
        pytest.param(("bench",), id="nothing-to-time"),
        pytest.param(("import", "nofile.json"), id="nothing-to-import"),
        pytest.param(("bench", "--problem", "fprop of something"), id="no-problem"),
        pytest.param(("tune", "--problem", LINE, "--problem", LINE), id="the-same-problem-twice"),
        pytest.param(("tune", "nofile.py:step", "--problem", LINE), id="callable-and-problem"),
        pytest.param(("explain",), id="no-key"),
        pytest.param(("explain", "0a", "--problem", LINE), id="key-and-problem"),
        pytest.param(("demo", "opera"), id="unknown-workload"),
        pytest.param(("doctor", "--out", "gpu.json"), id="out-of-nothing"),
        pytest.param(("clear",), id="neither-yes-nor-dry-run"),
        pytest.param(("clear", "--yes", "--dry-run"), id="both-yes-and-dry-run"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_so_on_stderr(run: Run, argv: tuple[str, ...]) -> None:
    ran = run(*argv)
    assert ran.code == 2
    assert "Traceback" not in ran.err
    if argv:
        assert ran.out == ""
        assert "Error" in ran.err


def test_the_command_and_the_module_are_the_same_and_load_no_torch() -> None:
    code = "import sys; from convplan.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    as_module = subprocess.run(
        [sys.executable, "-m", "convplan", "--help"], capture_output=True, text=True, check=False
    )
    assert (as_module.returncode, as_module.stdout) == (0, done.stdout)


# ---- a problem as logs and errors write it


def test_a_line_of_a_log_is_tuned_looked_up_explained_and_timed(
    run: Run, caplog: pytest.LogCaptureFixture, problems: Path
) -> None:
    with caplog.at_level(logging.INFO, "convplan"):
        convplan.plan(convplan.Problem.dense("fprop", (1, 4, 8, 8), (4, 4, 3, 3), padding=1), UNTUNED)
    (line,) = set(re.findall(r"fprop \S+ x=.*? cpu", caplog.text))
    assert line == LINE
    assert run("replay-check", "--problem", line, "--engines", "aten").code == 1
    tuned = run("tune", "--problem", line, *QUICK, "--json").json["problems"]
    assert [(one["name"], one["problem"], one["error"]) for one in tuned] == [(line, line, "")]
    assert run("replay-check", "--problem", line, "--engines", "aten").code == 0
    explained = run("explain", "--problem", line, "--json").json
    assert (explained["key"], explained["record"]["effort"]) == (tuned[0]["key"], "measure")
    timed = run("bench", "--problem", line, *QUICK, "--rounds", 2, "--json").json["comparisons"]
    assert [(one["name"], one["problem"], one["key"]) for one in timed] == [(line, line, tuned[0]["key"])]
    both = run("tune", "--problems", problems, "--problem", line, *QUICK, "--json").json["problems"]
    assert [one["name"] for one in both] == ["layer", "gradient", line]


def test_explain_by_problem_wants_one_stored_plan(run: Run) -> None:
    ran = run("explain", "--problem", LINE)
    assert (ran.code, ran.out) == (1, "")
    assert f"no plan is stored for {LINE}; `convplan tune` makes one" in ran.err
    for engine in ("aten", "matmul"):
        assert run("tune", "--problem", LINE, "--engines", engine, "--budget-s", "0.01").code == 0
    ran = run("explain", "--problem", LINE)
    assert ran.code == 1
    keys = run("list", "--json").json["plans"]
    assert "2 plans are stored" in ran.err
    assert all(plan["key"] in ran.err for plan in keys)


# ---- tune


def test_tune_plans_a_file_once_and_then_finds_it_stored(run: Run, problems: Path) -> None:
    first = run("tune", "--problems", problems, *QUICK)
    assert first.code == 0
    heading, layer, gradient, blank, summary = first.out.splitlines()
    assert heading.split() == ["problem", "chosen", "time", "planning", "key", "note"]
    assert layer.startswith("layer ")
    assert "aten[" in layer
    assert gradient.startswith("gradient ")
    assert blank == ""
    assert summary.startswith("2 problems: 2 tuned, 0 from the store, in ")
    assert first.err.splitlines() == ["[1/2] layer", "[2/2] gradient"], "progress is for stderr"

    _runtime.forget()
    assert "2 problems: 0 tuned, 2 from the store" in run("tune", "--problems", problems, *QUICK).out
    assert "2 problems: 2 tuned" in run("tune", "--problems", problems, *QUICK, "--force").out


def test_tune_json_has_stable_keys(run: Run, problems: Path) -> None:
    found = run("tune", "--problems", problems, *QUICK, "--json").json
    assert set(found) == {"problems", "total", "planned", "tuned", "from_store", "failed", "seconds"}
    assert (found["total"], found["tuned"], found["failed"]) == (2, 2, 0)
    first = found["problems"][0]
    assert set(first) == {"name", "problem", "error", "key", "chosen", "effort", "median_us", "planning_s", "curve"}
    assert (first["name"], first["effort"], len(first["key"])) == ("layer", "measure", 32)


@pytest.mark.behaviour("C6")
def test_replay_check_answers_no_until_everything_is_stored(run: Run, problems: Path) -> None:
    before = run("replay-check", "--problems", problems, "--json")
    assert before.code == 1
    assert (before.json["missing"], before.json["found"]) == (before.json["total"], 0)
    assert {one["miss"] for one in before.json["problems"]} == {"not in the store"}
    assert run("list", "--json").json["plans"] == []  # it planned nothing
    assert run("tune", "--problems", problems).code == 0
    convplan._runtime.forget()
    after = run("replay-check", "--problems", problems, "--json")
    assert (after.code, after.json["missing"]) == (0, 0)
    assert all(one["key"] and one["chosen"] and one["effort"] == "measure" for one in after.json["problems"])
    other = run("replay-check", "--problems", problems, "--deterministic")  # another policy, other plans
    assert other.code == 1
    assert "not in the store" in other.out
    assert "0 have a plan" in other.out


def test_tune_runs_a_callable_and_counts_its_gradients(run: Run, model: Path) -> None:
    ran = run("tune", f"{model}:step", *QUICK, "--json")
    assert ran.code == 0, ran.err
    assert {problem["problem"].split()[0] for problem in ran.json["problems"]} >= {"fprop+bias", "wgrad"}


def test_tune_names_what_a_callable_raised_and_where(run: Run, model: Path) -> None:
    ran = run("tune", f"{model}:fails", *QUICK, "--json")
    assert ran.code == 1
    assert ran.json["error"]["type"] == "Unusable"
    line = MODEL.splitlines().index('    raise Unusable("no data")') + 1
    assert ran.err == f"error: {model}:fails raised Unusable: no data ({model}:{line} in fails)\n"


@pytest.mark.parametrize(
    ("source", "raised"),
    [("1 / 0", "ZeroDivisionError"), ("def broken(:", "SyntaxError"), ("raise SystemExit(2)", "SystemExit")],
)
def test_tune_names_what_a_file_raised(run: Run, tmp_path: Path, source: str, raised: str) -> None:
    file = tmp_path / "raises.py"
    file.write_text(source)
    ran = run("tune", f"{file}:step")
    assert (ran.code, ran.out) == (1, "")
    assert f"raised {raised}" in ran.err
    assert f"{file}:1" in ran.err


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "nothing of that name"), ("number", "number is int, expected a callable")]
)
def test_a_callable_that_is_not_there_is_wrong_usage(run: Run, model: Path, name: str, message: str) -> None:
    ran = run("tune", f"{model}:{name}")
    assert ran.code == 2
    assert message in " ".join(ran.err.replace("│", " ").split())


def test_a_malformed_problem_file_is_one_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({"problems": [ENTRY, {**ENTRY, "name": "b", "dtype": "float8"}]}))
    ran = run("tune", "--problems", file)
    assert (ran.code, ran.out) == (1, "")
    (line,) = ran.err.splitlines()
    assert line.startswith(f'error: {file}: problems[1].dtype: found "float8", expected one of')
    as_json = run("bench", "--problems", file, "--json")
    assert as_json.code == 1
    assert as_json.json["error"]["type"] == "PlanFileError"


def test_a_problem_that_nothing_runs_does_not_stop_the_others(run: Run, problems: Path, wrong_engine: str) -> None:
    ran = run("tune", "--problems", problems, "--engines", wrong_engine, "--json")
    assert ran.code == 1
    assert ran.json["failed"] == 2
    assert all("no engine runs this problem" in problem["error"] for problem in ran.json["problems"])
    assert "2 failed" in run("tune", "--problems", problems, "--engines", wrong_engine).out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--engines", "atem", "unknown engine 'atem'; registered engines: cudnn, aten"),
        ("--budget-s", "0", "budget_s is 0.0"),
        ("--workspace-limit", "64 potatoes", "found '64 potatoes', expected a number of bytes"),
        ("--workspace-limit", "-1", "expected a number of bytes"),
    ],
)
def test_a_wrong_policy_is_wrong_usage(run: Run, problems: Path, option: str, value: str, message: str) -> None:
    ran = run("tune", "--problems", problems, option, value)
    assert (ran.code, ran.out) == (2, "")
    assert message in " ".join(ran.err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("1048576", 1_048_576), ("64MiB", 64 * 2**20), ("1.5 GB", 1_500_000_000), ("2k", 2_048), ("7 b", 7)],
)
def test_sizes_may_have_units(text: str, count: int) -> None:
    assert arguments.byte_count(text) == count


def test_policy_options_reach_the_policy() -> None:
    found = arguments.make_policy(deterministic=True, engines="fft,aten", budget_s=0.5, workspace_limit_bytes=0)
    expected = convplan.Policy(deterministic=True, engines=("fft", "aten"), budget_s=0.5, workspace_limit_bytes=0)
    assert found == expected


# ---- bench


def test_bench_times_each_problem_and_writes_raw_samples(run: Run, problems: Path, tmp_path: Path) -> None:
    out = tmp_path / "raw.json"
    ran = run("bench", "--problems", problems, *QUICK, "--rounds", 3, "--out", out)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].split() == ["problem", "chosen", "stock", "convplan", "ratio", "note"]
    assert [line.split()[0] for line in lines[1:3]] == ["layer", "gradient"]
    assert lines[4].startswith("geometric mean ")
    report = msgspec.json.decode(out.read_bytes(), type=BenchReport)
    assert [len(one.stock.samples_us) for one in report.comparisons] == [3, 3]
    assert all(one.from_plan for one in report.comparisons)
    assert list(report.losses) == [line.split()[1] for line in lines if line.startswith("loss: ")]


def test_bench_json_has_stable_keys(run: Run, problems: Path) -> None:
    found = run("bench", "--problems", problems, *QUICK, "--rounds", 1, "--json").json
    assert set(found) == set(BenchReport.__struct_fields__)
    assert found["failures"] == []
    assert len(found["comparisons"]) == 2


def test_bench_answers_no_when_a_problem_cannot_be_planned(run: Run, problems: Path) -> None:
    ran = run("bench", "--suite", problems, "--engines", "cudnn", "--rounds", 1)
    assert ran.code == 1
    assert "failed: layer: convplan: NoPlan: no engine runs this problem within the policy" in ran.out
    assert "over 0 problems" in ran.out


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        pytest.param("--stock-benchmark", "maybe", "is 'maybe', expected on or off", id="benchmark"),
        pytest.param("--effort", "much", "effort is 'much'", id="effort"),
        pytest.param("--regret", "-1", "greater than or equal to 0", id="regret"),
    ],
)
def test_bench_refuses_options_that_mean_nothing(
    run: Run, problems: Path, option: str, value: str, complaint: str
) -> None:
    ran = run("bench", "--suite", problems, option, value)
    assert (ran.code, ran.out) == (2, "")
    assert complaint in " ".join(ran.err.replace("│", " ").split())


def test_bench_names_a_file_it_cannot_write(run: Run, problems: Path, tmp_path: Path) -> None:
    ran = run("bench", "--problems", problems, *QUICK, "--rounds", 1, "--out", tmp_path / "no" / "raw.json")
    assert (ran.code, ran.out) == (1, "")
    assert "raw.json: cannot be written" in ran.err


# ---- stored plans


def test_list_shows_what_is_stored(run: Run, stored: list[str]) -> None:
    ran = run("list")
    assert (ran.code, ran.err) == (0, "")
    *rows, blank, summary = ran.out.splitlines()
    assert rows[0].split() == ["key", "problem", "chosen", "time", "effort", "environment", "created"]
    assert sorted(row.split()[0] for row in rows[1:]) == sorted(key[:12] for key in stored)
    assert all(" here " in row for row in rows[1:])
    assert blank == ""
    assert summary == f"2 plans in {PlanStore.default().location}"
    found = run("list", "--json").json
    assert sorted(plan["key"] for plan in found["plans"]) == sorted(stored)
    assert {plan["environment"] for plan in found["plans"]} == {"here"}
    assert run("list", "--engine", "fft", "--json").json["plans"] == []
    assert len(run("list", "--key", stored[0], "--json").json["plans"]) == 1


def test_list_works_where_torch_does_not(run: Run, stored: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = run("list", "--json")
    assert found.code == 0
    assert {plan["environment"] for plan in found.json["plans"]} == {"unknown"}


def test_explain_accepts_the_beginning_of_a_key(run: Run, stored: list[str]) -> None:
    ran = run("explain", stored[0][:12])
    assert (ran.code, ran.err) == (0, "")
    record = PlanStore.default().get(stored[0])
    assert record is not None
    assert ran.out == record.explain() + "\n"
    found = run("explain", stored[0].upper(), "--json").json
    assert found["key"] == stored[0]
    assert msgspec.convert(found["record"], PlanRecord) == record
    assert found["hardware_limit"]["us"] == max(found["hardware_limit"][name] for name in ("flops_us", "bytes_us"))
    stock = [e.median_us for e in (*record.ranking, *record.rejected) if e.stock]
    assert stock
    assert [one["median_us"] for one in found["stock_torch"]] == stock
    assert sum(len(group["candidates"]) for group in found["rejected"]) == len(record.rejected)
    assert run("explain", stored[0], "--all").out == record.explain(every_rejection=True) + "\n"


def test_explain_wants_exactly_one_plan(run: Run, stored: list[str]) -> None:
    missing = run("explain", "zz")
    assert (missing.code, missing.out) == (1, "")
    assert "no key begins with 'zz'" in missing.err
    several = run("explain", "", "--json")
    assert several.code == 1
    assert "2 keys begin with ''" in several.json["error"]["message"]


def test_verify_checks_the_plans_of_this_environment(run: Run, stored: list[str]) -> None:
    ran = run("verify")
    assert ran.code == 0, ran.out
    assert ran.out.splitlines()[-1] == "2 verified, 0 failed"
    assert ran.out.count("ok (") == 2
    found = run("verify", "--every-rank", "--json").json
    assert set(found) == {"location", "plans", "failed", "not_verified"}
    with PlanStore.default() as store:
        ranked = sum(len(row.record.ranking) for row in store.rows() if row.record is not None)
    assert len(found["plans"]) == ranked >= 2
    assert all(plan["ok"] and 0 <= plan["error"] <= 1 for plan in found["plans"])


def test_verify_answers_no_for_a_plan_that_is_wrong_now(run: Run, stored: list[str], wrong_engine: str) -> None:
    good = PlanStore.default().get(stored[0])
    assert good is not None
    policy = good.policy.replace(engines=(wrong_engine,))
    ranking = (Evidence(config=EngineConfig(wrong_engine)),)
    with PlanStore.default() as store:
        store.put(msgspec.structs.replace(good, policy=policy, ranking=ranking))
    ran = run("verify", "--json")
    assert ran.code == 1
    (wrong,) = [plan for plan in ran.json["plans"] if not plan["ok"]]
    assert (wrong["config"], wrong["error"]) == (wrong_engine, None)
    assert wrong["reason"]
    assert "3 verified, 1 failed" in run("verify").out


def test_verify_leaves_other_environments_alone(run: Run, stored: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = _environment.Environment("cpu", (("cpu", "another"),))
    monkeypatch.setattr("convplan.cli.stored.current_environments", lambda: (elsewhere,))
    ran = run("verify")
    assert (ran.code, ran.out) == (0, "0 verified, 0 failed, 2 of other environments or unusable\n")


def test_plans_go_out_to_a_file_and_come_back(run: Run, stored: list[str], tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    assert run("export", file).out == f"2 plans written to {file}\n"
    assert run("clear", "--dry-run").out == "2 plans would be deleted\n"
    assert len(run("list", "--json").json["plans"]) == 2, "a dry run deletes nothing"
    assert run("clear", "--yes", "--json").json == {"removed": 2, "left": 0, "dry_run": False}
    assert run("list").out.startswith("0 plans in ")
    assert run("import", file, "--dry-run", "--json").json["added"] == 2
    assert run("list", "--json").json["plans"] == []
    ran = run("import", file)
    assert (ran.code, ran.out) == (0, "added 2, replaced 0, kept 0, refused 0; 0 belong to other environments\n")
    assert run("import", file, "--json").json["kept"] == 2
    ran = run("check")
    assert (ran.code, ran.err) == (0, "")
    assert "0 rows cannot be used" in ran.out
    assert run("check", "--json").json["ok"] is True


def test_import_answers_no_when_a_plan_is_refused(run: Run, stored: list[str], tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    run("export", file)
    changed = json.loads(file.read_bytes())
    changed["plans"][0]["ranking"] = []
    file.write_text(json.dumps(changed))
    assert "was altered after it was written" in run("import", file).err
    del changed["content_sha256"]
    file.write_text(json.dumps(changed))
    ran = run("import", file, "--json")
    assert ran.code == 1
    assert [refused["plan"] for refused in ran.json["refused"]] == ["plans[0]"]


def test_a_file_of_something_else_is_not_imported(run: Run, problems: Path) -> None:
    ran = run("import", problems)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"error: {problems}: ")


def test_clear_deletes_only_what_the_options_name(run: Run, stored: list[str]) -> None:
    assert run("clear", "--yes", "--engine", "fft").out == "0 plans deleted\n"
    assert run("clear", "--yes", "--other-environments").out == "0 plans deleted\n"
    assert run("clear", "--yes", "--key", stored[0]).out == "1 plans deleted\n"
    assert [plan["key"] for plan in run("list", "--json").json["plans"]] == [stored[1]]


@pytest.mark.parametrize("command", ["list", "verify", "check", "clear --yes", "explain 0", "export out.json"])
def test_a_store_that_cannot_be_opened_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("CONVPLAN_STORE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ran = run(*command.split(), "--json")
    assert ran.code == 1
    assert ran.json["error"]["type"] == "StoreError"
    assert ran.err.splitlines() == [f"error: {ran.json['error']['message']}"]
    assert "directory" in ran.err


# ---- doctor


def test_doctor_reports_on_a_healthy_installation(run: Run, stored: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVPLAN_STORE", str(Path(os.environ["CONVPLAN_CACHE_DIR"]) / "plans.sqlite"))
    ran = run("doctor", "--json")
    assert ran.code == 0
    assert ran.json["ok"] is True
    findings = ran.json["findings"]
    assert {"section", "name", "value", "status", "fix"} == set(findings[0])
    found = {(finding["section"], finding["name"]): finding["value"] for finding in findings}
    assert found["versions", "torch"] == torch.__version__
    assert found["processor", "threads"] == str(torch.get_num_threads())
    assert found["store", "plans"] == "2"
    assert found["store", "writable"] == "yes"
    assert found["engines", "aten"].startswith("3x3, float32, cpu: fprop yes")
    assert ("environment variables", "CONVPLAN_STORE") in found
    assert "Everything that convplan needs is there." in run("doctor").out


def test_doctor_makes_no_store_and_hides_passwords(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVPLAN_CACHE_DIR", str(tmp_path / "new"))
    ran = run("doctor")
    assert ran.code == 0
    assert "none yet: the store is made when the first plan is stored" in ran.out
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("CONVPLAN_STORE", "postgresql://me:secret@nowhere.invalid/plans")
    assert "secret" not in run("doctor").out


def test_doctor_says_no_when_the_store_is_damaged(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "plans.sqlite"
    damaged.write_bytes(b"this is no database" * 100)
    monkeypatch.setenv("CONVPLAN_STORE", str(damaged))
    ran = run("doctor")
    assert ran.code == 1
    assert "readable: no: " in ran.out
    assert "To fix: move the file away" in ran.out


def test_doctor_survives_engines_that_cannot_be_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[str, ...]:
        raise ImportError("no such engine")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "names", broken)
        ran = run("doctor")
    assert ran.code == 1
    assert "engines: cannot be loaded: ImportError: no such engine" in ran.out


def test_doctor_survives_a_probe_that_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from convplan.cli import doctor

    def fails(_: object) -> Iterator[doctor.Finding]:
        yield doctor.Finding(section="odd", name="first", value="seen")
        raise OSError("no such sensor")

    monkeypatch.setattr(doctor, "PROBES", {"odd": fails, "versions": doctor.PROBES["versions"]})
    findings = {finding["name"]: finding for finding in run("doctor", "--json").json["findings"]}
    assert findings["first"]["value"] == "seen"
    assert findings["odd"]["value"] == "could not be found out: OSError: no such sensor"
    assert findings["odd"]["status"] == "warning"
    assert "python" in findings


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        pytest.param("raise ImportError('libtorch_cpu.so: wrong ELF class')", "wrong ELF class", id="import-error"),
        pytest.param("raise OSError('libc10.so: cannot open shared object')", "cannot open shared", id="os-error"),
        pytest.param("import os; os.abort()", "ends the process with SIGABRT", id="killed"),
        pytest.param("import sys; sys.exit(3)", "ends the process with exit code 3", id="exits"),
    ],
)
def test_doctor_works_when_torch_is_broken(tmp_path: Path, source: str, reason: str) -> None:
    fake = tmp_path / "fake" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(source)
    path = os.pathsep.join([str(fake.parent), str(Path(convplan.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "CONVPLAN_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "convplan", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    findings = {(finding["section"], finding["name"]): finding for finding in json.loads(done.stdout)["findings"]}
    torch_finding = findings["versions", "torch"]
    assert torch_finding["status"] == "problem"
    assert reason in torch_finding["value"]
    assert "pip install" in torch_finding["fix"]
    assert findings["store", "plans"]["status"] == "ok", "what does not need torch is still found out"
    assert findings["engines", "engines"]["value"] == "not known without torch"


def test_doctor_works_when_torch_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ran = run("doctor")
    assert ran.code == 1
    assert "Something that convplan needs is missing:" in ran.out
    assert "  torch: " in ran.out


def _cudnn_section(ran: Ran) -> dict[str, Any]:
    return {finding["name"]: finding for finding in ran.json["findings"] if finding["section"] == "cudnn"}


@pytest.mark.behaviour("B32")
def test_doctor_says_which_cudnn_is_used_and_with_what(run: Run) -> None:
    ran = run("doctor", "--json")
    assert ran.code == 0
    found = _cudnn_section(ran)
    if found["used"]["value"].startswith("none: "):
        pytest.skip("cuDNN is not installed")
    assert re.match(r"9\.\d+\.\d+ from (torch|wheel|system): /.*libcudnn\.so\.9", found["used"]["value"])
    for name in ("graph", "heuristic", "engines_precompiled"):
        assert found[f"libcudnn_{name}.so.9"]["value"].startswith("/")
    assert any(name.startswith("libnvrtc.so.") for name in found)
    if torch.version.cuda is None:
        assert {finding["status"] for finding in found.values()} == {"ok"}, "what a CPU does not need is no warning"


@pytest.mark.behaviour("B32")
def test_doctor_says_what_it_found_when_that_cannot_be_used(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from convplan.cli import doctor
    from convplan.engines.cudnn import library

    (tmp_path / "libcudnn.so.8").write_text("old")
    places = f"lambda: (library.Place('system', __import__('pathlib').Path({str(tmp_path)!r})),)"
    patched = "from convplan.engines.cudnn import library\nlibrary._resident = lambda name: None\n"
    patched += f"library.places = {places}\n"
    monkeypatch.setattr(library, "places", lambda: (library.Place("system", tmp_path),))
    monkeypatch.setattr(doctor, "_LOAD_CUDNN", patched + doctor._LOAD_CUDNN)
    ran = run("doctor", "--json")
    assert ran.code == 0, "convplan works without"
    found = _cudnn_section(ran)
    assert (
        found["in system"]["value"]
        == f"{tmp_path}: found libcudnn.so.8, expected libcudnn.so.9, version 9.1.0 or newer"
    )
    assert found["in system"]["status"] == "warning"
    assert found["used"]["value"].startswith("none: cuDNN 9.1.0 or newer (libcudnn.so.9), found: ")
    assert found["used"]["status"] == "warning"
    assert "pip install nvidia-cudnn" in found["used"]["fix"]


def test_doctor_survives_a_cudnn_that_kills(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from convplan.cli import doctor

    monkeypatch.setattr(doctor, "_LOAD_CUDNN", "import os\nos.abort()")
    ran = run("doctor", "--json")
    assert ran.code == 0
    assert _cudnn_section(ran)["used"]["value"] == "none: loading it ends the process with SIGABRT"


@pytest.mark.behaviour("C7")
def test_doctor_writes_the_properties_of_a_gpu_or_says_why_not(run: Run, tmp_path: Path) -> None:
    from convplan.engines.cudnn.device import Device

    file = tmp_path / "gpu.json"
    ran = run("doctor", "--device-properties", "--out", str(file))
    if torch.cuda.is_available():
        assert ran.code == 0
        device = Device.from_properties(file)
        assert ran.out.startswith(f"{file}: {device.name}, compute capability {device.compute_capability}, as cuDNN 9.")
        assert Device.from_properties(run("doctor", "--device-properties").out.strip().encode()) == device
        assert run("doctor", "--device-properties", "--out", str(tmp_path / "no" / "gpu.json")).code == 1
    else:
        assert ran.code == 1
        assert ran.out == ""
        assert "error: engine 'cudnn' is not available: an NVIDIA GPU" in ran.err
        assert not file.exists()
        error = run("doctor", "--device-properties", "--json").json["error"]
        assert error["type"] == "EngineUnavailable"


# ---- demo


def outcome(tuned: int, from_store: int) -> demo_module.Outcome:
    layer = demo_module.Layer(
        problem="fprop float32", key="0" * 32, uses=3, chosen="aten", convplan_us=50.0, stock_us=100.0
    )
    total = demo_module.Total(what="forward", convplan_ms=10.0, stock_ms=15.0, rounds=5)
    return demo_module.Outcome(
        workload="resnet",
        title="ResNet-50",
        layers=(layer,),
        totals=(total,),
        planning_s=0.25,
        tuned=tuned,
        from_store=from_store,
    )


@pytest.mark.parametrize(
    ("tuned", "from_store", "summary"),
    [
        (1, 0, "1 problems tuned, 0 read from the store. Planning took 250.0 ms"),
        (0, 1, "Every plan came from the store: 1 read, 0 tuned. Planning took 250.0 ms."),
    ],
)
def test_demo_shows_layers_totals_and_what_planning_did(
    run: Run, monkeypatch: pytest.MonkeyPatch, tuned: int, from_store: int, summary: str
) -> None:
    monkeypatch.setattr(demo_module, "run_demo", lambda names, **_: [outcome(tuned, from_store)])
    ran = run("demo", "resnet")
    assert ran.code == 0
    title, heading, layer, total, _, last = ran.out.splitlines()
    assert title == "ResNet-50"
    assert heading.split() == ["uses", "problem", "chosen", "convplan", "stock", "ratio"]
    assert " ".join(layer.split()) == "3x fprop float32 aten 50.0 us 100.0 us 2.00"
    assert total == "forward: 10.0 ms, stock torch 15.0 ms, ratio 1.50 (median of 5)"
    assert last.startswith(summary)
    assert set(run("demo", "--json").json) == {"workloads", "tuned", "from_store", "planning_s"}


def test_demo_names_the_extra_it_needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    ran = run("demo", "resnet", "--json")
    assert ran.code == 1
    assert ran.json["error"]["type"] == "ModuleNotFoundError"
    assert "pip install 'convplan[demo]'" in ran.err
