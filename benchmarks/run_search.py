"""The figures of the search, each part under a time limit of its own: raw JSON and one table.

    python benchmarks/run_search.py --parts p1,p3,p5,p6,shapes            # suites/dev.json -> $OUT/search.json, .md
    python benchmarks/run_search.py --parts exhaustive --device-index 3 --shard 3/8 --name search-3

    p1          the suite's dense problems against stock torch, each side in a process of its own
    p3          regret: dense problems tuned 8 times anew, and all choices raced against the best candidates
    p5          a ResNet-50's first training step from the start of a fresh process: plans replayed, against stock torch
    p6          seconds of planning a problem
    shapes      300 image sizes through a ResNet-50, against stock torch with benchmark off, and the choices' regret
    exhaustive  what searching all knobs finds beyond effort `measure`, and how soon

Every part runs in a process of its own with a fresh store, and writes what it has after each problem, so that a part
that is cut short has lost nothing. `--device cpu` runs everything small.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = {"p1": 150.0, "p3": 120.0, "p5": 150.0, "p6": 60.0, "shapes": 120.0, "exhaustive": 300.0}
GRACE_S = 90.0  # beyond its limit, for what a part is in the middle of
REPEATS = 8
RUNS = 5  # fresh processes of each side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, default=HERE / "suites" / "dev.json")
    parser.add_argument("--parts", default="p1,p3,p5,p6,shapes")
    parser.add_argument("--only-suite", default="dense", help="the suite's problems of this `suite`; empty: all")
    parser.add_argument("--only", default="", help="part of the problems' names")
    parser.add_argument("--every", type=int, default=6, help="p3 and exhaustive: every so manieth problem")
    parser.add_argument("--shard", default="0/1", help="I/N: of those, only each Nth from the Ith on")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--device-index", type=int, default=None, help="the only GPU that may be seen")
    parser.add_argument("--name", default="search")
    parser.add_argument(
        "--merge", default="", help="run nothing: put the files of these names together, then delete them"
    )
    parser.add_argument("--seconds-each", type=float, default=1.5, help="rounds of one problem, in p1 and p3")
    parser.add_argument("--search-s", type=float, default=60.0, help="exhaustive: seconds of one search")
    parser.add_argument("--budget-s", type=float, default=None, help="Policy.budget_s")
    parser.add_argument("--tuning-limit-s", type=float, default=None, help="shapes: Policy.tuning_limit_s")
    parser.add_argument("--compile", action="store_true", help="p1: torch.compile, too")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="p3: tunings of a problem")
    parser.add_argument("--runs", type=int, default=RUNS, help="p5 and shapes: fresh processes of each side")
    parser.add_argument("--run-part", choices=PARTS, help=argparse.SUPPRESS)
    for part, seconds in SECONDS.items():
        parser.add_argument(f"--seconds-{part}", type=float, default=seconds)
    options = parser.parse_args()
    options.out = Path(os.environ.get("OUT", HERE / "results" / "search"))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.run_part:
        run_part(options, options.run_part)
        return
    if options.merge:
        merge(options, options.merge.split(","))
        return
    parts = options.parts.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"--parts has {', '.join(unknown)}, expected any of {', '.join(PARTS)}")
    if options.device_index is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(options.device_index)
    ended = {part: in_its_own_process(options, part) for part in parts}
    finish(options, ended)
    if any(ended.values()):
        raise SystemExit(1)


# ---- running


def in_its_own_process(options: argparse.Namespace, part: str) -> str:
    """Run a part; how it ended where that was not well."""
    part_file(options, part).unlink(missing_ok=True)
    limit_s = getattr(options, f"seconds_{part}") + GRACE_S
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "CONVPLAN_CACHE_DIR": folder}
        environ.pop("CONVPLAN_STORE", None)
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--run-part", part]
        process = subprocess.Popen(command, env=environ, start_new_session=True)
        try:
            status = process.wait(limit_s)
            ended = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit_s:.0f} s"
        finally:  # with everything that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(f"{part}: {time.perf_counter() - begin:.0f} s {ended}", flush=True)
    return ended


def run_part(options: argparse.Namespace, part: str) -> None:
    end = time.perf_counter() + getattr(options, f"seconds_{part}")
    raw: dict[str, Any] = {"machine": machine(options.device)}
    for found in PARTS[part](options, lambda: time.perf_counter() >= end):
        raw.update(found)
        partial = part_file(options, part).with_suffix(".partial")
        partial.write_text(json.dumps(raw) + "\n")
        partial.replace(part_file(options, part))


def part_file(options: argparse.Namespace, part: str) -> Path:
    return options.out / f".{options.name}.{part}.json"


def finish(options: argparse.Namespace, ended: dict[str, str]) -> None:
    """Put the parts' files together into one, and write the table; parts of an earlier run are kept."""
    whole = options.out / f"{options.name}.json"
    raw: dict[str, Any] = json.loads(whole.read_text()) if whole.is_file() else {}
    for part, how in ended.items():
        file = part_file(options, part)
        raw[part] = json.loads(file.read_text()) if file.is_file() else {}
        raw[part]["ended"] = how
        file.unlink(missing_ok=True)
    write(options, raw)


