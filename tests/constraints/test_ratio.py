import pytest
import torch

from constraints.common import draw_logits
from helpers import make_evidence
from stable_opd.constraints import RatioPenalty


def test_loss_is_half_the_squared_logarithm_of_the_ratio():
    student = torch.tensor([[0.2, 0.8], [0.5, 0.5]]).log()
    behaviour = torch.tensor([0.4, 0.5]).log()
    found = RatioPenalty(0.1)(make_evidence(torch.tensor([0, 1]), student, behaviour=behaviour))
    penalty = torch.tensor([0.5 * torch.tensor(0.5).log() ** 2, 0.0])
    torch.testing.assert_close(found.value, penalty)
    torch.testing.assert_close(found.loss, 0.1 * penalty)


def test_on_policy_there_is_neither_loss_nor_gradient():
    logits = draw_logits()[0].requires_grad_()
    logprobs = logits.log_softmax(-1)
    seen = make_evidence(torch.arange(6), logprobs, behaviour=logprobs.diagonal().detach())
    found = RatioPenalty(1.0)(seen)
    (gradient,) = torch.autograd.grad(found.loss.sum(), logits)
    assert found.loss.abs().max() == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("distance", [1e-2, 1e-3])
def test_near_the_behaviour_it_is_the_divergence_from_it(distance):
    """In value and gradient, by enumeration of what the behaviour may draw; the error is of the next order."""
    behaviour, change = (draw_logits(n=1, scale=1.0)[k] for k in (0, 1))
    student = (behaviour + distance * change).requires_grad_()
    p, b = student.log_softmax(-1)[0], behaviour.log_softmax(-1)[0]
    seen = make_evidence(torch.arange(9), p.expand(9, 9), behaviour=b)
    estimate = (b.exp() * RatioPenalty(1.0)(seen).loss).sum()
    divergence = (b.exp() * (b - p)).sum()
    (found,) = torch.autograd.grad(estimate, student, retain_graph=True)
    (expected,) = torch.autograd.grad(divergence, student)
    assert estimate.item() == pytest.approx(divergence.item(), rel=5 * distance)
    assert (found - expected).norm() < 5 * distance * expected.norm()


def test_looks_at_each_position_by_itself():
    assert RatioPenalty.support == "sampled"
    assert RatioPenalty.positionwise
    assert not RatioPenalty.needs_teacher
    assert not RatioPenalty.needs_reference
