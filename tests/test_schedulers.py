"""Sizes by round: they end at the target and have the shape asked."""

import pytest

from prunelm.pruning.schedulers import Incremental, OneShot


@pytest.mark.parametrize(
    "schedule",
    [OneShot(), *(Incremental(5, shape) for shape in ("cubic", "linear", "geometric"))],
    ids=repr,
)
@pytest.mark.parametrize(("start", "target"), [(1000, 250), (7, 7), (20_000_001, 1)])
def test_sizes_fall_to_the_target(schedule, start: int, target: int) -> None:
    sizes = schedule.sizes(start, target)
    assert sizes[-1] == target
    assert all(a >= b for a, b in zip((start, *sizes), sizes, strict=False))


def test_shapes() -> None:
    assert OneShot().sizes(100, 40) == (40,)
    assert Incremental(4, "linear").sizes(1000, 200) == (800, 600, 400, 200)
    assert Incremental(2, "geometric").sizes(1600, 100) == (400, 100)
    # 1 - (1 - t)^3 of the way: 7/8 after half of the rounds.
    assert Incremental(2, "cubic").sizes(900, 100) == (200, 100)


def test_bad_settings_name_the_key() -> None:
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        Incremental(0)
    with pytest.raises(ValueError, match="shape: expected cubic, linear or geometric, got 'x'"):
        Incremental(2, "x")