def merge(options: argparse.Namespace, names: list[str]) -> None:
    """One file and one table of several, of which each ran on a GPU of its own; rows of one part are put together."""
    raw: dict[str, Any] = {}
    for name in names:
        file = options.out / f"{name}.json"
        whole = json.loads(file.read_text()) if file.is_file() else {}
        for part in PARTS:  # those of a run that was stopped, too
            left = options.out / f".{name}.{part}.json"
            if left.is_file():
                whole.setdefault(part, {**json.loads(left.read_text()), "ended": "stopped"})
                left.unlink()
        for part, found in whole.items():
            known = raw.setdefault(part, found)
            if known is not found:
                for key in ("rows", "not_reached"):
                    known[key] = [*known.get(key, []), *found.get(key, [])]
                known["ended"] = "; ".join(filter(None, (known["ended"], found["ended"])))
        file.unlink(missing_ok=True)
        file.with_suffix(".md").unlink(missing_ok=True)
    write(options, raw)


def write(options: argparse.Namespace, raw: dict[str, Any]) -> None:
    whole = options.out / f"{options.name}.json"
    whole.write_text(json.dumps(raw, indent=1) + "\n")
    text = "\n".join(lines(raw)) + "\n"
    whole.with_suffix(".md").write_text(text)
    print(text)


def machine(device: str) -> dict[str, str]:
    """What these numbers are of. Opens no GPU: the sides of p1 have it for themselves."""
    import torch

    described = ["git", "describe", "--always", "--dirty"]
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(described, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    )
    found = {"commit": commit, "torch": torch.__version__}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, check=False)
        found["gpu"] = (asked.stdout.splitlines() or ["unknown"])[0]
    return found


def problems(options: argparse.Namespace, every: int = 1) -> list[Any]:
    import msgspec

    from convplan._problem_files import read_problems

    found = [one for one in read_problems(options.suite) if options.only in one.name]
    found = [one for one in found if options.only_suite in ("", one.suite)][::every]
    index, _, count = options.shard.partition("/")
    on_device = [
        msgspec.structs.replace(one, problem=msgspec.structs.replace(one.problem, device=options.device))
        for one in found
    ]
    return on_device[int(index) :: int(count)]


def policy(options: argparse.Namespace, **changes: Any) -> Any:
    import convplan

    given = {} if options.budget_s is None else {"budget_s": options.budget_s}
    return convplan.Policy(**given, **changes)


def plain(value: Any) -> Any:
    import msgspec

    return msgspec.json.decode(msgspec.json.encode(value))


Stop = Callable[[], bool]
Found = Iterator[dict[str, Any]]


# ---- the parts; each yields what it has so far


