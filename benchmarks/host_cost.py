"""What convplan costs on the host: importing it, a hit on the hot path, planning a ResNet-50 step, replaying it.

    python benchmarks/host_cost.py            # -> results/host_cost.json, results/host_cost.md

Each figure comes from processes of its own, several of them, and is their median. Run it on an idle machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from run_cpu import commit

HERE = Path(__file__).parent
REPEATS = 7

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

# 50 tiny layers in a row, and the engine's own call in the same process, in alternating rounds.
HIT = """
import json, statistics, time, torch, torch.nn.functional as F, convplan
from convplan import Policy
x, w = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
policy = Policy(effort="instant")
plan = convplan.plan(convplan.problem("fprop", x, w, padding=1), policy).build()
own = plan.unchecked_run

def timed(call, calls=2000):
    for _ in range(50):
        call()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls * 1e6

samples = {"stock": [], "enabled": [], "functional": [], "engine": []}
with torch.no_grad():
    for _ in range(9):
        samples["stock"].append(timed(lambda: F.conv2d(x, w, None, 1, 1)))
        samples["engine"].append(timed(lambda: own(x, w, None, None)))
        with convplan.enabled(policy):
            samples["enabled"].append(timed(lambda: F.conv2d(x, w, None, 1, 1)))
            samples["functional"].append(timed(lambda: convplan.conv2d(x, w, None, 1, 1)))
print(json.dumps({name: statistics.median(values) for name, values in samples.items()}))
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
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = {"CONVPLAN_CACHE_DIR": folder}
        raw = {
            "commit": commit(),
            "import_s": [float(run(IMPORT)) for _ in range(REPEATS)],
            "import_and_public_functions_s": [float(run(SURFACE)) for _ in range(REPEATS)],
            "hit_us": [json.loads(run(HIT, **store)) for _ in range(3)],
            "resnet50_planned": json.loads(run(STEP, **store)),
            "resnet50_replayed": [json.loads(run(STEP, **store)) for _ in range(3)],
        }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "host_cost.json").write_text(json.dumps(raw, indent=1) + "\n")
    (HERE / "results" / "host_cost.md").write_text(table(raw))
    print(table(raw))


def table(raw: dict) -> str:
    from convplan._environment import current

    def hit(name: str) -> float:
        return statistics.median(one[name] for one in raw["hit_us"])

    replayed = raw["resnet50_replayed"]
    overhead = statistics.median(one["first_step_s"] - one["second_step_s"] for one in replayed)
    planned = raw["resnet50_planned"]
    rows = [
        ("`import convplan`, over `import torch`", f"{statistics.median(raw['import_s']) * 1e3:.1f} ms"),
        (
            "the same, and its functions on tensors loaded",
            f"{statistics.median(raw['import_and_public_functions_s']) * 1e3:.1f} ms",
        ),
        ("tiny conv2d, stock torch", f"{hit('stock'):.1f} us"),
        ("the engine's own call, from Python", f"{hit('engine'):.1f} us"),
        ("the same conv2d under `enable()`", f"{hit('enabled'):.1f} us"),
        ("a hit's cost on top of the engine's own call, `enable()`", f"{hit('enabled') - hit('engine'):.1f} us"),
        ("the same, `convplan.conv2d`", f"{hit('functional') - hit('engine'):.1f} us"),
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
    lines = [
        "# Host cost",
        "",
        f"Commit {raw['commit']}; {current('cpu')}.",
        "Medians over processes; `benchmarks/host_cost.py` says what each measures.",
        "",
        "| what | measured |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {what} | {value} |" for what, value in rows)]) + "\n"


if __name__ == "__main__":
    main()
