"""What a user sees: the list of names, what importing costs, the version, and the tree of errors."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plans import run_python

import convplan
from convplan import _errors
from convplan._errors import ConvPlanError

ROOT = Path(convplan.__file__).resolve().parents[1]

# The list

NAMES = [name for name in convplan.__all__ if name != "__version__"]


def test_the_public_list_is_sorted_and_is_what_is_visible() -> None:
    assert convplan.__all__ == sorted(convplan.__all__)
    assert len(set(convplan.__all__)) == len(convplan.__all__)
    assert dir(convplan) == convplan.__all__


def test_what_type_checkers_see_is_the_public_list() -> None:
    tree = ast.parse(Path(convplan.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        seen.update({alias.name: node.module for alias in node.names})
    assert sorted(seen) == NAMES
    assert seen == convplan._HOME_OF
    assert (Path(convplan.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(convplan, name)
    assert value is getattr(importlib.import_module(convplan._HOME_OF[name]), name)
    assert callable(value)
    assert value.__doc__, f"{name} has no docstring of its own"
    assert len(value.__doc__.split()) >= 3
    if inspect.isclass(value):
        members = [
            m for n, m in vars(value).items() if not n.startswith("_") and (callable(m) or isinstance(m, property))
        ]
        assert all(member.__doc__ for member in members), f"a public member of {name} has no docstring"


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isfunction(getattr(convplan, name))])
def test_every_public_function_is_typed(name: str) -> None:
    signature = inspect.signature(getattr(convplan, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


@pytest.mark.parametrize(
    "name", ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
)
def test_functions_take_torchs_arguments_in_torchs_order(name: str) -> None:
    documented = re.search(rf"{name}\((.*?)\)", getattr(torch.nn.functional, name).__doc__ or "")
    assert documented is not None
    torchs = [part.partition("=")[::2] for part in documented.group(1).replace(" ", "").split(",")]
    parameters = inspect.signature(getattr(convplan, name)).parameters.values()
    ours = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours] == [argument for argument, _ in torchs]
    assert ["" if p.default is p.empty else repr(p.default) for p in ours] == [default for _, default in torchs]
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == [
        "residual", "alpha", "activation", "scale", "policy", "out",
    ]  # fmt: skip


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(AttributeError, match="'convplan' has no attribute 'fastest'"):
        _ = convplan.fastest  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="fastest"):
        exec("from convplan import fastest")


def test_star_import_gives_the_public_list() -> None:
    seen: dict[str, Any] = {}
    exec("from convplan import *", seen)
    assert sorted(set(seen) - {"__builtins__"}) == convplan.__all__


# What importing costs

HEAVY = ("torch", "triton", "sqlalchemy", "typer", "rich", "numpy", "psutil", "platformdirs", "msgspec")


def imported_by(code: str) -> set[str]:
    """Which heavy modules a new process has imported after some code."""
    found = run_python(f"{code}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))")
    return set(json.loads(found))


def test_importing_loads_nothing_heavy() -> None:
    assert imported_by("import convplan; convplan.__version__; dir(convplan)") == set()


def test_describing_problems_and_policies_needs_no_torch() -> None:
    code = "from convplan import Problem, Policy, NoPlan; Problem.dense('fprop', (1, 2, 8), (3, 2, 3)); Policy()"
    assert imported_by(code) == {"msgspec"}


def test_importing_changes_nothing() -> None:
    code = (
        "import warnings, logging, os; before = (list(warnings.filters), logging.root.handlers[:], dict(os.environ))\n"
    )
    code += "import convplan; after = (list(warnings.filters), logging.root.handlers[:], dict(os.environ))\n"
    code += "print(before == after)"
    assert run_python(code).split() == ["True"]


# The version


def test_the_version_is_the_changelogs_newest() -> None:
    changelog = ROOT / "CHANGELOG.md"
    assert changelog.exists(), "CHANGELOG.md tells users what changed"
    entries = re.findall(
        r"^## \[?v?(\d+\.\d+\.\d+\S*?)\]?(?:\s|$)", changelog.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert entries, "CHANGELOG.md has no entry such as '## [0.1.0]'"
    assert entries[0] == convplan.__version__


# The tree of errors

ERRORS = {
    cls.__name__: cls for cls in vars(_errors).values() if inspect.isclass(cls) and issubclass(cls, ConvPlanError)
}
LINE = re.compile(r"^    (?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+)(?: \(also (?P<also>\w+)\))?(?P<rest> {2,}.*)?$")


def printed_tree() -> dict[str, tuple[str, str | None, list[str]]]:
    """Name -> parent, further base, attributes, as the module's text prints them."""
    tree: dict[str, tuple[str, str | None, list[str]]] = {}
    path: list[str] = []
    for line in (_errors.__doc__ or "").splitlines():
        found = LINE.match(line)
        if found is None:
            continue
        depth = len(found["branch"]) // 4
        path = [*path[:depth], found["name"]]
        parent = path[depth - 1] if depth else "Exception"
        tree[found["name"]] = (parent, found["also"], re.findall(r"(?<= )\.(\w+)", found["rest"] or ""))
    return tree