def p1(options: argparse.Namespace, stop: Stop) -> Found:
    from convplan._bench import bench_report
    from convplan._bench_processes import Bench, BenchOptions

    comparisons, failures, left = [], [], []
    wanted = policy(options)
    with Bench(wanted, BenchOptions(seconds=options.seconds_each, compile=options.compile)) as bench:
        for named in problems(options):
            if stop():
                left.append(named.name)
                continue
            one, failed = bench.compare(named)
            comparisons += [one] if one else []
            failures += failed
            report = bench_report(
                comparisons, wanted, failures=failures, environments=bench.environments, stock=bench.options.stock
            )
            reasons = {one.name: one.reason for one in comparisons if one.is_loss}
            yield {"report": plain(report), "reasons": reasons}
    yield {"not_reached": left}


def each(options: argparse.Namespace, stop: Stop, every: int, look: Callable[[Any], dict[str, Any]]) -> Found:
    """A row for each problem, in this process; one that fails is a row that says so."""
    import torch

    rows: list[dict[str, Any]] = []
    left = []
    for named in problems(options, every):
        if stop():
            left.append(named.name)
            continue
        torch.backends.cudnn.allow_tf32 = named.allow_tf32
        try:
            rows.append({"name": named.name, "suite": named.suite, **look(named)})
        except Exception as exc:
            rows.append({"name": named.name, "suite": named.suite, "failed": f"{type(exc).__name__}: {exc}"[:500]})
        if options.device == "cuda":
            torch.cuda.empty_cache()
        yield {"rows": rows}
    yield {"rows": rows, "not_reached": left}


def p3(options: argparse.Namespace, stop: Stop) -> Found:
    from convplan._regret import measure_regret

    def look(named: Any) -> dict[str, Any]:
        wanted = named.policy(policy(options))
        return plain(measure_regret(named.problem, wanted, repeats=options.repeats, seconds=options.seconds_each))

    return each(options, stop, options.every, look)


def p6(options: argparse.Namespace, stop: Stop) -> Found:
    import convplan

    def look(named: Any) -> dict[str, Any]:
        begin = time.perf_counter()
        record = convplan.plan(named.problem, named.policy(policy(options)))
        compiled = sum("RUNTIME_COMPILATION" in one.notes.behavior for one in (*record.ranking, *record.rejected))
        return {
            "planning_s": record.planning_s,
            "stages_s": dict(record.stages_s),
            "with_storing_s": time.perf_counter() - begin,
            "usable": len(record.ranking),
            "rejected": dict(Counter(one.rejected for one in record.rejected)),
            "compiled_at_run_time": compiled,
            "chosen": str(record.config),
        }

    return each(options, stop, 1, look)


def exhaustive(options: argparse.Namespace, stop: Stop) -> Found:
    import convplan
    from convplan._regret import regret_of

    def look(named: Any) -> dict[str, Any]:
        wanted = named.policy(policy(options))
        measured = convplan.plan(named.problem, wanted)
        searched = convplan.plan(named.problem, wanted.replace(effort="exhaustive", search_s=options.search_s))
        found = regret_of([measured, searched], seconds=options.seconds_each)
        return {
            "measure": str(measured.config),
            "exhaustive": str(searched.config),
            "gain": found.regrets[0] / found.regrets[1],
            "planning_s": {"measure": measured.planning_s, "exhaustive": searched.planning_s},
            "candidates": {
                name: len(record.ranking) + len(record.rejected)
                for name, record in (("measure", measured), ("exhaustive", searched))
            },
            "curve": plain(searched.curve),
            "race": plain(found.race),
        }

    return each(options, stop, options.every, look)


def p5(options: argparse.Namespace, stop: Stop) -> Found:
    tuned = model(options, "tune", timeout_s=options.seconds_p5 + GRACE_S / 2)
    yield {"tuned": tuned}
    runs: list[dict[str, Any]] = []
    for number in range(options.runs):
        if stop() and number:
            break
        order = ["replay", "stock-step"]
        runs += [model(options, program) for program in (order if number % 2 else reversed(order))]
        yield {"runs": runs}


