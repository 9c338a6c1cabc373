"""Whether a sampler says that it draws from the student's own distribution, and whether it does."""

import pytest
import torch

from stable_opd import Sampler, Temperature, TopP
from stable_opd.samplers import MinP, TopK

LOGITS = 3 * torch.randn(20, 90, generator=torch.Generator().manual_seed(0))
PREFIX = torch.zeros(20, 0, dtype=torch.long)

FOLLOWING = [Temperature(), TopP(1.0), MinP(0.0)]
DEPARTING = [
    Temperature(0.0),
    Temperature(0.9),
    Temperature(1.1),
    TopP(),
    TopP(1.0, 0.9),
    TopK(),
    MinP(),
    MinP(0.0, 1.1),
]


def name(sampler):
    return f"{type(sampler).__name__}({', '.join(map(str, sampler.request().values()))})"


@pytest.mark.parametrize("sampler", FOLLOWING, ids=name)
def test_what_follows_the_student_leaves_its_distribution_alone(sampler):
    assert sampler.follows_student is True
    torch.testing.assert_close(sampler(LOGITS, PREFIX), LOGITS, rtol=0, atol=0)


@pytest.mark.parametrize("sampler", DEPARTING, ids=name)
def test_what_does_not_changes_it(sampler):
    assert sampler.follows_student is False
    assert (sampler(LOGITS, PREFIX).softmax(-1) - LOGITS.softmax(-1)).abs().max() > 1e-6


def test_sampler_of_ones_own_does_not_unless_it_says_so():
    class Own(Sampler):
        """Leaves the logits alone."""

        def forward(self, logits, prefix):
            return logits

    assert Own().follows_student is False
