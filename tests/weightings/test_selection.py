import math

import pytest
import torch

from helpers import make_rollout
from stable_opd.look import Glance
from stable_opd.weightings import TokenSelection
from weightings.looks import Meeting, draw, halves, look_of, part

SEEDS = range(12)


def naive(look, share):
    """Score all tokens of the student's, sort them, and keep those that reach the last that is needed."""
    own = look.own.nonzero().squeeze(1).tolist()
    scales = []
    for values in (look.glance.entropy.double(), look.glance.divergence.double()):
        low, high = (min(values[own].tolist()), max(values[own].tolist())) if own else (0, 0)
        scales.append([(value - low) / (high - low) if high > low else 0.0 for value in values.tolist()])
    scores = {place: 1 - (1 - h) * (1 - d) for place, (h, d) in enumerate(zip(*scales, strict=True)) if place in own}
    needed = max(1, math.ceil(round(share * len(own), 6)))
    least = sorted(scores.values())[-needed] if own else 0.0
    return {place for place, score in scores.items() if score >= least}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.7, 1.0])
def test_tokens_with_the_highest_scores_count(seed, share):
    look = draw(seed)
    weights = TokenSelection(share)(look)
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    assert set((weights > 0).nonzero().squeeze(1).tolist()) == naive(look, share)


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_share_is_rounded_up(count):
    look = draw(0, lengths=[count], mixed=False)
    assert TokenSelection(0.3)(look).sum() == math.ceil(0.3 * count - 1e-9)


def test_either_is_enough_and_both_are_no_more_than_one():
    """An entropy at the top of its scale gives 1 whatever the divergence is, and the other way round."""
    entropy, divergence = torch.tensor([0.0, 2.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.5, 0.25])
    look = look_of(make_rollout([[1, 2, 3, 4]]), seen=Glance(*torch.zeros(2, 4), entropy, divergence))
    assert TokenSelection(0.5)(look).tolist() == [0.0, 1.0, 1.0, 0.0]
    assert TokenSelection(0.75)(look).tolist() == [0.0, 1.0, 1.0, 1.0]


def test_tokens_that_tie_count_together():
    entropy = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.0])
    look = look_of(make_rollout([[1, 2, 3, 4, 5]]), seen=Glance(*torch.zeros(2, 5), entropy, torch.zeros(5)))
    assert TokenSelection(0.4)(look).tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    alike = look_of(look.rollout, seen=Glance(*torch.ones(4, 5)))
    assert TokenSelection(0.2)(alike).tolist() == [1.0] * 5


def test_what_is_the_same_everywhere_decides_nothing():
    seen = Glance(*torch.zeros(2, 3), torch.full((3,), 2.0), torch.tensor([0.1, 0.9, 0.5]))
    assert TokenSelection(0.3)(look_of(make_rollout([[1, 2, 3]]), seen=seen)).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_two_processes_select_what_one_does(seed):
    look = draw(seed)
    rows, weights = halves(look), TokenSelection(0.4)(look)
    found = Meeting(look, rows).run((TokenSelection(0.4), TokenSelection(0.4)))
    for some, values in zip(rows, found, strict=True):
        assert (values == weights[look.rollout.places(some)]).all()


def test_processes_have_something_to_tell():
    """Otherwise the test above would pass on scales of one process."""
    different = 0
    for seed in SEEDS:
        look = draw(seed)
        rows = halves(look)[0]
        different += bool(
            (TokenSelection(0.4)(part(look, rows)) != TokenSelection(0.4)(look)[look.rollout.places(rows)]).any()
        )
    assert different > 4


def test_nobody_wrote_anything():
    look = look_of(make_rollout([[], []]), seen=Glance(*torch.zeros(4, 0)))
    assert TokenSelection()(look).shape == (0,)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.1, 50, float("nan")])
def test_share_outside_of_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"Expected share above 0 and at most 1, but got .*write 0\.5"):
        TokenSelection(share)
