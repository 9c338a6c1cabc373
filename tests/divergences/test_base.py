import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers import make_evidence
from stable_opd import AdvantageDivergence, Author, TokenLoss
from stable_opd.divergences.base import clipped_surrogate, discounted_future
from stable_opd.divergences.baselines import ExactBaseline, TopKBaseline
from stable_opd.divergences.extrapolated import ExtrapolatedTeacher
from stable_opd.divergences.f_divergence import (
    SampledAlpha,
    SampledForwardKL,
    SampledJensenShannon,
    SampledTotalVariation,
)
from stable_opd.divergences.power import PowerAdvantage
from stable_opd.divergences.proximal import ProximalTeacher
from stable_opd.divergences.sampled import SampledReverseKL
from stable_opd.divergences.transforms import ClipAdvantage, TanhAdvantage
from streams import compare, draw_evidence, draw_states

# log ratio, advantage, clip, loss, gradient with respect to the log ratio: worked out by hand from PPO's definition.
BY_HAND = [
    (1.0, 2.0, 0.2, -2.0, -2.0),  # on policy: minus the advantage, and its policy gradient
    (1.0, -2.0, 0.2, 2.0, 2.0),
    (1.1, 2.0, 0.2, -2.2, -2.2),  # inside the interval
    (1.5, 2.0, 0.2, -2.4, 0.0),  # good token, already likelier than 1 + clip: no more push
    (0.5, 2.0, 0.2, -1.0, -1.0),  # good token that became unlikely: still pulled back
    (0.5, -2.0, 0.2, 1.6, 0.0),  # bad token, already below 1 - clip: no more push
    (1.5, -2.0, 0.2, 3.0, 3.0),  # bad token that became likelier: pushed with its full ratio
    (1.5, 2.0, 1.0, -3.0, -3.0),  # a wider interval
    (3.0, 0.0, 0.2, 0.0, 0.0),
    (3.0, 2.0, None, -6.0, -6.0),  # no interval: weighed by the ratio alone
    (0.5, -2.0, None, 1.0, 1.0),
]

# The same with a dual clip of 3.
DUAL_BY_HAND = [
    (2.5, -2.0, 0.2, 5.0, 5.0),  # below the bound as it was
    (4.0, -2.0, 0.2, 6.0, 0.0),  # bad token that became far likelier: its loss stands still at 3 * 2
    (4.0, -2.0, None, 6.0, 0.0),
    (4.0, 2.0, 0.2, -2.4, 0.0),  # good tokens know no second bound
    (4.0, 2.0, None, -8.0, -8.0),
    (4.0, 0.0, 0.2, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "clip", "loss", "gradient"), BY_HAND)
def test_clipped_surrogate_by_hand(ratio, advantage, clip, loss, gradient):
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    result = clipped_surrogate(log_ratio, torch.tensor([advantage], dtype=torch.float64), clip)
    result.sum().backward()
    assert result.item() == pytest.approx(loss)
    assert log_ratio.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize(("ratio", "advantage", "clip", "loss", "gradient"), DUAL_BY_HAND)
def test_dual_clip_by_hand(ratio, advantage, clip, loss, gradient):
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    result = clipped_surrogate(log_ratio, torch.tensor([advantage], dtype=torch.float64), clip, 3.0)
    result.sum().backward()
    assert result.item() == pytest.approx(loss)
    assert log_ratio.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("dual_clip", [None, 1.5, 3.0])
def test_clipped_surrogate_against_finite_differences(clip, dual_clip):
    torch.manual_seed(0)
    ratio = torch.randn(256, dtype=torch.float64).exp()
    for kink in (0.8, 1.2, 1.5, 3.0):
        ratio = ratio[(ratio - kink).abs() > 1e-3]
    advantage = torch.randn(len(ratio), dtype=torch.float64)
    log_ratio = ratio.log().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x, advantage, clip, dual_clip), log_ratio)


