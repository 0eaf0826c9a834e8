"""The documentation is true: its code runs, its links lead somewhere, and it names everything there is to name.

Code blocks marked `python` in README.md and docs/*.md run page by page, in order, in one namespace and one process for
each page, with warnings as errors. Blocks marked `console` show a terminal and are not run.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import convplan
from convplan import _database, _errors, _exchange, _key, _store
from convplan.engines import registry

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [path for path in (ROOT / "README.md", *DOCS) if path.is_file()]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
VARIABLE = re.compile(r"\bCONVPLAN(?:_[A-Z]+)+\b")

# Runs in the other process. Each block starts at its own line of the page, so a traceback points into the page.
RUNNER = """
import json, sys, warnings
page, blocks = json.load(sys.stdin)
import torch
torch.manual_seed(0)
warnings.simplefilter("error")
namespace = {"__name__": "__main__"}
for line, code in blocks:
    exec(compile("\\n" * line + code, page, "exec"), namespace)
"""


def page_id(path: Path) -> str:
    return path.name


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Each block with the number of lines above its code."""
    return [
        (text.count("\n", 0, match.start(2)), match.group(2))
        for match in FENCE.finditer(text)
        if match.group(1) == "python"
    ]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_is_closed_and_says_what_it_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    languages = [match.group(1) for match in FENCE.finditer(text)]
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(languages)
    assert set(languages) <= {"python", "console", "text", "json", "toml", "sh"}


def test_blocks_are_found_with_the_line_they_start_at() -> None:
    text = "one\n```python\nx = 1\n```\n```console\n$ no\n```\n```python\ny = x\n```\n"
    assert python_blocks(text) == [(2, "x = 1\n"), (8, "y = x\n")]


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p.read_text(encoding="utf-8"))], ids=page_id)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CONVPLAN_")}
    environment["CONVPLAN_CACHE_DIR"] = str(tmp_path / "cache")
    environment["OMP_NUM_THREADS"] = "1"  # the snippets are small; more threads only wait for each other
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([str(page), blocks]),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ +(.*?) *$", FENCE.sub("", text), re.MULTILINE)


def anchor(heading: str) -> str:
    """The name that a heading is linked by."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_a_file_and_to_a_heading_in_it(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, fragment = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {link}, and there is no {file}"
        if fragment:
            assert fragment in map(anchor, headings(file.read_text(encoding="utf-8"))), f"{page.name} links to {link}"


def test_the_contents_list_every_page() -> None:
    listed = set(LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS} - {"index.md"} <= listed


def docs_text() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in DOCS)


def test_every_public_name_is_mentioned() -> None:
    text = docs_text()
    missing = [name for name in convplan.__all__ if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    assert missing == []


def test_every_environment_variable_is_documented() -> None:
    sources = (ROOT / "convplan").rglob("*.py")
    used = {name for source in sources for name in VARIABLE.findall(source.read_text(encoding="utf-8"))}
    assert used, "the source reads some"
    assert used - set(VARIABLE.findall(docs_text())) == set()


def test_documented_environment_variables_exist() -> None:
    sources = "\n".join(source.read_text(encoding="utf-8") for source in (ROOT / "convplan").rglob("*.py"))
    assert set(VARIABLE.findall(docs_text())) - set(VARIABLE.findall(sources)) == set()


def test_every_policy_field_is_in_its_table_with_its_default() -> None:
    text = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE))
    policy = convplan.Policy()
    assert rows == {name: repr(getattr(policy, name)) for name in policy.__struct_fields__}


def engine_section(name: str) -> str:
    text = (ROOT / "docs" / "enumerate.md").read_text(encoding="utf-8")
    found = re.search(rf"^## `{re.escape(name)}`.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/enumerate.md has no section for engine {name!r}"
    return found.group()


@pytest.mark.parametrize("name", registry.names())
def test_every_engine_has_its_section_and_every_knob_is_in_it(name: str) -> None:
    section = engine_section(name)
    problems = [
        convplan.Problem.dense(op, x_dims, w_dims, dtype=dtype, groups=groups)
        for op in ("fprop", "dgrad", "wgrad")
        for x_dims, w_dims, groups in (((2, 4, 64), (4, 4, 9), 1), ((2, 8, 16, 16), (8, 1, 3, 3), 8))
        for dtype in ("float32", "bfloat16")
    ]
    engine = registry.get(name)
    knobs = {
        knob
        for problem in problems
        if engine.supports(problem).ok
        for candidate in engine.configs(problem, "measure")
        for knob, _ in candidate.config.knobs
    }
    assert [knob for knob in sorted(knobs) if f"`{knob}`" not in section] == []


class Branch(NamedTuple):
    parents: frozenset[str]
    attributes: frozenset[str]


def drawn_tree(text: str) -> dict[str, Branch]:
    """The classes of a tree drawn with lines: name, what it derives from, and the attributes beside it."""
    tree: dict[str, Branch] = {}
    path: list[str] = []
    for line in text.splitlines():
        found = re.match(r"^([│ ├└─]*)([A-Z]\w+)(?: \(also (\w+)\))?(.*)$", line)
        if not found:
            continue
        lines, name, also, rest = found.groups()
        depth = len(lines) // 4
        path = [*path[:depth], name]
        parents = {path[depth - 1] if depth else "Exception", *([also] if also else [])}
        tree[name] = Branch(frozenset(parents), frozenset(re.findall(r"(?<!\w)\.(\w+)", rest)))
    return tree


def test_the_error_page_draws_the_tree_of_the_classes() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    drawn = drawn_tree(next(match.group(2) for match in FENCE.finditer(text) if "├──" in match.group(2)))
    classes = {
        name: value
        for name, value in vars(_errors).items()
        if isinstance(value, type) and issubclass(value, convplan.ConvPlanError)
    }
    assert {name: branch.parents for name, branch in drawn.items()} == {
        name: {base.__name__ for base in value.__bases__} for name, value in classes.items()
    }
    for name, branch in drawn.items():
        takes = set(inspect.signature(classes[name].__init__).parameters)
        assert branch.attributes <= takes, (
            f"{name} is drawn with {set(branch.attributes)}, its constructor takes {takes}"
        )
    for name in classes:
        assert text.count(f"`{name}`") >= 1, f"docs/errors.md does not say what to do about {name}"


def test_the_changelog_is_about_this_version_and_these_schemas() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\] - (\d{4}-\d{2}-\d{2})$", text, re.MULTILINE)
    assert versions[0][0] == convplan.__version__
    newest = text.split("\n## [")[1]
    assert _database.STORE_SCHEMA == _store.ROW_SCHEMA, "written with one number in the changelog"
    for words, number in (
        ("Plan store", _database.STORE_SCHEMA),
        ("Key", _key.KEY_SCHEMA),
        ("Plan file", _exchange.FILE_SCHEMA),
    ):
        assert re.search(rf"^- {words}: schema {number}\b", newest, re.MULTILINE), words
