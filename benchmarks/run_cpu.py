"""Plans a suite of problems, times each against stock torch, and writes raw numbers and a table to `results/`.

    python benchmarks/run_cpu.py                                # suites/cpu.json -> results/cpu.json, results/cpu.md
    python benchmarks/run_cpu.py --suite FILE --name NAME --seconds 1

Run it on an idle machine: both sides use every core, and a second busy process doubles the time of both at random.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

HERE = Path(__file__).parent

# Have the C library keep freed memory, for both sides. By default it may give a result's pages back at every call and
# take them again at the next: on virtual machines that costs more than many a convolution, and strikes at random.
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, default=HERE / "suites" / "cpu.json")
    parser.add_argument("--name", default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="timed rounds of one problem")
    parser.add_argument("--budget-s", type=float, default=1.0, help="for racing the candidates of one problem")
    parser.add_argument("--only", default="", help="part of the problems' names")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if not KEEP_MEMORY.items() <= os.environ.items():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})

    with tempfile.TemporaryDirectory() as folder:
        os.environ["CONVPLAN_CACHE_DIR"] = folder  # a store of its own: everything is planned here and now
        run(options)


def run(options: argparse.Namespace) -> None:
    import convplan
    from convplan._bench import compare
    from convplan._problem_files import read_problems

    problems = [one for one in read_problems(options.suite) if options.only in one.name]
    comparisons, planning_s = [], {}
    for done, named in enumerate(problems, start=1):
        begin = time.perf_counter()
        convplan.tune([named.problem], policy=named.policy(convplan.Policy(budget_s=options.budget_s)))
        planning_s[named.name] = time.perf_counter() - begin
        found = compare(named, seconds=options.seconds)
        comparisons.append(found)
        write(comparisons, planning_s, options)  # a run that is cut short has lost nothing
        print(
            f"{done:3}/{len(problems)} {found.name:28} {found.stock.median_us:11.1f} us stock "
            f"{found.convplan.median_us:11.1f} us convplan {found.ratio:7.2f}  {found.chosen}  "
            f"(planned in {planning_s[named.name]:.1f} s)",
            file=sys.stderr,
            flush=True,
        )


def write(comparisons: list, planning_s: dict[str, float], options: argparse.Namespace) -> None:
    from convplan._bench import bench_report

    report = bench_report(comparisons)
    options.out.mkdir(exist_ok=True)
    raw = {"commit": commit(), "command": " ".join(["python", *sys.argv]), "planning_s": planning_s, "report": report}
    (options.out / f"{options.name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(raw), indent=1))
    (options.out / f"{options.name}.md").write_text(table(report, planning_s, options))


def table(report: object, planning_s: dict[str, float], options: argparse.Namespace) -> str:
    from convplan._bench import geometric_mean

    rows = sorted(report.comparisons, key=lambda c: (c.suite, c.name))
    lines = [
        f"# {options.name}: convplan against stock torch",
        "",
        f"{len(rows)} problems, {report.created}, commit {commit()}, {platform.platform()}.",
        *(f"Environment: {text}." for text in report.environments),
        f"Each side's median over interleaved, shuffled rounds of {options.seconds:g} s; ± is half the interquartile",
        "range. The C library keeps freed memory, for both sides (`KEEP_MEMORY` in `run_cpu.py` says why). A call is",
        "what a user writes: `F.conv*` or `aten::convolution_backward`, stock and under `convplan.enabled()`.",
        "",
        "| suite | problems | geometric mean | lowest | highest |",
        "|---|---|---|---|---|",
    ]
    for suite in [*sorted({row.suite for row in rows}), "all"]:
        ratios = [row.ratio for row in rows if suite in (row.suite, "all")]
        lines.append(
            f"| {suite} | {len(ratios)} | {geometric_mean(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"
        )
    losses = [f"{row.name} ({row.ratio:.3f}{', ' + SAME if same(row) else ''})" for row in rows if row.ratio < 0.97]
    alike = [row.ratio for row in rows if same(row)]
    lines += ["", f"Below 0.97: {', '.join(losses) or 'none'}."]
    if alike:
        lines += [
            f"In {len(alike)} problems the choice is {SAME}, so both sides run the same code but for a hit's cost:",
            f"their ratios, {min(alike):.2f} to {max(alike):.2f} with median {statistics.median(alike):.3f}, show that "
            "cost and the noise.",
        ]
    lines += [
        f"Planning: {sum(planning_s.values()):.0f} s in all, median {statistics.median(planning_s.values()):.2f} s "
        f"a problem, longest {max(planning_s.values()):.1f} s.",
        "",
        "| suite | problem | stock us | ± | convplan us | ± | stock / convplan | engine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.suite} | {row.name} | {row.stock.median_us:.0f} | {row.stock.spread_us:.0f} | "
        f"{row.convplan.median_us:.0f} | {row.convplan.spread_us:.0f} | {row.ratio:.2f} | {row.chosen} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


SAME = "torch's own kernel as given"


def same(row: object) -> bool:
    return row.chosen in (
        "aten[compute=0, layout=0, path=0]",
        "aten[compute=0, layout=0, path=0, via=0]",
    )


def commit() -> str:
    """Of what runs; where that is a copy without its history, whoever made it says which."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
