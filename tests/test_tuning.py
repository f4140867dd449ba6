"""The walk to the best search settings."""

import pytest

from prunelm.decoding.tuning import walk


def test_it_ends_in_the_valley_and_asks_for_no_place_twice() -> None:
    asked: list[tuple[float, float]] = []

    def cost(place: tuple[float, float]) -> float:
        asked.append(place)
        return (place[0] - 0.72) ** 2 + 0.3 * (place[1] - 3.1) ** 2

    best, value = walk(cost, (0.3, 1.0), (0.1, 0.5))
    assert best == (0.7, 3.0) and value == pytest.approx(0.02**2 + 0.3 * 0.1**2)
    assert len(asked) == len(set(asked)) and len(asked) < 40


def test_it_stays_where_nothing_is_better_and_never_goes_below_0() -> None:
    assert walk(lambda place: 1.0, (0.3, 1.0), (0.1, 0.5)) == ((0.3, 1.0), 1.0)
    assert walk(sum, (0.3, 1.0), (0.1, 0.5)) == ((0.0, 0.0), 0.0)


def test_a_step_of_0_leaves_a_number_as_it_is() -> None:
    best, _ = walk(lambda place: abs(place[0] - 9) + place[1], (0.25, 1.0), (0.0, 0.5))
    assert best == (0.25, 0.0)