@pytest.mark.parametrize("log_ratio", [-1e4, -200.0, 80.0, 1e4])
@pytest.mark.parametrize("advantage", [-1e4, -30.0, 0.0, 30.0])
@pytest.mark.parametrize("clip", [0.2, None])
def test_clipped_surrogate_of_extreme_ratios_is_finite(log_ratio, advantage, clip):
    leaf = torch.tensor([log_ratio], requires_grad=True)
    loss = clipped_surrogate(leaf, torch.tensor([advantage]), clip)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert leaf.grad.isfinite().all()


def naive_future(rewards, row, discount):
    later = [
        [discount ** (k - t) * rewards[k] for k in range(t + 1, len(row)) if row[k] == row[t]] for t in range(len(row))
    ]
    return torch.tensor([float(sum(each)) for each in later], dtype=torch.float64)


LENGTHS = [[1], [5], [1, 1, 1], [3, 1, 7, 2], [8, 8], [1, 40, 1, 17], [64]]


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_discounted_future_equals_the_loop(lengths, discount):
    torch.manual_seed(0)
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) + 3
    rewards = torch.randn(len(row), dtype=torch.float64)
    found = discounted_future(rewards, row, discount)
    torch.testing.assert_close(found, naive_future(rewards.tolist(), row.tolist(), discount), atol=1e-12, rtol=1e-12)


def test_discounted_future_of_nothing_is_nothing():
    assert discounted_future(torch.zeros(0), torch.zeros(0, dtype=torch.long), 1.0).shape == (0,)


def test_discounted_future_of_whole_numbers_is_exact_over_a_long_row():
    rewards = torch.ones(5000)
    found = discounted_future(rewards, torch.zeros(5000, dtype=torch.long), 1.0)
    assert found.tolist() == list(range(4999, -1, -1))


class _Own(AdvantageDivergence):
    """Every token is worth as much as its student's log-prob, which carries a gradient that must not be used."""

    def advantage(self, student, teacher, reference):
        return student


_Own.__qualname__ = "<locals>.Own"  # no component


def see(logprobs, tokens, **options):
    return make_evidence(torch.tensor(tokens), logprobs, logprobs.detach() * 0.5, **options)


def test_gradient_of_the_advantage_is_not_used():
    logprobs = torch.randn(4, 5, dtype=torch.float64).log_softmax(-1).requires_grad_()
    tokens = torch.tensor([0, 1, 2, 3])
    sampled = logprobs.detach().gather(1, tokens[:, None]).squeeze(1)
    _Own()(see(logprobs, [0, 1, 2, 3], behaviour=sampled)).loss.sum().backward()
    expected = torch.zeros(4, 5, dtype=torch.float64).scatter(1, tokens[:, None], -sampled[:, None])
    torch.testing.assert_close(logprobs.grad, expected)


def test_clips_of_the_constructor_are_used():
    """Ratio e = 2.7, log-prob -0.7: a bad token, whose loss only the dual clip bounds; the other is good."""
    logprobs = torch.full((1, 2), 0.5).log()
    worth = -logprobs[0, 0].item()
    bad, good = (see(sign * logprobs, [0], behaviour=sign * logprobs[:, 0] - 1) for sign in (1, -1))
    assert _Own(clip=0.5)(bad).loss.item() == pytest.approx(2.7182818 * worth)
    assert _Own(clip=0.5, dual_clip=2.0)(bad).loss.item() == pytest.approx(2 * worth)
    assert _Own(clip=0.5)(good).loss.item() == pytest.approx(-1.5 * worth)
    assert _Own(clip=None)(good).loss.item() == pytest.approx(-2.7182818 * worth)


def test_reports_minus_the_advantage_and_speaks_about_the_students_tokens_only():
    """Whatever the parts make of it."""
    logprobs = torch.randn(3, 4).log_softmax(-1)
    evidence = see(logprobs, [0, 1, 2], author=torch.tensor([0, 1, 0]))
    for options in ({}, {"transform": TanhAdvantage()}, {"baseline": ExactBaseline()}, {"discount": 1.0}):
        term = _Own(**options)(evidence)
        torch.testing.assert_close(term.value, -evidence.student.sampled)
        assert not term.value.requires_grad
        assert term.where.tolist() == [True, False, True]
    assert evidence.written_by(Author.GOLDEN).tolist() == [False, True, False]


