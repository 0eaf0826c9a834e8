"""Policies: what they refuse, how they follow torch's own flags, and when they let a problem be tuned."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from helpers.fresh import fresh_process

import convplan
from convplan import Policy, PolicyError, Problem, SpecError
from convplan._policy import TorchFlags
from convplan.engines import registry


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


@pytest.fixture(autouse=True)
def torch_flags_restored() -> Iterator[None]:
    """Torch's flags, and the precision settings in both spellings, as they were."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch._C._get_cudnn_deterministic()
    precisions = {at: torch._C._get_fp32_precision_getter(*at) for at in (("cuda", "conv"), ("cuda", "rnn"))}
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.backends.cudnn.deterministic = cudnn
    for at, value in precisions.items():
        torch._C._set_fp32_precision_setter(*at, value)


# What bad input gets

REFUSED = [
    pytest.param({"deterministic": "yes"}, "deterministic is 'yes', expected True, False or None", id="text-flag"),
    pytest.param({"allow_tf32": 2}, "allow_tf32 is 2, expected True, False or None", id="number-flag"),
    pytest.param({"effort": "max"}, "effort is 'max', expected one of instant, measure", id="effort"),
    pytest.param({"mode": "off"}, "mode is 'off', expected one of auto, replay", id="mode"),
    pytest.param({"tuning_limit_s": -1}, "tuning_limit_s is -1, expected None or a number", id="tuning-limit"),
    pytest.param({"tuning_limit_s": float("nan")}, "tuning_limit_s is nan, expected None", id="tuning-limit-nan"),
    pytest.param({"tuning_limit_s": True}, "tuning_limit_s is True, expected None", id="tuning-limit-bool"),
    pytest.param({"capture_miss": "warn"}, "capture_miss is 'warn', expected one of stock, error", id="capture-miss"),
    pytest.param({"replay_miss": "warn"}, "replay_miss is 'warn', expected one of error, instant", id="replay-miss"),
    pytest.param({"tune_after": 0}, "tune_after is 0, expected an integer >= 1", id="tune-after-0"),
    pytest.param({"tune_after": 1.5}, "tune_after is 1.5, expected an integer >= 1", id="tune-after-float"),
    pytest.param({"tune_after": True}, "tune_after is True, expected an integer >= 1", id="tune-after-bool"),
    pytest.param({"benchmark_limit": -1}, "benchmark_limit is -1, expected an integer >= 0", id="limit-negative"),
    pytest.param(
        {"workspace_limit_bytes": -5}, "workspace_limit_bytes is -5, expected an integer >= 0", id="workspace"
    ),
    pytest.param({"workspace_limit_bytes": 1e6}, "workspace_limit_bytes is 1000000.0, expected", id="workspace-float"),
    pytest.param({"budget_s": 0}, "budget_s is 0, expected a finite number of seconds > 0", id="budget-0"),
    pytest.param({"budget_s": -1.0}, "budget_s is -1.0, expected a finite number", id="budget-negative"),
    pytest.param({"budget_s": math.inf}, "budget_s is inf, expected a finite number", id="budget-inf"),
    pytest.param({"budget_s": math.nan}, "budget_s is nan, expected a finite number", id="budget-nan"),
    pytest.param({"budget_s": "1"}, "budget_s is '1', expected a finite number", id="budget-text"),
    pytest.param({"budget_s": True}, "budget_s is True, expected a finite number", id="budget-bool"),
    pytest.param({"engines": "aten"}, "engines is 'aten', expected a sequence of names", id="engines-text"),
    pytest.param({"engines": ()}, "engines is empty, expected None", id="engines-none"),
    pytest.param({"engines": ("aten", " ")}, r"engines is \('aten', ' '\), expected a sequence of names", id="blank"),
    pytest.param({"engines": ("aten", 3)}, r"engines is \('aten', 3\), expected a sequence of names", id="engine-int"),
    pytest.param({"engines": 3}, "engines is 3, expected a sequence of names", id="engines-number"),
    pytest.param({"engines": ("aten", "ATEN")}, r"\('aten', 'ATEN'\), expected every name once", id="engine-twice"),
    pytest.param({"allow_notes": "FFT"}, "allow_notes is 'FFT', expected a sequence of names", id="notes-text"),
    pytest.param({"allow_notes": ("a", "A")}, r"\('a', 'A'\), expected every name once", id="note-twice"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_bad_values_are_named_with_what_was_expected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy(**fields)
    # A changed copy is checked like a new one, and what was there stays.
    plain = Policy()
    with pytest.raises(PolicyError, match=message):
        plain.replace(**fields)
    assert plain == Policy()


def test_policy_errors_are_spec_errors_and_value_errors() -> None:
    with pytest.raises(ValueError, match="tune_after") as caught:
        Policy(tune_after=0)
    assert isinstance(caught.value, SpecError)


@pytest.mark.parametrize("name", ["deterministic", "allow_tf32"])
@pytest.mark.parametrize("value", [0, 1])
def test_a_number_is_no_flag(name: str, value: int) -> None:
    # 1 == True: it would make an equal policy with another text, which is another key, and JSON that is refused.
    with pytest.raises(PolicyError, match=f"{name} is {value}, expected True, False or None"):
        Policy(**{name: value})  # type: ignore[arg-type]


def test_decoding_runs_the_checks_of_the_constructor() -> None:
    policy = Policy(engines=("aten",), budget_s=0.5, workspace_limit_bytes=0, allow_notes=("FFT",))
    assert msgspec.json.decode(msgspec.json.encode(policy), type=Policy) == policy
    for text, message in [
        (b'{"tune_after": 0}', "tune_after is 0"),
        (b'{"deterministic": 1}', "deterministic"),
        (b'{"effort": "max"}', "effort"),
        (b'{"speed": 1}', "unknown field `speed`"),
    ]:
        with pytest.raises(msgspec.ValidationError, match=message):
            msgspec.json.decode(text, type=Policy)


# Names


def test_names_are_normalized_as_the_registry_stores_them() -> None:
    policy = Policy(engines=[" ATen", "FFT "], allow_notes=[" down_convert_inputs"])  # type: ignore[arg-type]
    assert policy.engines == ("aten", "fft")
    assert policy.allow_notes == ("DOWN_CONVERT_INPUTS",)
    same = Policy(engines=("aten", "fft"), allow_notes=("DOWN_CONVERT_INPUTS",))
    assert policy == same
    assert hash(policy) == hash(same)
    assert policy.key_items() == same.key_items()
    assert [engine.name for engine in registry.allowed(policy.engines)] == ["aten", "fft"]


def _tiny() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)


UNKNOWN_ENGINE: list[Any] = [
    pytest.param(lambda p: convplan.plan(Problem.dense("fprop", (1, 1, 3), (1, 1, 2)), p), id="plan"),
    pytest.param(lambda p: convplan.tune([Problem.dense("fprop", (1, 1, 3), (1, 1, 2))], policy=p), id="tune"),
    pytest.param(lambda p: convplan.enable(p), id="enable"),
    pytest.param(lambda p: contextlib.ExitStack().enter_context(convplan.enabled(p)), id="enabled"),
    pytest.param(lambda p: convplan.conv2d(*_tiny(), policy=p), id="conv2d"),
    pytest.param(lambda p: convplan.conv_transpose2d(*_tiny(), policy=p), id="conv_transpose2d"),
]


@pytest.mark.parametrize("use", UNKNOWN_ENGINE)
def test_an_unknown_engine_is_an_error_that_lists_the_known_ones(use: Callable[[Policy], object]) -> None:
    with pytest.raises(PolicyError, match="unknown engine 'warp'; registered engines: ") as caught:
        use(Policy(engines=("aten", "warp")))
    listed = str(caught.value).partition("registered engines: ")[2].split(", ")
    assert listed == list(registry.names())
    assert "aten" in listed
    # Nothing changed: convolutions still go to stock torch.
    convplan.stats(reset=True)
    torch.nn.functional.conv2d(*_tiny())
    assert set(convplan.stats().values()) == {0}


@pytest.mark.parametrize("policy", ["fast", 3, {"effort": "instant"}])
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(PolicyError, match=r"expected a convplan\.Policy or None"):
        convplan.enable(policy)


# Torch's flags


def test_the_default_follows_torch_when_it_is_asked() -> None:
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    assert Policy().resolve().deterministic is False
    torch.use_deterministic_algorithms(True)
    assert Policy().resolve().deterministic is True
    assert Policy.from_torch().deterministic is True
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = True
    assert Policy.from_torch().deterministic is True


@pytest.mark.behaviour("B10")
def test_tf32_follows_the_old_spelling() -> None:
    for wanted in (True, False, True):
        torch.backends.cudnn.allow_tf32 = wanted
        assert Policy.from_torch().allow_tf32 is wanted


@pytest.mark.behaviour("B10")
def test_tf32_follows_the_new_spelling() -> None:
    for precision in ("tf32", "ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = precision
        assert Policy.from_torch().allow_tf32 is (precision == "tf32")


@pytest.mark.behaviour("B10")
def test_mixed_spellings_are_read_without_an_error() -> None:
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    assert Policy.from_torch().allow_tf32 is False


@pytest.mark.behaviour("B10")
def test_scoped_flags_hold_inside_their_block_only() -> None:
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.deterministic = False
    policy = Policy()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        inside = policy.resolve()
    after = policy.resolve()
    assert (inside.deterministic, inside.allow_tf32) == (True, False)
    assert (after.deterministic, after.allow_tf32) == (False, True)


def test_reading_the_flags_changes_none_of_them() -> None:
    def read() -> tuple[object, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.conv.fp32_precision,
            torch.get_float32_matmul_precision(),
        )

    before = read()
    Policy.from_torch()
    assert read() == before


@pytest.mark.parametrize("deterministic", [None, True, False])
@pytest.mark.parametrize("allow_tf32", [None, True, False])
def test_resolve_decides_only_what_was_left_open(deterministic: bool | None, allow_tf32: bool | None) -> None:
    policy = Policy(deterministic=deterministic, allow_tf32=allow_tf32, budget_s=0.25, engines=("aten",))
    for seen in (TorchFlags(True, False), TorchFlags(False, True)):
        resolved = policy.resolve(seen)
        assert resolved.deterministic is (seen.deterministic if deterministic is None else deterministic)
        assert resolved.allow_tf32 is (seen.allow_tf32 if allow_tf32 is None else allow_tf32)
        assert resolved.replace(deterministic=deterministic, allow_tf32=allow_tf32) == policy
        assert resolved.resolve(TorchFlags(False, False)) == resolved


# When a problem is tuned

SIGHTS = [
    pytest.param({"deterministic": False}, 2, id="default"),
    pytest.param({"deterministic": False, "tune_after": 1}, 1, id="at-once"),
    pytest.param({"deterministic": False, "tune_after": 5}, 5, id="later"),
    pytest.param({"deterministic": True}, None, id="deterministic-never-in-mid-run"),
    pytest.param({"deterministic": True, "tune_after": 2}, None, id="deterministic-2"),
    pytest.param({"deterministic": True, "tune_after": 1}, 1, id="deterministic-at-once"),
    pytest.param({"effort": "instant", "tune_after": 1}, None, id="instant"),
    pytest.param({"mode": "replay", "tune_after": 1}, None, id="replay"),
    pytest.param({"mode": "replay", "replay_miss": "instant", "tune_after": 1}, None, id="replay-instant"),
]


@pytest.mark.parametrize(("fields", "sight"), SIGHTS)
def test_sighting_at_which_a_problem_is_tuned(fields: dict[str, Any], sight: int | None) -> None:
    assert Policy(**fields).tunes_at_sight == sight


# Values


def test_replace_makes_a_changed_copy() -> None:
    policy = Policy(tune_after=3)
    changed = policy.replace(engines=["ATEN"], effort="instant")
    assert (policy.engines, policy.effort) == (None, "measure")
    assert (changed.engines, changed.effort, changed.tune_after) == (("aten",), "instant", 3)


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Policy().tune_after = 3  # type: ignore[misc]


def test_text_shows_what_differs_from_the_default() -> None:
    assert str(Policy()) == "Policy()"
    assert str(Policy(tune_after=1, engines=("fft",))) == "Policy(engines=('fft',), tune_after=1)"


@pytest.mark.parametrize(
    "fields",
    [{"workspace_limit_bytes": 0}, {"budget_s": 1}, {"budget_s": 1e-6}, {"benchmark_limit": 0}, {"tune_after": 10**6}],
)
def test_the_edges_of_what_is_allowed(fields: dict[str, Any]) -> None:
    policy = Policy(**fields)
    assert all(getattr(policy, name) == value for name, value in fields.items())
