"""What each f-divergence makes of one token; its gradient in the mean is the matter of test_sequence_gradient."""

import math

import pytest
import torch

from stable_opd.divergences.f_divergence import (
    SampledAlpha,
    SampledForwardKL,
    SampledJensenShannon,
    SampledTotalVariation,
)

F = {
    "forward KL": (SampledForwardKL(), lambda u: u * u.log()),
    "Jensen-Shannon": (
        SampledJensenShannon(),
        lambda u: (u * (2 * u / (1 + u)).log() + (2 / (1 + u)).log()) / 2,
    ),
    "total variation": (SampledTotalVariation(), lambda u: (u - 1).abs() / 2),
    "alpha 0.3": (SampledAlpha(0.3), lambda u: (1 - u**0.3) / (0.3 * 0.7)),
    "alpha 0.5": (SampledAlpha(), lambda u: 4 * (1 - u.sqrt())),
}
each = pytest.mark.parametrize(("term", "f"), F.values(), ids=F.keys())
RATIOS = torch.tensor([0.01, 0.3, 0.999, 1.001, 2.0, 30.0, 300.0], dtype=torch.float64)


def at(term, ratios):
    teacher = ratios.log() - 3
    return (function(torch.full_like(teacher, -3.0), teacher, None) for function in (term.advantage, term.estimate))


@each
def test_advantage_is_u_times_the_slope_minus_f_up_to_a_constant(term, f):
    u = RATIOS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(u).sum(), u)
    advantage, _ = at(term, RATIOS)
    difference = advantage - (u * slope - f(u)).detach()
    torch.testing.assert_close(difference, difference[0].expand(len(u)))


@each
def test_estimate_is_f_up_to_a_multiple_of_u_minus_1_and_never_negative(term, f):
    _, estimate = at(term, RATIOS)
    multiple = (estimate - f(RATIOS)) / (RATIOS - 1)
    torch.testing.assert_close(multiple, multiple[0].expand(len(RATIOS)), atol=1e-9, rtol=1e-7)
    assert (estimate > 0).all()


@each
def test_agreement_is_exactly_zero(term, f):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logprobs = -torch.rand(50, dtype=dtype) * 30
        for function in (term.advantage, term.estimate):
            assert function(logprobs, logprobs, None).abs().max() == 0


@each
def test_beyond_the_limit_nothing_grows(term, f):
    far = torch.tensor([-1e4, -6.0, 6.0, 1e4], dtype=torch.float64)
    for function in (term.advantage, term.estimate):
        found = function(torch.zeros(4, dtype=torch.float64), far, None)
        assert found.isfinite().all()
        assert found[0] == found[1]
        assert found[2] == found[3]


def test_limit_of_the_constructor_is_used():
    found = SampledForwardKL(limit=2.0).advantage(torch.tensor([0.0, 0.0]), torch.tensor([-9.0, 9.0]), None)
    torch.testing.assert_close(found, torch.tensor([math.exp(-2) - 1, math.exp(2) - 1]))


@pytest.mark.parametrize(
    ("term", "lowest"),
    [
        (SampledForwardKL(80.0), -1.0),
        (SampledJensenShannon(80.0), -math.log(2) / 2),
        (SampledTotalVariation(), -0.5),
        (SampledAlpha(0.25, 80.0), -4.0),
    ],
)
def test_punishment_is_bounded_as_the_documentation_says(term, lowest):
    found = term.advantage(torch.zeros(1, dtype=torch.float64), torch.full((1,), -80.0, dtype=torch.float64), None)
    assert found.item() == pytest.approx(lowest, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_alpha_outside_of_its_interval_is_refused_with_the_way_out(alpha):
    with pytest.raises(ValueError, match=rf"below 1, but got {alpha}\. Use SampledReverseKL .* and SampledForwardKL"):
        SampledAlpha(alpha)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_limit_that_is_not_positive_is_refused(limit):
    with pytest.raises(ValueError, match=rf"limit above 0, but got {limit}\. A large one"):
        SampledForwardKL(limit)
