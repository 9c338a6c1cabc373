import pytest
import torch

from stable_opd import Cosine, Linear
from stable_opd.schedules import Step
from stable_opd.weightings import PrefixHorizon
from weightings.looks import draw, of_rows, part


def naive(look, horizon):
    """Count the student's tokens of each row, one by one; what others wrote is not asked."""
    found = []
    for own in of_rows(look, look.own):
        seen = 0
        for mine in own:
            found.append(float(seen < horizon) if mine else None)
            seen += mine
    return found


def agrees(weights, expected):
    return all(value is None or weight == value for weight, value in zip(weights.tolist(), expected, strict=True))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tokens", [1, 3, 8, 100])
def test_first_tokens_of_the_students_count(seed, tokens):
    look = draw(seed)
    weights = PrefixHorizon(tokens)(look)
    assert agrees(weights, naive(look, tokens))
    rows = torch.arange(len(look.rollout)).flip(0)
    assert (PrefixHorizon(tokens)(part(look, rows)) == weights[look.rollout.places(rows)]).all()


@pytest.mark.parametrize(
    ("schedule", "progress", "horizon"),
    [
        (Linear(0.1, 1.0), 0.0, 1),
        (Linear(0.1, 1.0), 0.5, 6),  # 5.5 tokens: the part counts as a whole
        (Linear(0.1, 1.0), 1.0, 10),
        (Linear(1.0, 0.0), 1.0, 1),  # one token at least
        (Cosine(0.3, 1.0), 0.0, 3),
        (Step(0.5, 0.2, 0.7), 0.49, 2),
        (Step(0.5, 0.2, 0.7), 0.5, 7),
        (None, 0.7, 10),
    ],
)
def test_horizon_grows_with_the_schedule(schedule, progress, horizon):
    look = draw(3, lengths=[12, 4, 0, 12], progress=progress, mixed=False)
    weights = PrefixHorizon(10, schedule)(look)
    assert [int(sum(row)) for row in of_rows(look, weights)] == [horizon, min(4, horizon), 0, horizon]
    assert agrees(weights, naive(look, horizon))


def test_schedule_is_a_part_of_the_weighting():
    """So that one that follows a metric is found, and saved."""
    weighting = PrefixHorizon(5, Linear())
    assert any(isinstance(module, Linear) for module in weighting.modules())


@pytest.mark.parametrize("tokens", [0, -3])
def test_horizon_without_tokens_is_refused(tokens):
    with pytest.raises(ValueError, match=r"Expected a horizon of at least 1 token, but got"):
        PrefixHorizon(tokens)