def shapes(options: argparse.Namespace, stop: Stop) -> Found:
    runs: list[dict[str, Any]] = []
    seconds = ["--images", str(options.images), "--seconds", str(options.seconds_shapes / 2)]
    limit = [] if options.tuning_limit_s is None else ["--tuning-limit-s", str(options.tuning_limit_s)]
    # The first begins with an empty store; before the others three sizes are tuned, which are none of the stream's.
    for number in range(options.runs):
        if stop() and number:
            break
        if number == 1:
            yield {"tuned": model(options, "stream-tune", timeout_s=300.0)}
        runs.append(model(options, "stream-stock", *seconds))
        runs.append(model(options, "stream-convplan", *seconds, *limit, *(["--regret"] if number < 2 else [])))
        runs[-1]["side"] = "convplan, warm" if number else "convplan, empty store"
        yield {"runs": runs}


def model(options: argparse.Namespace, program: str, *arguments: str, timeout_s: float = 240.0) -> dict[str, Any]:
    """One run of `search_models.py`.

    Raises:
        RuntimeError: it failed.
    """
    budget = [] if options.budget_s is None else ["--budget-s", str(options.budget_s)]
    command = [sys.executable, str(HERE / "search_models.py"), program, "--device", options.device]
    done = subprocess.run(
        [*command, *budget, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{program}: exit status {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


PARTS: dict[str, Callable[[argparse.Namespace, Stop], Found]] = {
    "p1": p1,
    "p3": p3,
    "p5": p5,
    "p6": p6,
    "shapes": shapes,
    "exhaustive": exhaustive,
}


# ---- the table


def lines(raw: dict[str, Any]) -> list[str]:
    found = ["# The search", "", *summary_lines(raw)]
    writers = {
        "p1": p1_lines,
        "p3": p3_lines,
        "p5": p5_lines,
        "p6": p6_lines,
        "shapes": shapes_lines,
        "exhaustive": exhaustive_lines,
    }
    for part, write in writers.items():
        if part not in raw:
            continue
        about = ", ".join(f"{name} {value}" for name, value in raw[part].get("machine", {}).items() if value)
        found += [*write(raw[part]), "", about, ""]
        if raw[part].get("not_reached"):
            found += [f"Not reached within the time: {', '.join(raw[part]['not_reached'])}.", ""]
        if raw[part].get("ended"):
            found += [f"This part did not end by itself: {raw[part]['ended']}.", ""]
    return found


def summary_lines(raw: dict[str, Any]) -> list[str]:
    """Each figure beside what it should be, and every miss with its reason; those of parts that ran."""
    rows: list[tuple[str, str, str, str]] = []
    comparisons = raw.get("p1", {}).get("report", {}).get("comparisons", [])
    if comparisons:
        mean = statistics.geometric_mean(one["ratio"] for one in comparisons)
        below = [one for one in comparisons if one["ratio"] < 0.98]
        why = [f"{one['name']} {one['ratio']:.3f}: {told(one, raw['p1'])}" for one in below]
        rows.append(("stock / convplan, geometric mean", ">= 1.05", f"{mean:.3f} of {len(comparisons)} problems", ""))
        rows.append(("the same, worst", ">= 0.98", f"{min(one['ratio'] for one in comparisons):.3f}", "; ".join(why)))
    regrets = [regret for row in good(raw.get("p3", {})) for regret in row["regrets"]]
    if regrets:
        rows.append(("regret of a tuning, median", "1.00", f"{statistics.median(regrets):.3f}", ""))
        rows.append(("the same, worst", "<= 1.02", f"{max(regrets):.3f} of {len(regrets)} tunings", ""))
    runs = raw.get("p5", {}).get("runs", [])
    if {run["side"] for run in runs} == {"stock", "replay"}:
        stock, mine = ([run for run in runs if run["side"] == side] for side in ("stock", "replay"))
        step_s = [statistics.median(run["first_step_s"] for run in of) for of in (mine, stock)]
        more_s = step_s[0] - step_s[1] + statistics.median(run["enabled_s"] for run in mine)
        stats = mine[-1]["stats"]
        rows.append(("first step of a second process, more than stock", "<= 0.3 s", f"{more_s:.2f} s", ""))
        rows.append(("tuned and compiled in it", "0", f"{stats['tuned']} and {stats['compiled']}", ""))
    times = good(raw.get("p6", {}))
    if times:
        slow = sorted((row for row in times if row["planning_s"] > 1.0), key=lambda row: -row["planning_s"])
        within = f"{len(times) - len(slow)} of {len(times)} problems, median {middle_s(times):.2f} s"
        rows.append(("planning a problem", "<= 1.0 s", within, "; ".join(map(slowest_stage, slow))))
    found = good(raw.get("exhaustive", {}))
    if found:
        better = sum(row["gain"] > 1.01 for row in found)
        why = nothing_found(found) if 4 * better < len(found) else ""
        rows.append(("exhaustive finds something better", ">= a quarter", f"{better} of {len(found)} problems", why))
    rows += stream_rows(raw.get("shapes", {}))
    head = ["| figure | to reach | found | misses, with their reasons |", "|---|---|---|---|"]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows), ""] if rows else []


def nothing_found(rows: list[dict[str, Any]]) -> str:
    """What the exhaustive search did where it found nothing better."""
    others = [row for row in rows if row["gain"] <= 1.01]
    again = sum(row["exhaustive"] == row["measure"] for row in others)
    counts = [row["candidates"]["exhaustive"] for row in others]
    longest_s = max(row["planning_s"]["exhaustive"] for row in others)
    return (
        f"{len(others)} others: {again} times measure's own choice again, else one within {slack(others):.1%} of it, "
        f"after {min(counts)} to {max(counts)} candidates in at most {longest_s:.0f} s of the 60"
    )


def slack(rows: list[dict[str, Any]]) -> float:
    return max(abs(row["gain"] - 1) for row in rows)


def stream_rows(raw: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    runs = raw.get("runs", [])
    rows = []
    for number in range(0, len(runs) - 1, 2):
        stock, mine = runs[number], runs[number + 1]
        count = min(len(stock["times_ms"]), len(mine["times_ms"]))
        stock_s, mine_s = (sum(run["times_ms"][:count]) / 1e3 for run in (stock, mine))
        name = f"{count} image sizes, {mine['side']}: total"
        late = "" if mine_s <= stock_s else where_late(stock["times_ms"][:count], mine["times_ms"][:count])
        rows.append((name, f"<= {stock_s:.1f} s, stock's", f"{mine_s:.1f} s", late))
        known = [row for row in mine["regrets"] if row["regret"] is not None]
        if known:
            values = [row["regret"] for row in known]
            far = [
                f"{row['regret']:.3f} for {row['problem']}, by {row['effort']} effort"
                for row in known
                if row["regret"] > 1.05
            ]
            if far:
                far.append(f"{mine['stats']['tuned']} problems had been tuned in this process")
            told = f"median {statistics.median(values):.3f}, worst {max(values):.3f} of {len(values)} layers"
            rows.append(("the same: regret in its second half", "<= 1.05", told, "; ".join(far)))
    return rows


def where_late(stock_ms: list[float], mine_ms: list[float]) -> str:
    """What made a stream longer than stock torch's: few images, or most of them."""
    far = [mine - stock for stock, mine in zip(stock_ms, mine_ms, strict=True) if mine > 2 * stock]
    faster = sum(mine < stock for stock, mine in zip(stock_ms, mine_ms, strict=True))
    middle = f"{statistics.median(mine_ms):.0f} ms an image in the middle against {statistics.median(stock_ms):.0f}"
    return (
        f"{faster} of {len(mine_ms)} images were faster than stock's, {middle}; {len(far)} took over twice as long, "
        f"{sum(far) / 1e3:.1f} s longer together"
    )


def told(one: dict[str, Any], raw: dict[str, Any]) -> str:
    """Why convplan lost a comparison, as far as the numbers tell."""
    kernels = [", ".join(kernel for kernel in one[side]["kernels"]) for side in ("stock", "convplan")]
    reason = raw.get("reasons", {}).get(one["name"], "")
    if not all(kernels) or kernels[0] == kernels[1]:
        return str(reason)
    return f"{reason}; stock ran {kernels[0]}, convplan {kernels[1]}"


def slowest_stage(row: dict[str, Any]) -> str:
    """Where a planning's time went."""
    stage, seconds = max(row["stages_s"].items(), key=lambda item: item[1])
    compiled = f", {row['compiled_at_run_time']} compiled meanwhile" if stage == "verify" else ""
    return f"{row['name']} {row['planning_s']:.1f} s ({stage} {seconds:.1f} s{compiled})"


def middle_s(rows: list[dict[str, Any]]) -> float:
    return statistics.median(row["planning_s"] for row in rows)


def p1_lines(raw: dict[str, Any]) -> list[str]:
    report = raw.get("report", {"comparisons": [], "failures": [], "totals": [], "stock": "", "policy": ""})
    found = ["## Against stock torch", "", f"Stock torch: {report['stock']}. convplan: {report['policy']}.", ""]
    found += [
        f"{total['suite']}: geometric mean {total['geometric_mean']:.3f} over {total['problems']} problems, worst "
        f"{total['worst']:.3f}, {total['below_0_98']} below 0.98, {total['below_0_97']} below 0.97."
        for total in report["totals"]
    ]
    found += ["", "| problem | stock us | ± | convplan us | ± | stock / convplan | paired | plan | loss |"]
    found += ["|---|---|---|---|---|---|---|---|---|"]
    found += [
        f"| {one['name']} | {one['stock']['median_us']:.1f} | {one['stock']['spread_us']:.1f} | "
        f"{one['convplan']['median_us']:.1f} | {one['convplan']['spread_us']:.1f} | {one['ratio']:.3f} | "
        f"{one['paired_ratio']:.3f} ± {one['paired_spread']:.3f} | {one['chosen']} | "
        f"{raw['reasons'].get(one['name'], '')} |"
        for one in sorted(report["comparisons"], key=lambda one: one["ratio"])
    ]
    return [*found, *(f"| {one['name']} | failed: {one['side']}: {one['error']} |" for one in report["failures"])]


def good(raw: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in raw.get("rows", []) if "failed" not in row]


def failed(raw: dict[str, Any]) -> list[str]:
    return [f"Failed: {row['name']}: {row['failed']}" for row in raw.get("rows", []) if "failed" in row]


def p3_lines(raw: dict[str, Any]) -> list[str]:
    rows = good(raw)
    regrets = [regret for row in rows for regret in row["regrets"]] or [float("nan")]
    found = [
        "## Regret",
        "",
        f"{len(rows)} problems, each tuned anew several times; regret is a choice's time over the best candidate's: "
        f"median {statistics.median(regrets):.3f}, worst {max(regrets):.3f}.",
        "",
        "| problem | median | worst | different choices | raced | tuning s |",
        "|---|---|---|---|---|---|",
    ]
    found += [
        f"| {row['name']} | {row['median']:.3f} | {row['worst']:.3f} | {sum(one['chosen'] > 0 for one in row['race'])} "
        f"| {len(row['race'])} | {statistics.median(row['planning_s']):.2f} |"
        for row in sorted(rows, key=lambda row: -row["worst"])
    ]
    return [*found, "", *failed(raw)]


def p5_lines(raw: dict[str, Any]) -> list[str]:
    runs = raw.get("runs", [])
    sides = {side: [run for run in runs if run["side"] == side] for side in ("stock", "replay")}
    found = ["## First training step of a fresh process", ""]
    if not all(sides.values()):
        return [*found, "No run of both sides."]
    names = ("imported_torch_s", "ready_s", "first_step_s", "first_step_done_s", "second_step_s")
    middle = {side: {name: statistics.median(run[name] for run in of) for name in names} for side, of in sides.items()}
    more_s = {name: middle["replay"][name] - middle["stock"][name] for name in names}
    enabled_s = statistics.median(run["enabled_s"] for run in sides["replay"])
    last = sides["replay"][-1]["stats"]
    found += [
        f"{len(sides['stock'])} processes of each, alternating; seconds since the process's first line, medians. "
        f"Replaying stored plans takes {more_s['first_step_done_s']:+.2f} s against stock torch with benchmark off: "
        f"importing and enabling convplan {enabled_s:.3f} s, the first step {more_s['first_step_s']:+.3f} s, the rest "
        "is chance, since both do the same. "
        f"{raw['tuned']['problems']} problems were tuned before, in {raw['tuned']['seconds']:.0f} s.",
        "",
        f"Counters of the last replay: {', '.join(f'{name} {value}' for name, value in last.items())}.",
        "",
        "| side | torch imported | model ready | first step alone | first step done | second step |",
        "|---|---|---|---|---|---|",
    ]
    return found + [
        f"| {side} | {' | '.join(f'{values[name]:.3f}' for name in names)} |" for side, values in middle.items()
    ]


def p6_lines(raw: dict[str, Any]) -> list[str]:
    rows = good(raw)
    times = [row["planning_s"] for row in rows] or [float("nan")]
    found = [
        "## Planning",
        "",
        f"{len(rows)} problems, seconds a problem: median {statistics.median(times):.2f}, longest {max(times):.2f}; "
        f"{sum(time_s > 1 for time_s in times)} above 1 s.",
        "",
        "| problem | planning s | with storing s | usable | rejected | compiled at run time |",
        "|---|---|---|---|---|---|",
    ]
    found += [
        f"| {row['name']} | {row['planning_s']:.3f} | {row['with_storing_s']:.3f} | {row['usable']} | "
        f"{', '.join(f'{stage} {count}' for stage, count in row['rejected'].items())} | "
        f"{row['compiled_at_run_time']} |"
        for row in sorted(rows, key=lambda row: -row["planning_s"])
    ]
    return [*found, "", *failed(raw)]


def shapes_lines(raw: dict[str, Any]) -> list[str]:
    found = ["## A stream of image sizes", ""]
    runs = raw.get("runs", [])
    if not runs:
        return [*found, "No run."]
    count = min(len(run["times_ms"]) for run in runs)
    found += [
        f"The first {count} images of each run, all of different sizes; stock torch with benchmark off.",
        "",
        "| run | total s | median ms | second half's median ms | longest ms | tuned | from the store |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        times = run["times_ms"][:count]
        found.append(
            f"| {run['side']} | {sum(times) / 1e3:.3f} | {statistics.median(times):.2f} | "
            f"{statistics.median(times[count // 2 :]):.2f} | {max(times):.1f} | {run['stats'].get('tuned', '')} | "
            f"{run['stats'].get('from_store', '')} |"
        )
    for run in runs:
        regrets = [row["regret"] for row in run["regrets"] if row["regret"] is not None]
        if regrets:
            found += [
                "",
                f"Regret of the choices of {len(regrets)} layers at sizes of the second half, {run['side']}: median "
                f"{statistics.median(regrets):.3f}, worst {max(regrets):.3f}.",
            ]
    if "tuned" in raw and not any(run["side"] == "convplan, warm" for run in runs):
        found += ["", "There was no time for a run after three other sizes were tuned."]
    elif "tuned" in raw:
        tuned = raw["tuned"]
        found += [
            "",
            f"Warm: {tuned['problems']} problems of three other sizes were tuned before, in {tuned['seconds']:.0f} s.",
        ]
    return found


def exhaustive_lines(raw: dict[str, Any]) -> list[str]:
    rows = good(raw)
    better = [row for row in rows if row["gain"] > 1.01]
    found = [
        "## Searching all knobs",
        "",
        f"{len(rows)} problems; something better than `measure` by more than 1 % was found for {len(better)}.",
        "",
        "| problem | measure / exhaustive | candidates | of measure | search s | last improvement s | found |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["gain"]):
        improvements = row["curve"][:-1]
        found.append(
            f"| {row['name']} | {row['gain']:.3f} | {row['candidates']['exhaustive']} | {row['candidates']['measure']} "
            f"| {row['planning_s']['exhaustive']:.1f} | {improvements[-1][0] if improvements else 0:.1f} | "
            f"{row['exhaustive']} |"
        )
    return [*found, "", *failed(raw)]


if __name__ == "__main__":
    main()
