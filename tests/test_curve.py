"""How a search went, as text."""

from __future__ import annotations

from convplan.report import curve_text


def test_no_search_is_no_text() -> None:
    assert curve_text(()) == ""


def test_each_improvement_is_a_line_with_a_bar_as_long_as_its_time() -> None:
    lines = curve_text(((0.5, 80.0), (1.25, 40.0), (60.0, 39.0))).splitlines()
    assert lines[0].split() == ["after", "best", "so", "far"]
    assert [line.split()[:4] for line in lines[1:]] == [
        ["500.0", "ms", "80.0", "us"],
        ["1.25", "s", "40.0", "us"],
        ["60.00", "s", "39.0", "us"],
    ]
    assert [line.count("#") for line in lines[1:]] == [40, 20, 0]
    assert lines[-1].endswith("the end, as raced")


def test_a_search_that_found_nothing_better_has_its_end_alone() -> None:
    assert len(curve_text(((3.0, 10.0),)).splitlines()) == 2


def test_of_many_improvements_the_first_the_last_and_the_largest_are_shown() -> None:
    curve = [(float(second), 1000.0 - second) for second in range(100)]
    curve[50:] = [(seconds, best / 2) for seconds, best in curve[50:]]  # the one large step
    lines = curve_text([*curve, (120.0, 440.0)], lines=6).splitlines()
    assert len(lines) == 1 + 6
    assert lines[1].split()[:2] == ["0.00", "us"]  # seconds, worded like every time
    assert any(line.split()[:2] == ["50.00", "s"] for line in lines)
    assert any(line.split()[:2] == ["99.00", "s"] for line in lines)
