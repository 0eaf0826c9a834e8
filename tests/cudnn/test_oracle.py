"""The oracle answers, and its answers are understood: shown before anything is compared with it."""

from __future__ import annotations

import oracle
import pytest
from oracle_cases import CASES, Case, strides

from convplan.engines.cudnn.device import load_for_absent_gpu


@pytest.fixture(autouse=True, scope="module")
def _a_driver_is_there() -> None:
    load_for_absent_gpu()


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_front_end_proposes_configurations(case: Case, mode: oracle.Mode) -> None:
    found = oracle.frontend_configs(case.spec(), mode)
    assert bool(found) is case.proposes
    for engine, knobs in found:
        assert 0 <= engine < 1000
        assert set(knobs) <= set(oracle.knob_names().values())


def test_asking_twice_gives_the_same_list() -> None:
    spec = by_name("wgrad-grouped").spec()
    assert oracle.frontend_configs(spec, "A") == oracle.frontend_configs(spec, "A") != []


def test_the_list_depends_on_what_is_asked() -> None:
    base = by_name("fprop-float16-channels_last").spec()
    changed = {
        "op": by_name("dgrad-float16-channels_last").spec(),
        "dtype": by_name("fprop-float32-channels_last").spec(),
        "size": by_name("fprop-one-sample").spec(),
        "padding": by_name("fprop-padding-after-only").spec(),
        "filter": by_name("fprop-1x1").spec(),
    }
    lists = {name: oracle.frontend_configs(spec, "A") for name, spec in changed.items()}
    assert [name for name, found in lists.items() if found == oracle.frontend_configs(base, "A")] == []


@pytest.mark.behaviour("B2")
def test_the_stride_of_a_filters_only_channel_decides_which_engines_there_are() -> None:
    for op, engine in (("fprop", 5), ("dgrad", 6)):
        engines = {
            name: {number for number, _ in oracle.frontend_configs(by_name(name).spec(), "A")}
            for name in (f"{op}-depthwise", f"{op}-depthwise-contiguous-filter")
        }
        assert [engine in found for found in engines.values()] == [True, False], engines


def test_names_of_configurations_are_read() -> None:
    assert oracle.parse_name("eng0") == (0, {})
    assert oracle.parse_name("eng22_k2=5_k13=1_k23=-1") == (22, {"tile_size": 5, "tilek": 1, "specfilt": -1})
    for name in ("INVALID_ENGINE_NAME_CFG", "eng22_2=5", "ConvFwd_eng1"):
        with pytest.raises(ValueError, match=f"calls a configuration '{name}'"):
            oracle.parse_name(name)


def test_knobs_are_those_of_the_installed_header() -> None:
    names = oracle.knob_names()
    assert (names[0], names[2], names[43]) == ("split_k", "tile_size", "swap_ab")
    assert sorted(names) == list(range(len(names))), "numbers have no gap, so none was overlooked"


def test_cases_have_names_of_their_own_and_sizes_that_fit() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60
    spec = by_name("wgrad-7x7-strided").spec()
    assert (spec["dims"]["y"], spec["strides"]["x"]) == ((4, 64, 112, 112), (150528, 1, 672, 3))
    assert by_name("fprop-padding-after-only").spec()["dims"]["y"] == (8, 64, 28, 28)
    assert strides((2, 3, 4, 5), "contiguous") == (60, 20, 5, 1)
    assert {case.groups for case in CASES} == {1, 4, 96}
