"""The pictures of docs/measure.md and docs/fusion.md, from committed raw numbers.

    pip install -e '.[pictures]'
    python benchmarks/pictures.py       # results/search/search.json, results/fused/fused.json -> docs/pictures/*.svg

`regret.svg`: of every tuning of part p3 the time of its choice over that of the best candidate. `spread.svg`: of some
of these problems the candidates that were raced, with the middle half of their samples. `chance.svg`: what a choice by
one sample each, by five, and by all of them would have cost, drawn from those same samples.

`stages.svg`: what each step after a convolution adds in stock torch, beside one fused plan and the convolution alone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PICTURES = HERE.parent / "docs" / "pictures"
DRAWS = 4_000
SHOWN = 4  # problems in the picture of spreads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, default=HERE / "results" / "search" / "search.json")
    parser.add_argument("--fused", type=Path, default=HERE / "results" / "fused" / "fused.json")
    parser.add_argument("--out", type=Path, default=PICTURES)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update({"svg.hashsalt": "convplan", "svg.fonttype": "none", "font.size": 9})
    rows = [row for row in json.loads(options.raw.read_text())["p3"]["rows"] if "failed" not in row]
    pictures = {"regret": regret(rows), "spread": spread(rows), "chance": chance(rows)}
    if options.fused.is_file():
        pictures["stages"] = stages(json.loads(options.fused.read_text())["stages"])
    for name, figure in pictures.items():
        # No date: the same numbers give the same file.
        figure.savefig(options.out / f"{name}.svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def regret(rows: list[dict[str, Any]]) -> Any:
    figure, axes = plt.subplots(figsize=(6.4, 0.3 * len(rows) + 0.9))
    for place, row in enumerate(rows):
        axes.plot(row["regrets"], [place] * len(row["regrets"]), "o", alpha=0.45, color="tab:blue")
    axes.axvline(1.02, color="tab:red", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time of the choice / time of the best candidate; one dot a tuning")
    return figure


def spread(rows: list[dict[str, Any]]) -> Any:
    shown = sorted(rows, key=lambda row: len(row["race"]), reverse=True)[:SHOWN]
    figure, grid = plt.subplots(1, len(shown), figsize=(2.4 * len(shown), 2.6), sharey=True, squeeze=False)
    for axes, row in zip(grid[0], shown, strict=True):
        best_us = row["race"][0]["median_us"]
        for place, one in enumerate(row["race"]):
            low, middle, high = statistics.quantiles(one["samples_us"], n=4)
            color = "tab:blue" if one["chosen"] else "0.6"
            axes.plot([place, place], [low / best_us, high / best_us], color=color)
            axes.plot(place, middle / best_us, "o", color=color, markersize=4)
        axes.set_title(row["name"], fontsize=8)
        axes.set_xlabel("candidate")
    grid[0][0].set_ylabel("time / best; blue: chosen by some tuning")
    return figure


def chance(rows: list[dict[str, Any]]) -> Any:
    """Regret of a choice by so many samples of each candidate, drawn from the race."""
    draw = random.Random(0)
    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    for place, count in enumerate((1, 5, 0)):
        found = []
        for row in rows:
            best_us = min(one["median_us"] for one in row["race"])
            for _ in range(DRAWS // len(rows)):
                times = [
                    statistics.median(draw.sample(one["samples_us"], count) if count else one["samples_us"])
                    for one in row["race"]
                ]
                found.append(row["race"][times.index(min(times))]["median_us"] / best_us)
        found.sort()
        label = "all samples" if not count else "one sample" if count == 1 else f"median of {count} samples"
        axes.plot(found, [i / len(found) for i in range(len(found))], label=label, color=f"C{place}")
    axes.set_xlabel("time of the choice / time of the best candidate")
    axes.set_ylabel("share of choices")
    axes.legend(loc="lower right")
    return figure


def stages(rows: list[dict[str, Any]]) -> Any:
    figure, axes = plt.subplots(figsize=(6.4, 0.8 * len(rows) + 1.1))
    labels: list[str] = []
    colours = ["tab:blue", "tab:orange", "tab:green", "tab:red"]
    for row in rows:
        done_us, place = 0.0, len(labels)
        for colour, (step, found) in zip(colours, row["steps"].items(), strict=False):
            until_us = found["stock"]["median_us"]
            label = step if not place else None
            axes.barh(place, max(until_us - done_us, 0), left=done_us, color=colour, height=0.7, label=label)
            done_us = max(done_us, until_us)
        last = list(row["steps"].values())[-1]["convplan"]["median_us"]
        axes.barh(place + 1, last, color="tab:purple", height=0.7, label=None if place else "one fused plan")
        labels += [f"{row['name']}, stock torch", "convplan"]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds on the GPU")
    axes.legend(fontsize=7, loc="lower right")
    return figure


if __name__ == "__main__":
    main()