def test_transform_applies_to_each_token_before_the_sum_and_foreign_tokens_add_nothing():
    torch.manual_seed(0)
    logprobs = 3 * torch.randn(7, 5, dtype=torch.float64).log_softmax(-1)
    evidence = see(logprobs, [0, 1, 2, 3, 4, 0, 1], author=torch.tensor([1, 0, 0, 2, 0, 0, 0]))
    evidence = replace(evidence, row=torch.tensor([0, 0, 0, 0, 0, 1, 1]), behaviour_logprobs=evidence.student.sampled)
    found = -_Own(transform=ClipAdvantage(2.0), discount=0.5)(evidence).loss
    a = evidence.student.sampled.clamp(-2, 2)
    expected = [a[1] + a[2] / 2 + a[4] / 8, a[2] + a[4] / 4, a[4], a[5] + a[6] / 2, a[6]]
    torch.testing.assert_close(found[[1, 2, 4, 5, 6]], torch.stack(expected))
    assert (evidence.student.sampled < -2).any()


def test_foreign_tokens_that_are_not_finite_spoil_nothing():
    logprobs = torch.full((4, 3), -1.0)
    evidence = see(logprobs, [0, 0, 0, 0], author=torch.tensor([0, 1, 0, 0]))
    evidence.teacher.sampled[1] = torch.nan
    found = SampledReverseKL(discount=1.0)(evidence)
    assert found.loss[found.where].isfinite().all()


@pytest.mark.parametrize(
    ("options", "support", "positionwise"),
    [
        ({}, "sampled", True),
        ({"transform": ClipAdvantage()}, "sampled", True),
        ({"discount": 0.5}, "sampled", False),
        ({"baseline": TopKBaseline()}, "full", True),
    ],
)
def test_what_it_has_to_see_follows_from_its_parts(options, support, positionwise):
    term = _Own(**options)
    assert (term.support, term.positionwise, term.needs_reference) == (support, positionwise, False)
    assert (_Own.support, _Own.positionwise) == ("sampled", True)


WRONG = {
    "clip": ({"clip": 0.0}, r"clip above 0, but got 0\.0\. Use null"),
    "negative clip": ({"clip": -0.2}, r"clip above 0, but got -0\.2"),
    "dual clip": ({"dual_clip": 1.0}, r"dual_clip above 1, but got 1\.0\. .*use null for none"),
    "discount": ({"discount": 1.1}, r"discount from 0 to 1, but got 1\.1"),
    "negative discount": ({"discount": -0.1}, r"discount from 0 to 1, but got -0\.1"),
    "no number": ({"discount": float("nan")}, "discount from 0 to 1, but got nan"),
    "both": (
        {"discount": 0.5, "baseline": ExactBaseline()},
        r"discount of 0\.5 and a ExactBaseline\. .* Set the discount to 0, or leave the baseline out",
    ),
}


