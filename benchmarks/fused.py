"""Convolutions with what follows them as one plan, against eager torch and against the convolution alone.

    python benchmarks/fused.py                          # -> $OUT/fused.json, fused.md (default results/fused)
    python benchmarks/fused.py --device cpu --suite FILE --limit-s 60

For every forward problem of a suite: stock torch's convolution and elementwise functions behind it, in place, benchmark
mode from the first call in a process of its own, against `convplan.conv*d` with `residual=` and `activation=`; and the
convolution alone under convplan. Both sides take part in shared rounds (`convplan bench` does the same for one
problem). Then a new process plans all of it again from the store, which must neither tune nor compile.

Problems of different dtypes take turns, so that each dtype has some before the time is over; what single steps add to
some of them comes after all rows. On an H200 14 problems with the steps of 3 take about 100 s.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from run_cpu import commit

HERE = Path(__file__).parent
GOALS = "at least 1.4 times as fast as eager torch, within 1.1 of the convolution alone, 6 s to plan"

WARM = """
import json, sys, time
begin = time.perf_counter()
import convplan
for line, tf32 in json.load(sys.stdin):
    convplan.plan(convplan.Problem.parse(line), convplan.Policy(allow_tf32=tf32)).build()
stats = convplan.stats()
names = ("tuned", "compiled", "from_store", "restored")
print(json.dumps({"seconds": time.perf_counter() - begin, **{name: stats[name] for name in names}}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, default=HERE / "suites" / "dev.json")
    parser.add_argument("--only-suite", default="dense")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--epilogues", default="residual+bias+relu", help="comma between them")
    parser.add_argument("--stages", type=int, default=0, help="of the suite's first problems, what each step adds")
    parser.add_argument("--seconds", type=float, default=0.3, help="rounds of one problem")
    parser.add_argument("--limit-s", type=float, default=105.0, help="stop, and write what there is")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", HERE / "results" / "fused")))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("CONVPLAN_CACHE_DIR", folder)
        run(options)


def run(options: argparse.Namespace) -> None:
    from convplan._bench_processes import Bench, BenchOptions
    from convplan._policy import Policy

    deadline = time.perf_counter() + options.limit_s
    raw: dict[str, Any] = {"commit": commit(), "rows": [], "stages": [], "failures": [], "not_reached": []}
    # Naming the kernels of a loss would start both processes anew, which takes as long as two problems.
    with Bench(Policy(), BenchOptions(seconds=options.seconds, kernels=False)) as bench:
        problems = forward_problems(options)
        for named in in_turns(problems):
            if time.perf_counter() > deadline:
                raw["not_reached"].append(named.name)
                continue
            alone, failures = bench.compare(named)
            raw["failures"] += plain(failures)
            for text in options.epilogues.split(","):
                fused = with_epilogue(bench, named, text, raw)
                if fused is not None:
                    raw["rows"].append(
                        {
                            "name": named.name,
                            "epilogue": text,
                            "allow_tf32": named.allow_tf32,
                            "fused": fused,
                            "alone": plain(alone),
                        }
                    )
            raw["environments"] = sorted(bench.environments)
            write(options, raw)
        for named in problems[: options.stages]:
            if time.perf_counter() > deadline:
                raw["not_reached"].append(f"the steps of {named.name}")
            else:
                steps_of(bench, named, options.epilogues.split(",")[0], raw)
                write(options, raw)
    lines = [(row["fused"]["problem"], row["allow_tf32"]) for row in raw["rows"]]
    done = subprocess.run(
        [sys.executable, "-c", WARM], input=json.dumps(lines), capture_output=True, text=True, check=False
    )
    raw["warm"] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-500:]}
    write(options, raw)
    print(table(raw))


def steps_of(bench: Any, named: Any, epilogue: str, raw: dict[str, Any]) -> None:
    """What each part of an epilogue adds; the convolution alone and the whole are in the rows already."""
    whole = next((row for row in raw["rows"] if (row["name"], row["epilogue"]) == (named.name, epilogue)), None)
    if whole is None:
        return
    parts = epilogue.split("+")
    steps = {"convolution": whole["alone"]}
    for place in range(len(parts) - 1):
        steps[f"+ {parts[place]}"] = with_epilogue(bench, named, "+".join(parts[: place + 1]), raw)
    raw["stages"].append({"name": named.name, "steps": {**steps, f"+ {parts[-1]}": whole["fused"]}})


