import math
from dataclasses import replace

import pytest
import torch

from helpers import make_evidence
from stable_opd.constraints import Unlikelihood
from stable_opd.constraints.unlikelihood import CLAMP, unlikelihood


def test_loss_by_its_definition():
    p = torch.tensor([1e-12, 1e-3, 0.2, 0.499, 0.501, 0.9, 0.999], dtype=torch.float64)
    torch.testing.assert_close(unlikelihood(p.log()), -torch.log1p(-p))


@pytest.mark.parametrize("rest", [1e-1, 1e-3, 2e-5])
def test_keeps_its_digits_in_float32_where_the_student_is_certain(rest):
    """In float32, 1 - p is a multiple of 6e-8."""
    logprob = torch.tensor(math.log1p(-rest))
    exact = -math.log(-math.expm1(logprob.double().item()))
    assert unlikelihood(logprob).item() == pytest.approx(exact, rel=1e-5)


def test_continues_in_a_straight_line_below_the_clamp():
    """At the clamp neither value nor slope jump, and at p = 1 both are what they are there."""
    border = math.log1p(-CLAMP)
    logprobs = torch.tensor([border - 1e-9, border + 1e-9, border / 2, 0.0], dtype=torch.float64, requires_grad=True)
    loss = unlikelihood(logprobs)
    (slope,) = torch.autograd.grad(loss.sum(), logprobs)
    limit = (1 - CLAMP) / CLAMP
    torch.testing.assert_close(loss[0], loss[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(slope, torch.full_like(slope, limit), rtol=1e-3, atol=0)
    assert loss[3].item() == pytest.approx(-math.log(CLAMP) - limit * border)
    assert loss[3].item() < 12.6


def test_slope_keeps_its_digits_in_float32():
    """It is p / (1 - p), for tokens that are next to impossible as for those that are next to certain."""
    logprobs = torch.tensor([-40.0, -9.0, -4.0, -0.7, -0.6, -0.1, -1e-3], requires_grad=True)
    (slope,) = torch.autograd.grad(unlikelihood(logprobs).sum(), logprobs)
    exact = logprobs.detach().double()
    torch.testing.assert_close(slope, (exact.exp() / -exact.expm1()).float(), rtol=1e-5, atol=0)


def test_likely_and_unlikely_tokens_have_finite_gradients():
    logprobs = torch.tensor([-1e4, -100.0, -math.log(2), -1e-7, 0.0], requires_grad=True)
    unlikelihood(logprobs).sum().backward()
    assert logprobs.grad.isfinite().all()
    assert (logprobs.grad >= 0).all()


def test_speaks_about_tokens_that_complete_a_repeated_ngram():
    tokens = torch.tensor([1, 2, 3, 1, 2, 3, 1, 9, 1, 2])
    seen = make_evidence(tokens, torch.zeros(10, 10).log_softmax(-1))
    assert Unlikelihood(order=2)(seen).where.tolist() == [n in (4, 5, 6, 9) for n in range(10)]
    assert Unlikelihood(order=4)(seen).where.tolist() == [n == 6 for n in range(10)]
    two = replace(seen, row=torch.tensor([0] * 4 + [1] * 6))
    assert not Unlikelihood(order=2)(two).where.any()
    assert Unlikelihood(order=1)(two).where.tolist() == [n in (3, 8, 9) for n in range(10)]


def test_ngram_that_began_with_a_prefix_counts():
    """The student goes on with what somebody else wrote twice; its own token is the one that it unlearns."""
    seen = make_evidence(
        torch.tensor([1, 2, 1, 2]), torch.zeros(4, 3).log_softmax(-1), author=torch.tensor([1, 1, 1, 0])
    )
    assert Unlikelihood(order=2)(seen).where.tolist() == [False, False, False, True]


def test_descent_makes_the_loop_unlikely():
    logits = torch.tensor([[6.0, 0.0, 0.0]], dtype=torch.float64).repeat(6, 1).requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        found = Unlikelihood(order=1)(make_evidence(torch.zeros(6, dtype=torch.long), logits.log_softmax(-1)))
        (found.loss * found.where).sum().backward()
        optimizer.step()
    chances = logits.softmax(-1)[:, 0]
    assert chances[0] > 0.99
    assert (chances[1:] < 0.05).all()


def test_order_below_one_is_refused():
    with pytest.raises(ValueError, match="order of at least 1, but got 0"):
        Unlikelihood(order=0)


def test_follows_rows():
    assert Unlikelihood.support == "sampled"
    assert not Unlikelihood.positionwise