@pytest.mark.parametrize(("options", "words"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_refused_with_the_way_out(options, words):
    with pytest.raises(ValueError, match=words):
        SampledReverseKL(**options)


SHIPPED = {
    "SampledReverseKL": SampledReverseKL,
    "SampledForwardKL": SampledForwardKL,
    "SampledJensenShannon": SampledJensenShannon,
    "SampledTotalVariation": SampledTotalVariation,
    "SampledAlpha": SampledAlpha,
    "PowerAdvantage": PowerAdvantage,
    "ProximalTeacher": ProximalTeacher,
    "ExtrapolatedTeacher": ExtrapolatedTeacher,
}
each_shipped = pytest.mark.parametrize("make", SHIPPED.values(), ids=SHIPPED.keys())
OPTIONS = {
    "plain": {},
    "unclipped": {"clip": None},
    "dual": {"dual_clip": 3.0},
    "transformed": {"transform": ClipAdvantage(0.5)},
    "exact baseline": {"baseline": ExactBaseline(), "transform": TanhAdvantage()},
    "top baseline": {"baseline": TopKBaseline(4)},
    "discounted": {"discount": 0.9},
    "undiscounted": {"discount": 1.0, "transform": ClipAdvantage(0.5)},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@each_shipped
def test_common_arguments_have_the_same_defaults_everywhere(make):
    found, expected = (inspect.signature(each).parameters for each in (make, AdvantageDivergence))
    assert {name: found[name].default for name in expected} == {name: each.default for name, each in expected.items()}
    assert not [each for each in found.values() if each.kind is each.VAR_KEYWORD]


@each_option
@each_shipped
def test_agreement_gives_exactly_nothing(make, options):
    """For each token and not just in the mean; the initial student agrees too."""
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(6, 9, generator=generator, dtype=torch.float64)).requires_grad_()
    logprobs = logits.log_softmax(-1)
    tokens = torch.arange(6)
    behaviour = logprobs.detach().diagonal() + torch.randn(6, generator=generator) / 5
    term = make(**options)(make_evidence(tokens, logprobs, logprobs.detach(), logprobs.detach(), behaviour=behaviour))
    assert term.loss.abs().max() < 1e-15
    assert term.value.abs().max() == 0
    assert torch.autograd.grad(term.loss.sum(), logits)[0].abs().max() < 1e-15


@each_option
@each_shipped
def test_gradient_reaches_the_student_only(make, options):
    generator = torch.Generator().manual_seed(2)
    models = torch.randn(3, 6, 9, generator=generator).log_softmax(-1).requires_grad_()
    behaviour = models[0].detach().diagonal()
    term = make(**options)(make_evidence(torch.arange(6), *models, behaviour=behaviour))
    (gradient,) = torch.autograd.grad(term.loss.sum(), models)
    assert gradient[0].abs().max() > 0
    assert gradient[1:].abs().max() == 0
    assert not term.value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@each_option
@each_shipped
def test_extremes_are_finite(make, options, dtype):
    """Far apart, as good as certain, and tokens that a model rules out altogether."""
    generator = torch.Generator().manual_seed(1)
    far = 1e4 * torch.randn(3, 6, 9, generator=generator, dtype=torch.float64)
    certain = 1e4 * torch.eye(6, 9, dtype=torch.float64)
    ruled_out = torch.where(certain > 0, -float("inf"), torch.zeros(())).log_softmax(-1)
    trios = [far, [certain, -certain, far[0]], [-certain, certain, certain], [far[0], ruled_out, far[1]]]
    trios += [[far[0], far[1], ruled_out], [ruled_out.roll(1, 1), ruled_out, ruled_out]]
    for trio in trios:
        logits = trio[0].to(dtype).requires_grad_()
        models = [logits.log_softmax(-1), *(each.to(dtype).log_softmax(-1) for each in trio[1:])]
        term = make(**options)(make_evidence(torch.arange(6), *models, behaviour=torch.full((6,), -2.0, dtype=dtype)))
        assert term.loss.isfinite().all()
        assert term.value.isfinite().all()
        assert torch.autograd.grad(term.loss.sum(), logits)[0].isfinite().all()


@each_shipped
def test_bfloat16_within_its_tolerance(make):
    """Rounding the log-probs to 8 bits changes the value by at most 3% of it, or 0.03."""
    student, teacher, reference = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(4)).log_softmax(-1)
    tokens = torch.arange(6)
    exact, rounded = (
        make()(make_evidence(tokens, *(convert(each) for each in (student, teacher, reference)))).value
        for convert in (torch.Tensor.double, lambda each: each.bfloat16().double())
    )
    assert (rounded - exact).abs().max() > 0
    assert ((rounded - exact).abs() <= 0.03 * (1 + exact.abs())).all()


@each_option
@pytest.mark.parametrize("make", [SampledReverseKL, partial(SampledAlpha, 0.3), ExtrapolatedTeacher])
def test_in_tiles_it_is_what_it_is_at_once(make, options, tile):
    evidence, shares = draw_evidence()
    compare({"term": make(**options)}, evidence, shares, draw_states(0, bias=True, softcap=4.0))


def test_a_plug_in_needs_no_more_than_its_advantage():
    evidence = see(torch.randn(3, 4).log_softmax(-1), [0, 1, 2])
    assert isinstance(_Own()(evidence), TokenLoss)
