"""What convplan costs on the host: a hit on the hot path, importing it, planning a ResNet-50 step, replaying it.

    python benchmarks/host_cost.py                     # -> results/host_cost.json, results/host_cost.md
    python benchmarks/host_cost.py --parts hits,profile --device cuda --out results   # a GPU's columns beside the CPU's
    python benchmarks/host_cost.py --parts hits,profile --processes 1 --rounds 15     # the same within a minute
    python benchmarks/host_cost.py --profile           # only where each microsecond of a hit goes, on stdout

Each figure comes from processes of its own, several of them, and is their median. Run it on an idle machine. What a
part finds replaces that part alone of the results, and hits and profiles are kept by device: so one table shows the CPU
and a GPU that is in another machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from run_cpu import commit

HERE = Path(__file__).parent
REPEATS = 7
PROCESSES = 3
P4 = 1.05  # what a hit may take on the host, over stock torch
PARTS = ("hits", "profile", "import", "step")

IMPORT = """
import time, torch
begin = time.perf_counter()
import convplan
print(time.perf_counter() - begin)
"""

SURFACE = """
import time, torch
begin = time.perf_counter()
import convplan
convplan.enable
convplan.conv2d
print(time.perf_counter() - begin)
"""

STEP = """
import json, os, time, torch
torch.manual_seed(0)
from transformers import ResNetConfig, ResNetForImageClassification
model = ResNetForImageClassification(ResNetConfig(num_labels=1000)).train()
images, labels = torch.randn(4, 3, 224, 224), torch.arange(4)

def step():
    model.zero_grad(set_to_none=True)
    model(pixel_values=images, labels=labels).loss.backward()

step()
begin = time.perf_counter(); step(); stock_s = time.perf_counter() - begin
import convplan
begin = time.perf_counter()
convplan.tune(step)
planned_s = time.perf_counter() - begin
convplan.enable()
begin = time.perf_counter(); step(); first_s = time.perf_counter() - begin
begin = time.perf_counter(); step(); second_s = time.perf_counter() - begin
print(json.dumps({"stock_step_s": stock_s, "plan_s": planned_s, "first_step_s": first_s, "second_step_s": second_s,
                  **convplan.stats()}))
