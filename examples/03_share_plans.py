"""Tune on one machine, use the plans on another: stores, and plans as JSON files that can be read and merged."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import convplan

model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 1))
images = torch.zeros(4, 3, 64, 64)


def here(file: Path) -> None:
    """Tune everything that the model runs, forward and backward, and write the plans down."""
    for record in convplan.tune(model, images, policy=convplan.Policy(budget_s=0.02)):
        print("tuned", record)
    print("exported", convplan.export_plans(file).exported, "plans,", file.stat().st_size, "bytes of JSON")
    for found in json.loads(file.read_text())["environments"]:
        print("they belong to", dict(found["environment"]["items"])["cpu"])


def there(file: Path) -> None:
    """Read them. Plans of another environment would wait for theirs, and never be used here."""
    for _ in range(2):
        report = convplan.import_plans(file)
        print(f"imported: {report.added} added, {report.kept} kept, {len(report.refused)} refused")
    # In replay mode nothing is tuned: a plan that the store lacks would be an error.
    with torch.no_grad(), convplan.enabled(convplan.Policy(mode="replay")):
        model(images)
    print("forward:", convplan.stats()["from_store"], "plans from the store,", convplan.stats()["tuned"], "tuned")
    print("the store is sound:", convplan.check_plans().ok)


if len(sys.argv) > 1:
    there(Path(sys.argv[1]))
else:
    with tempfile.TemporaryDirectory() as directory:
        os.environ["CONVPLAN_STORE"] = str(Path(directory) / "here.sqlite")
        here(Path(directory) / "plans.json")
        os.environ["CONVPLAN_STORE"] = str(Path(directory) / "there.sqlite")
        sys.stdout.flush()
        subprocess.run([sys.executable, __file__, str(Path(directory) / "plans.json")], check=True)