def test_the_printed_tree_is_the_real_one() -> None:
    real = {}
    for name, cls in ERRORS.items():
        first, *others = (base.__name__ for base in cls.__bases__)
        real[name] = (first, others[0] if others else None)
    assert {name: (parent, also) for name, (parent, also, _) in printed_tree().items()} == real


def test_every_error_is_public() -> None:
    assert set(ERRORS) <= set(convplan.__all__)
    assert issubclass(convplan.ConvPlanWarning, UserWarning)


REJECTIONS = (("fft[block=8]", "build: no memory"), ("aten", "verify: wrong"))
EXAMPLES: list[ConvPlanError] = [
    _errors.ConvPlanError("something"),
    _errors.SpecError("groups is 5, expected a divisor of C = 6"),
    _errors.PolicyError("unknown engine 'warp'"),
    _errors.NoPlan(problem="fprop x=1", policy="Policy()", rejections=REJECTIONS),
    _errors.ReplayMiss(problem="fprop x=1", policy="Policy()", rejections=REJECTIONS),
    _errors.CaptureMiss(problem="fprop x=1", policy="Policy()", rejections=REJECTIONS),
    _errors.TooLarge(problem="fprop x=1", needed_bytes=2048, free_bytes=1024),
    _errors.PlanRejected(engine="fft", config="fft[block=8]", reason="too long"),
    _errors.WrongResult(engine="fft", config="fft[block=8]", reason="output[0] is 1, not 2"),
    _errors.EngineUnavailable(engine="cudnn", needs="cuDNN 9.1 or newer, found 8.9.7"),
    _errors.ExecutionFailed(plan="fprop x=1", tried=REJECTIONS),
    _errors.FuseError(model="ResNet", reason="it is in training mode"),
    _errors.ErrataError(path="errata.json", rule="no-engine-5", field="engines[0]", reason='found "5", expected int'),
    _errors.StoreError(path="/data/plans.sqlite", reason="disk full"),
    _errors.StoreBusy(path="/data/plans.sqlite", waited_s=2.5),
    _errors.StoreMismatch(path="/data/plans.sqlite", found="9", expected="1"),
    _errors.PlanFileError(path="plans.json", reason="groups: expected int"),
]


def test_there_is_an_example_of_every_error() -> None:
    assert [type(example).__name__ for example in EXAMPLES] == list(ERRORS)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_survive_the_way_back_from_another_process(error: ConvPlanError, protocol: int) -> None:
    for back in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(back) is type(error)
        assert str(back) == str(error)
        assert back.args == error.args
        assert vars(back) == vars(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_carry_their_data_and_say_it(error: ConvPlanError) -> None:
    name = type(error).__name__
    tree = printed_tree()
    attributes = []
    while name in tree:
        parent, _, own = tree[name]
        attributes += own
        name = parent
    for attribute in attributes:
        value = getattr(error, attribute)
        said = [text for pair in value for text in pair] if isinstance(value, tuple) else [f"{value}"]
        if isinstance(error, (convplan.ReplayMiss, convplan.CaptureMiss)) and attribute == "rejections":
            continue  # nothing was tried
        if attribute == "engine" and getattr(error, "config", ""):
            continue  # the configuration says it
        for text in said:
            assert text in str(error), attribute


def test_an_error_with_nothing_to_list_says_so() -> None:
    assert "no engine proposed a candidate" in str(_errors.NoPlan(problem="p", policy="q"))
    assert str(_errors.PlanRejected(engine="fft", reason="one tap")) == "fft: one tap"
