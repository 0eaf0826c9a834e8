"""The documentation's table of what engines fuse is what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "write_fusion_table.py"


def test_the_page_is_what_the_engines_say() -> None:
    written = runpy.run_path(str(SCRIPT))
    assert written["PAGE"].read_text(encoding="utf-8") == written["page"](), f"run python {SCRIPT.name}"
