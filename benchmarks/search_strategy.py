"""How many tries does it take to find a good configuration? The search of effort `exhaustive` against chance.

    python benchmarks/search_strategy.py [--seeds 100] [--out benchmarks/results/search_strategy.json]

On made-up engines (`tests/helpers/landscapes.py`), for many seeds: tries until one within 2 % of the best is found,
and how far from the best one is after a given number of tries. Nothing is timed, so every machine gives the same
table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.landscapes import SHAPES, Landscape, RandomSearch, regret_after, tries_until

from convplan._walk import Walk

STRATEGIES = {"walk": Walk, "random": RandomSearch}
TRIES = (25, 50, 100, 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for shape in SHAPES:
        lands = [Landscape(shape, seed) for seed in range(options.seeds)]
        for name, strategy in STRATEGIES.items():
            tries = [tries_until(strategy, land, seed) for seed, land in enumerate(lands)]
            regret = {
                count: statistics.median(regret_after(strategy, land, seed, count) for seed, land in enumerate(lands))
                for count in TRIES
            }
            rows.append({"shape": shape, "strategy": name, "tries": tries, "median_regret_after": regret})
            after = "  ".join(f"{count}: {value:.3f}" for count, value in regret.items())
            print(f"{shape:13} {name:7} median tries {statistics.median(tries):7.1f}  regret after {after}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"seeds": options.seeds, "within": 1.02, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
