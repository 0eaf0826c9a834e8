"""docs/differences.md says how large the compatibility suite is: no larger than it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

from helpers.compat_cases import TABLES, cases

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "differences.md"
ROW = re.compile(r"^\| `([\w.]+)` \|[^|]*\| (\d+) \|$", re.MULTILINE)


def counted() -> dict[str, int]:
    """What there is, by the names of the page."""
    found = {name: len(cases("cpu", name)) for name in TABLES}
    generated = (HERE / "test_compat_generated.py").read_text(encoding="utf-8")
    examples = re.search(r"^EXAMPLES = (\d+)$", generated, re.MULTILINE)
    assert examples
    found["generated"] = int(examples[1]) * generated.count("@generated")
    found["transformers"] = len(json.loads((HERE / "transformers.json").read_text(encoding="utf-8"))["run"])
    networks = (HERE.parent / "gpu" / "test_compat_models_gpu.py").read_text(encoding="utf-8")
    found["networks"] = len(re.findall(r'\("(?:timm|torchvision)", "\w+"\)', networks))
    return found


def test_the_page_claims_no_more_cases_than_there_are() -> None:
    claimed = {name: int(number) for name, number in ROW.findall(PAGE.read_text(encoding="utf-8"))}
    found = counted()
    assert claimed.keys() == found.keys()
    assert {name: number for name, number in claimed.items() if number > found[name]} == {}


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.id for case in cases("cpu")]
    assert len(names) == len(set(names))
