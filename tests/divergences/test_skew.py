import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from divergences.common import MINUS_INFINITY, assert_same, draw_logits, each_check, logs, outcomes
from stable_opd import ForwardKL, ReverseKL
from stable_opd.divergences import jensen_shannon
from stable_opd.divergences.skew import SkewForwardKL, SkewReverseKL, skew_forward_kl, skew_reverse_kl

each_class = pytest.mark.parametrize(
    ("skewed", "limit"), [(SkewReverseKL, ReverseKL), (SkewForwardKL, ForwardKL)], ids=["reverse", "forward"]
)
each_skew = pytest.mark.parametrize("skew", [0.01, 0.1, 0.6])


@each_check
@each_skew
@each_class
def test_contract(check, skewed, limit, skew):
    check(skewed(skew))


def test_known_values():
    """p = (1, 0), q = (1/2, 1/2), and one half of each make m = (3/4, 1/4)."""
    student, teacher = logs([1.0, 0.0], [0.5, 0.5])
    assert skew_reverse_kl(student, teacher, 0.5).item() == pytest.approx(math.log(4 / 3))
    assert skew_forward_kl(student, teacher, 0.5).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))


@each_skew
def test_equal_torch_distributions_with_a_mixture_of_probabilities(skew):
    """The skew is the share of the first argument of each divergence."""
    student, teacher = draw_logits()
    p, q = Categorical(logits=student), Categorical(logits=teacher)
    near_teacher = Categorical(probs=(1 - skew) * q.probs + skew * p.probs)
    near_student = Categorical(probs=skew * q.probs + (1 - skew) * p.probs)
    for found, _ in outcomes(SkewReverseKL(skew), student, teacher):
        torch.testing.assert_close(found.loss.detach(), kl_divergence(p, near_teacher))
    for found, _ in outcomes(SkewForwardKL(skew), student, teacher):
        torch.testing.assert_close(found.loss.detach(), kl_divergence(q, near_student))


def test_their_mean_at_one_half_is_the_jensen_shannon_divergence():
    student, teacher = draw_logits().log_softmax(-1)
    mean = (skew_reverse_kl(student, teacher, 0.5) + skew_forward_kl(student, teacher, 0.5)) / 2
    torch.testing.assert_close(mean, jensen_shannon(student, teacher, 0.5))


@each_class
def test_tend_to_the_kl_divergences_with_their_gradients(skewed, limit):
    student, teacher = draw_logits(scale=1.0)
    found, expected = (outcomes(term, student, teacher) for term in (skewed(1e-8), limit()))
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


@each_skew
def test_bounded_by_what_distinct_supports_reach(skew):
    student, teacher = draw_logits(scale=40.0).log_softmax(-1)
    disjoint = torch.tensor([[0.0, MINUS_INFINITY]]), torch.tensor([[MINUS_INFINITY, 0.0]])
    for function in (skew_reverse_kl, skew_forward_kl):
        assert (function(student, teacher, skew) <= math.log(1 / skew) + 1e-12).all()
        assert function(*disjoint, skew).item() == pytest.approx(math.log(1 / skew), rel=1e-6)


@each_class
def test_gradient_is_weaker_than_that_of_the_limit_where_the_supports_hardly_meet(skewed, limit):
    student, teacher = logs([0.7, 0.3 - 2e-9, 1e-9, 1e-9], [1e-9, 1e-9, 0.4, 0.6 - 2e-9])
    for (_, weak), (_, strong) in zip(
        outcomes(skewed(0.1), student, teacher), outcomes(limit(), student, teacher), strict=True
    ):
        assert weak.norm() < 0.5 * strong.norm()


@pytest.mark.parametrize("skew", [0.0, 1.0, -0.1, 1.5, float("nan")])
@each_class
def test_skew_outside_of_its_interval_is_refused_with_the_way_out(skewed, limit, skew):
    with pytest.raises(ValueError, match=rf"Expected skew above 0 and below 1, but got {skew}. Use {limit.__name__} "):
        skewed(skew)