"""


def run(code: str, **environment: str) -> str:
    return in_process(["-c", code], **environment)


def in_process(argv: list[str], **environment: str) -> str:
    """The last line that a Python process prints."""
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(f"{' '.join(argv)[:80]}: {done.stderr}")
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--processes", type=int, default=PROCESSES, help="whose median is taken, of hits and profiles")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", HERE / "results")))
    parser.add_argument("--profile", action="store_true", help="only where the time of a hit goes, on stdout")
    options = parser.parse_args()
    if options.profile:
        print("\n".join(profile_lines({options.device: found("profile", options)})))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "host_cost.json"
    raw: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for part in options.parts.split(","):
        value = found(part, options)
        if part in ("hits", "profile"):
            raw.setdefault(part, {})[options.device] = value
        else:
            raw.update(value)
        file.write_text(json.dumps(raw, indent=1) + "\n")
        (options.out / "host_cost.md").write_text(table(raw))
    print(table(raw))


def found(part: str, options: argparse.Namespace) -> dict[str, Any]:
    device: str = options.device
    with tempfile.TemporaryDirectory() as folder:
        store = {"CONVPLAN_CACHE_DIR": folder}
        if part in ("hits", "profile"):
            argv = [str(HERE / "host_hits.py"), "--device", device, "--rounds", str(options.rounds)]
            argv += ["--profile"] if part == "profile" else []
            runs = [json.loads(in_process(argv, **store)) for _ in range(options.processes)]
            return {"commit": commit(), "machine": machine(device), "runs": runs}
        if part == "import":
            return {
                "import_commit": commit(),
                "import_s": [float(run(IMPORT)) for _ in range(REPEATS)],
                "import_and_public_functions_s": [float(run(SURFACE)) for _ in range(REPEATS)],
            }
        if part == "step":
            return {
                "step_commit": commit(),
                "resnet50_planned": json.loads(run(STEP, **store)),
                "resnet50_replayed": [json.loads(run(STEP, **store)) for _ in range(3)],
            }
    raise SystemExit(f"found part {part!r}, expected some of {', '.join(PARTS)}")


@functools.cache
def machine(device: str) -> str:
    code = "import torch; from convplan._environment import current; torch.set_num_threads(1); "
    name = "torch.cuda.get_device_name() + ', ' + " if device == "cuda" else ""
    return run(f"{code}print({name}str(current({device!r})))")


# --- the table


def table(raw: dict[str, Any]) -> str:
    lines = ["# Host cost", "", "Medians over processes; `benchmarks/host_cost.py` says what each measures.", ""]
    if "hits" in raw:
        lines += hit_lines(raw["hits"])
    if "profile" in raw:
        lines += ["", *profile_lines(raw["profile"])]
    rows = program_rows(raw)
    if rows:
        lines += ["", "## Starting and planning", "", "| what | measured |", "|---|---|"]
        lines += [f"| {what} | {value} |" for what, value in rows]
    return "\n".join(lines) + "\n"


def hit_lines(hits: dict[str, Any]) -> list[str]:
    """One row for each kind of call; for each device both sides and their ratio."""
    lines = ["## A call that hits the cache", ""]
    lines += [f"- {device}: commit {one['commit']}; {one['machine']}" for device, one in hits.items()]
    lines += ["", f"50 tiny layers in a row, microseconds of the host for one call; P4 is a ratio of at most {P4}.", ""]
    heads = [f"{device}: stock | `enable()` | ratio" for device in hits]
    lines += [f"| call | {' | '.join(heads)} |", f"|---|{'---|---|---|' * len(heads)}"]
    names = dict.fromkeys(name for one in hits.values() for name in one["runs"][0])
    for name in names:
        cells = []
        for one in hits.values():
            stock, ours, ratio = (
                statistics.median(run[name][key] for run in one["runs"]) for key in ("stock_us", "convplan_us", "ratio")
            )
            cells += [f"{stock:.1f}", f"{ours:.1f}", f"{ratio:.2f}" + ("" if ratio <= P4 else " (over)")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def profile_lines(profile: dict[str, Any]) -> list[str]:
    """Where the time of a 2-D hit goes, for each device."""
    lines = ["## Where the time of a hit goes", ""]
    for device, one in profile.items():
        runs = one["runs"]
        ratio = statistics.median(run["ratio"] for run in runs)
        lines += [
            f"{device}, {runs[0]['config']}, {ratio:.2f} of stock torch (commit {one['commit']}; {one['machine']})"
        ]
        lines += ["", "| stage | us |", "|---|---|"]
        for part, begin in (("stages", ""), ("parts_of_the_run", "a part, timed alone: ")):
            for name in runs[0][part]:
                lines.append(f"| {begin}{name} | {statistics.median(run[part][name] for run in runs):.2f} |")
        if "forward_and_backward" in runs[0]:  # runs before it was measured have none
            lines += ["", "| forward and backward | us |", "|---|---|"]
            for name in runs[0]["forward_and_backward"]:
                middle = statistics.median(run["forward_and_backward"][name] for run in runs)
                lines.append(f"| {name} | {middle:.2f} |")
        lines.append("")
    return lines[:-1]


def program_rows(raw: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "import_s" in raw:
        rows += [
            ("`import convplan`, over `import torch`", f"{statistics.median(raw['import_s']) * 1e3:.1f} ms"),
            (
                "the same, and its functions on tensors loaded",
                f"{statistics.median(raw['import_and_public_functions_s']) * 1e3:.1f} ms",
            ),
        ]
    if "resnet50_planned" in raw:
        planned, replayed = raw["resnet50_planned"], raw["resnet50_replayed"]
        overhead = statistics.median(one["first_step_s"] - one["second_step_s"] for one in replayed)
        rows += [
            (
                f"planning a ResNet-50 training step, 4x3x224x224 ({planned['tuned']} problems)",
                f"{planned['plan_s']:.1f} s",
            ),
            (
                "finding all of it in the store, in another process",
                f"{statistics.median(one['plan_s'] for one in replayed):.2f} s (tuned {replayed[0]['tuned']}; "
                "holds one step that is run to see its problems)",
            ),
            ("first step's extra time in that process, over its second", f"{overhead:.2f} s"),
        ]
    return rows


if __name__ == "__main__":
    main()
