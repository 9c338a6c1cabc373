import pytest
import torch

from helpers import make_rollout
from stable_opd.look import Glance
from stable_opd.weightings import PositionWeight
from weightings.looks import draw, look_of, of_rows, part

SEEDS = range(12)


def naive(look, largest):
    """The definition, token by token; where the student did not write nothing is said."""
    found = []
    gaps = of_rows(look, (look.glance.teacher - look.glance.student).abs().double())
    for row, own in zip(gaps, of_rows(look, look.own), strict=True):
        total = sum(gap for gap, mine in zip(row, own, strict=True) if mine)
        for place, mine in enumerate(own):
            before = sum(row[earlier] for earlier in range(place) if own[earlier])
            share = before / total if total else 0.0
            found.append(1 + (largest - 1) * (1 - share) if mine else None)
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("largest", [1.0, 1.5, 4.0])
def test_weight_is_that_of_the_definition(seed, largest):
    look = draw(seed)
    weights = PositionWeight(largest)(look)
    expected = naive(look, largest)
    assert weights.shape == look.own.shape
    assert weights.dtype == torch.float32
    assert ((weights >= 1) & (weights <= largest)).all()
    for weight, value in zip(weights.tolist(), expected, strict=True):
        assert value is None or weight == pytest.approx(value, rel=1e-6)


def test_example_by_hand():
    """Gaps of 1, 0, 2 and 1: a quarter of the disagreement is over after the first token."""
    rollout = make_rollout([[1, 2, 3, 4]])
    seen = Glance(torch.tensor([-1.0, -1.0, -1.0, -3.0]), torch.tensor([-2.0, -1.0, -3.0, -2.0]), *torch.zeros(2, 4))
    assert PositionWeight(3.0)(look_of(rollout, seen=seen)).tolist() == pytest.approx([3.0, 2.5, 2.5, 1.5])


def test_row_on_which_all_is_agreed_counts_as_a_row_that_begins():
    seen = Glance(*torch.zeros(4, 3))
    assert PositionWeight(1.5)(look_of(make_rollout([[1, 2, 3]]), seen=seen)).tolist() == [1.5] * 3


@pytest.mark.parametrize("seed", SEEDS)
def test_row_does_not_depend_on_its_neighbours(seed):
    look = draw(seed)
    weights = PositionWeight()(look)
    for row in range(len(look.rollout)):
        rows = torch.tensor([row])
        assert PositionWeight()(part(look, rows)).tolist() == pytest.approx(
            weights[look.rollout.places(rows)].tolist(), rel=1e-6
        )


@pytest.mark.parametrize("largest", [0.9, 0.0, -1.0, float("nan"), float("inf")])
def test_largest_below_one_is_refused(largest):
    with pytest.raises(ValueError, match=r"Expected largest of at least 1, but got .*PrefixHorizon"):
        PositionWeight(largest)
