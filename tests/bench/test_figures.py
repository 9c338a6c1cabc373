"""One figure out of a column."""

import math

import pytest

from stable_opd.bench.figures import figure, values
from stable_opd.bench.spec import Metric

ROWS = [
    {"step": "0", "val": "0.3", "train": ""},
    {"step": "0", "val": "", "train": "5"},
    {"step": "1", "val": "", "train": "nan"},
    {"step": "2", "val": "0.9", "train": "1"},
    {"step": "3", "val": "0.5", "train": "3"},
]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (Metric("val"), 0.5),
        (Metric("val", "max"), 0.9),
        (Metric("val", "min"), 0.3),
        (Metric("val", "mean", 2), 0.7),
        (Metric("val", "mean", 100), 1.7 / 3),
        (Metric("train", "max"), 5.0),
        (Metric("train", "mean", 3), 3.0),
        (Metric("absent"), None),
        (Metric("absent", "max"), None),
        (Metric("val", "first", above=0.4), 2.0),
        (Metric("val", "first", above=0.5), 2.0),
        (Metric("val", "first", above=0.9), math.inf),
        (Metric("train", "first", above=2.0), 0.0),
        (Metric("absent", "first", above=0.4), None),
    ],
)
def test_reductions_skip_what_was_not_logged(metric, expected):
    assert figure(ROWS, metric) == (expected if expected is None else pytest.approx(expected))


def test_a_run_that_ends_in_nan_says_so():
    assert math.isnan(figure(ROWS[:3], Metric("train")))
    assert figure(ROWS[2:3], Metric("train", "max")) is None


def test_values_come_with_their_steps():
    assert values(ROWS, "val") == [(0, 0.3), (2, 0.9), (3, 0.5)]
