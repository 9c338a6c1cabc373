import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from divergences.common import assert_same, draw_logits, each_check, likeliest, logs, outcomes, see
from stable_opd import ReverseKL
from stable_opd.divergences.entropy_aware import EntropyAware, uncertain


@each_check
@pytest.mark.parametrize(
    "options", [{}, {"threshold": 0.0, "k": 3}, {"threshold": 1.0, "forward_weight": 0.3}], ids=str
)
def test_contract(check, options):
    check(EntropyAware(**options))


def test_known_value():
    """H(q) = log 2 = 0.69; KL(p || q) = 3/4 log 3/2 + 1/4 log 1/2, and the other way 1/2 log 2/3 + 1/2 log 2."""
    student, teacher = logs([0.75, 0.25], [0.5, 0.5])
    reverse = 0.75 * math.log(1.5) - 0.25 * math.log(2)
    forward = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    for threshold, expected in ((0.69, reverse + 2 * forward), (0.7, reverse)):
        found = EntropyAware(threshold, forward_weight=2.0)(see(student, teacher))
        assert found.value.item() == pytest.approx(expected)


@pytest.mark.parametrize("k", [2, 4, 20])
def test_equals_torch_distributions_on_both_sides_of_the_threshold(k):
    student, teacher = draw_logits(2, n=40, scale=2.0)
    inside = likeliest(teacher, k)
    p, q = Categorical(logits=student), Categorical(logits=teacher)
    p_top, q_top = (Categorical(probs=each.probs[inside].view(40, min(k, 9)), validate_args=False) for each in (p, q))
    high = q.entropy() > 0.8
    assert 5 <= high.sum() <= 35
    assert uncertain(see(student, teacher).teacher, 0.8).tolist() == high.tolist()
    expected = kl_divergence(p, q) + 0.5 * high * kl_divergence(q_top, p_top)
    for found, _ in outcomes(EntropyAware(0.8, 0.5, k), student, teacher):
        torch.testing.assert_close(found.value, expected)


@pytest.mark.parametrize("term", [EntropyAware(math.log(9)), EntropyAware(forward_weight=0.0)], ids=["log V", "weight"])
def test_is_the_reverse_kl_without_the_forward_part(term):
    student, teacher = draw_logits(scale=1.0)
    teacher[0] = 0  # as uncertain as can be
    assert_same(outcomes(term, student, teacher), outcomes(ReverseKL(), student, teacher))


def test_uncertain_teacher_keeps_its_choices_alive():
    """A student that has settled on one of two is called back by the forward KL alone."""
    student, teacher = logs([1 - 2e-6, 1e-6, 1e-6], [0.5, 0.5 - 1e-6, 1e-6])
    for _, gradient in outcomes(EntropyAware(threshold=0.6, k=2), student, teacher):
        assert gradient[0, 1] < -0.4
    for _, gradient in outcomes(EntropyAware(threshold=0.7, k=2), student, teacher):
        assert gradient[0, 1].abs() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, r"Expected threshold of at least 0, but got -0.1. Use 0 to"),
        ({"threshold": math.nan}, r"Expected threshold of at least 0, but got nan. Use 0 to"),
        ({"forward_weight": -1.0}, r"Expected forward_weight of at least 0, but got -1.0. Use ReverseKL to"),
        ({"forward_weight": math.nan}, r"Expected forward_weight of at least 0, but got nan. Use ReverseKL to"),
        ({"k": 1}, r"Expected k of at least 2, but got 1: on one token"),
    ],
)
def test_options_outside_of_their_ranges_are_refused_with_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        EntropyAware(**options)
