from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from constraints.common import STOP, draw_logits, outcomes, see
from stable_opd.constraints import ReferenceForwardKL, StopReferenceKL
from stable_opd.constraints.stop import stop_logprobs


def test_value_is_the_divergence_of_the_event_by_another_library():
    student, reference = draw_logits()
    found = StopReferenceKL(0.3)(see(student, reference))
    ours, theirs = (logits.softmax(-1)[:, list(STOP)].sum(-1) for logits in (student, reference))
    torch.testing.assert_close(found.value, kl_divergence(Bernoulli(theirs), Bernoulli(ours)))


def test_is_a_lower_bound_of_the_forward_divergence():
    seen = see(*draw_logits())
    assert (StopReferenceKL()(seen).value <= ReferenceForwardKL()(seen).value).all()


def test_which_token_stops_or_goes_on_does_not_matter():
    """Logits moved within either event leave both probabilities, once the sums are put right."""
    student, _ = draw_logits()
    moved = student.clone()
    moved[:, [0, 1]], moved[:, [2, 5]] = student[:, [1, 0]], student[:, [5, 2]]
    for found, gradient in outcomes(StopReferenceKL(1.0), moved, student):
        assert found.value.abs().max() < 1e-13
        assert gradient.abs().max() < 1e-13


@pytest.mark.parametrize("gap", [-90.0, -30.0, 30.0, 90.0])
def test_both_probabilities_keep_their_digits_in_float32(gap):
    """The log-odds of stopping, where either is far below the rounding of the other."""
    logits = torch.zeros(1, 9)
    logits[0, list(STOP)] = gap
    stop, other = stop_logprobs(logits.log_softmax(-1), STOP)[0].double()
    assert (stop - other).item() == pytest.approx(gap + torch.tensor(2 / 7).log().item(), rel=1e-6)


@pytest.mark.parametrize("stop", [(5, 2), (2, 5, 5, 2)])
def test_order_and_repetitions_of_the_stop_ids_do_not_matter(stop):
    logprobs = draw_logits()[0].log_softmax(-1)
    torch.testing.assert_close(stop_logprobs(logprobs, stop), stop_logprobs(logprobs, STOP), rtol=0, atol=0)


def test_more_stop_ids_than_one_are_one_event():
    logprobs = draw_logits()[0].log_softmax(-1)
    expected = logprobs.exp()[:, list(STOP)].sum(-1)
    torch.testing.assert_close(stop_logprobs(logprobs, STOP).exp(), torch.stack([expected, 1 - expected], -1))


def test_evidence_without_stop_ids_is_refused_with_a_way_out():
    seen = replace(see(*draw_logits()), stop=())
    with pytest.raises(ValueError, match="token ids that end an answer, but got none"):
        StopReferenceKL()(seen)
    with pytest.raises(ValueError, match="set eos_token"):
        StopReferenceKL().closed_form(seen, torch.empty(6, 9, dtype=torch.float64))


def test_descent_brings_the_probability_of_stopping_back():
    """From next to nothing to that of the reference, and in both directions."""
    for start, goal in ((-8.0, 0.0), (8.0, -1.0)):
        logits = torch.tensor([[0.0, 0.3, start]], dtype=torch.float64, requires_grad=True)
        reference = torch.tensor([[0.0, 0.0, goal]], dtype=torch.float64)
        optimizer = torch.optim.SGD([logits], lr=2.0)
        for _ in range(400):
            optimizer.zero_grad()
            seen = replace(see(logits, reference), stop=(2,))
            StopReferenceKL(1.0)(seen).loss.sum().backward()
            optimizer.step()
        torch.testing.assert_close(logits.softmax(-1)[0, 2], reference.softmax(-1)[0, 2], rtol=1e-6, atol=0)
        assert (logits[0, 1] - logits[0, 0]).item() != pytest.approx(0)
