"""metrics/summary.py: the figures of tables by hand."""

import pytest

from metrics.summary import Summary, average_over_steps, harmonic_mean, missing_steps, require_complete, summarise


def test_figures_by_hand():
    found = summarise({0: [0.9, 0.5, None], 1: [0.6, 0.2, None, 0.1, 0.3]}, num_base=3)
    assert found == {
        0: Summary(pytest.approx(0.7), None, pytest.approx(0.7), None, pytest.approx(0.7)),
        1: Summary(
            old=pytest.approx(0.4),
            new=pytest.approx(0.2),
            all=pytest.approx(0.3),
            harmonic_mean=pytest.approx(2 * 0.4 * 0.2 / 0.6),
            average_over_steps=pytest.approx((0.7 + 0.3) / 2),
        ),
    }


def test_a_base_class_that_occurs_late_is_old():
    """It has no pixel in the test of step 0."""
    assert summarise({0: [50.0, None], 1: [50.0, 20.0, 10.0]}, 2)[1].old == 35


def test_nothing_counted_has_no_figures():
    assert summarise({0: [None, None]}, 1) == {0: Summary(None, None, None, None, None)}


def test_harmonic_mean_by_hand():
    assert harmonic_mean(60.0, 20.0) == 30
    assert harmonic_mean(0.0, 0.0) == 0
    assert harmonic_mean(60.0, None) is None


def test_there_is_no_average_after_a_gap():
    assert average_over_steps({0: 4.0, 1: 2.0, 3: 1.0}) == {0: 4, 1: 3, 3: None}
    assert average_over_steps({1: 2.0, 2: 1.0}) == {1: None, 2: None}
    assert average_over_steps({0: 4.0, 1: None, 2: 2.0}) == {0: 4, 1: 4, 2: 3}
    assert missing_steps([0, 1, 3]) == [2] and missing_steps([2]) == [0, 1] and missing_steps([], 1) == [0, 1]


def test_a_gap_is_refused():
    require_complete([], "x")
    require_complete([1, 0], "x")
    with pytest.raises(
        ValueError, match=r"^a.csv has scores of the steps 1, 2, .*: step 0 has not been tested; .* --test --step 0 "
    ):
        require_complete([2, 1], "a.csv")