def in_turns(problems: list[Any]) -> list[Any]:
    """The same problems, one of each dtype after the other; TF32 counts as a dtype."""
    queues: dict[tuple[str, bool], list[Any]] = {}
    for named in problems:
        tf32 = named.problem.dtype == "float32" and named.allow_tf32
        queues.setdefault((named.problem.dtype, tf32), []).append(named)
    rounds = itertools.zip_longest(*queues.values())
    return [named for one_round in rounds for named in one_round if named is not None]


def with_epilogue(bench: Any, named: Any, text: str, raw: dict[str, Any]) -> dict[str, Any] | None:
    """A problem compared with what follows it; what fails is noted in `raw`."""
    from convplan._epilogue import parse_epilogue

    problem = msgspec.structs.replace(named.problem, epilogue=parse_epilogue(text))
    fused, failures = bench.compare(msgspec.structs.replace(named, name=f"{named.name} +{text}", problem=problem))
    raw["failures"] += plain(failures)
    return None if fused is None else plain(fused)


def forward_problems(options: argparse.Namespace) -> list[Any]:
    from convplan._problem_files import read_problems

    found = [
        msgspec.structs.replace(named, problem=msgspec.structs.replace(named.problem, device=options.device))
        for named in read_problems(options.suite)
        if (named.op == "fprop" and named.suite in (options.only_suite, "")) or not options.only_suite
    ]
    return [as_torch_has_it(named) for named in found if named.op == "fprop"][:: options.every]


def as_torch_has_it(named: Any) -> Any:
    """On a GPU torch's results of float64 are contiguous, and with them the residual."""
    from convplan import TensorSpec

    problem = named.problem
    if problem.device != "cuda" or problem.dtype != "float64":
        return named
    y = TensorSpec.dense(problem.y.dims, "float64")
    return msgspec.structs.replace(named, problem=msgspec.structs.replace(problem, y=y))


def plain(value: Any) -> Any:
    return msgspec.to_builtins(value)


def write(options: argparse.Namespace, raw: dict[str, Any]) -> None:
    (options.out / "fused.json").write_text(json.dumps(raw, indent=1) + "\n")
    (options.out / "fused.md").write_text(table(raw))


def table(raw: dict[str, Any]) -> str:
    from convplan._bench import geometric_mean

    rows, ours = raw["rows"], "convplan"
    alone = [row["fused"][ours]["median_us"] / row["alone"][ours]["median_us"] for row in rows if row["alone"]]
    mean = geometric_mean(row["fused"]["ratio"] for row in rows)
    planned = [row["fused"]["planning_s"] or 0.0 for row in rows]
    lines = [
        "# Fused convolutions",
        "",
        f"Commit {raw['commit']}; {'; '.join(raw.get('environments', []))}.",
        f"To reach: {GOALS}.",
        "",
        f"{len(rows)} problems: geometric mean {mean:.3f} times as fast as eager torch, "
        f"{geometric_mean(alone):.3f} times as long as the convolution alone (worst {max(alone, default=0):.2f}); "
        f"planning took {max(planned, default=0):.1f} s at most.",
        f"Again in a new process, from the store: {raw.get('warm', 'not reached')}.",
        "",
        "| problem | eager torch us | ± | convplan us | ± | eager / convplan | convolution alone us | fused / alone "
        "| planning s | plan |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["fused"]["ratio"]):
        one, by_itself = row["fused"], row["alone"]
        alone_us = by_itself["convplan"]["median_us"] if by_itself else float("nan")
        lines.append(
            f"| {one['name']} | {one['stock']['median_us']:.1f} | {one['stock']['spread_us']:.1f} | "
            f"{one['convplan']['median_us']:.1f} | {one['convplan']['spread_us']:.1f} | {one['ratio']:.3f} | "
            f"{alone_us:.1f} | {one['convplan']['median_us'] / alone_us:.2f} | {one['planning_s'] or 0:.1f} | "
            f"{one['chosen']} |"
        )
    lines += [f"| {one['name']} | failed: {one['side']}: {one['error']} |" for one in raw["failures"]]
    lines += ["", f"Not reached: {', '.join(raw['not_reached'])}"] if raw["not_reached"] else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
