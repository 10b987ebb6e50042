"""How many seeds a table says it is of."""

import pytest

from common.reports import mean_and_deviation, seeds_behind


def rows(*counts):
    return [
        {"method": f"method {place}", "budget": 0.5, "epochs": 0, "seed": seed}
        for place, count in enumerate(counts)
        for seed in range(count)
    ]


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((1, 1), "One seed."),
        ((3, 3), "Mean ± standard deviation of 3 seeds."),
        ((3, 1), "±: of 3 seeds, else of one."),
        ((2, 3, 1), "±: of 2 or 3 seeds, else of one."),
    ],
)
def test_a_table_says_of_how_many_seeds_its_figures_are(counts, said):
    assert seeds_behind(rows(*counts)) == said


def test_one_value_has_no_deviation_and_none_is_a_dash():
    assert mean_and_deviation([]) == "-"
    assert mean_and_deviation([1.5]) == "1.50"
    assert mean_and_deviation([1, 3]) == "2.00 ± 1.41"
