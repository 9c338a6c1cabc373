"""Gradients of sampled divergences, exact by enumeration: all answers of up to 3 tokens over 3 words, in float64."""

import itertools
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch

from helpers import make_evidence
from stable_opd import Author
from stable_opd.divergences.baselines import ExactBaseline, TopKBaseline
from stable_opd.divergences.extrapolated import ExtrapolatedTeacher
from stable_opd.divergences.f_divergence import (
    SampledAlpha,
    SampledForwardKL,
    SampledJensenShannon,
    SampledTotalVariation,
)
from stable_opd.divergences.gated import AsymmetricDivergence, TrustGated
from stable_opd.divergences.kl import ReverseKL
from stable_opd.divergences.power import PowerAdvantage
from stable_opd.divergences.proximal import ProximalTeacher
from stable_opd.divergences.sampled import EstimatedReverseKL, SampledReverseKL
from stable_opd.divergences.transforms import ClipAdvantage, LowerClip, SoftLog, TanhAdvantage

WORDS, LENGTH, STOP = 3, 3, 2


def prefixes():
    return [prefix for length in range(LENGTH) for prefix in itertools.product(range(WORDS), repeat=length)]


STATES = {prefix: number for number, prefix in enumerate(prefixes())}


def answers(stops):
    """All answers; with a stop token they differ in length, and what follows it is never written."""
    if not stops:
        return list(itertools.product(range(WORDS), repeat=LENGTH))
    cut = [row[: row.index(STOP) + 1] if STOP in row else row for row in itertools.product(range(WORDS), repeat=LENGTH)]
    return list(dict.fromkeys(cut))


class World(NamedTuple):
    """Log-probs in each state, (13, 3): of the student, through its logits, and of the others."""

    logits: torch.Tensor
    student: torch.Tensor
    teacher: torch.Tensor
    reference: torch.Tensor
    behaviour: torch.Tensor


def make_world(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(4, len(STATES), WORDS, generator=generator, dtype=torch.float64)
    logits = tables[0].requires_grad_()
    return World(logits, logits.log_softmax(-1), *tables[1:].log_softmax(-1))


class Everything(NamedTuple):
    """Evidence on all answers one after the other, with the state of each token and the log-prob of its answer."""

    evidence: object
    states: torch.Tensor
    answer: torch.Tensor


def everything(world, drawn_by, stops=False, author=Author.STUDENT):
    rows = answers(stops)
    states = torch.tensor([STATES[row[:t]] for row in rows for t in range(len(row))])
    tokens = torch.tensor([token for row in rows for token in row])
    row = torch.tensor([number for number, each in enumerate(rows) for _ in each])
    log_drawn = drawn_by[states].gather(1, tokens[:, None]).squeeze(1)
    answer = torch.zeros(len(rows), dtype=torch.float64).index_add(0, row, log_drawn)[row]
    models = (table[states] for table in (world.student, world.teacher, world.reference))
    evidence = make_evidence(tokens, *models, behaviour=log_drawn.detach(), author=author)
    return Everything(replace(evidence, row=row), states, answer)


def gradient(total, world):
    return torch.autograd.grad(total, world.logits, retain_graph=True)[0]


def reverse_kl(p, q, _=None):
    return (p.exp() * (p - q)).sum(-1)


def jensen_shannon(p, q, _):
    middle = ((p.exp() + q.exp()) / 2).log()
    return (reverse_kl(p, middle) + reverse_kl(q, middle)) / 2


def alpha_divergence(p, q, _, alpha):
    return (1 - (q.exp() ** alpha * p.exp() ** (1 - alpha)).sum(-1)) / (alpha * (1 - alpha))


def to_the_mixture(p, q, _, alpha):
    return reverse_kl(p, (alpha * q.exp() + (1 - alpha) * p.exp().detach()).log())


def power_divergence(p, q, _, alpha):
    p, q = p.exp(), q.exp()
    return ((p ** (alpha + 1) + alpha * q ** (alpha + 1)) / (alpha + 1) - p * q**alpha).sum(-1)


def extrapolated(p, q, r, factor):
    return reverse_kl(p, (factor * q + (1 - factor) * r).log_softmax(-1))


def unnormalised(p, q, r, factor):
    return (p.exp() * (p - factor * q - (1 - factor) * r)).sum(-1)


#: What makes the term, the divergence that it states, and what its reported value is the mean of if that is another.
STATED = {
    "reverse KL": (SampledReverseKL, reverse_kl, None),
    "forward KL": (SampledForwardKL, lambda p, q, _: reverse_kl(q, p), None),
    "Jensen-Shannon": (SampledJensenShannon, jensen_shannon, None),
    "total variation": (SampledTotalVariation, lambda p, q, _: (p.exp() - q.exp()).abs().sum(-1) / 2, None),
    "alpha 0.3": (partial(SampledAlpha, 0.3), partial(alpha_divergence, alpha=0.3), None),
    "alpha 0.8": (partial(SampledAlpha, 0.8), partial(alpha_divergence, alpha=0.8), None),
    "proximal": (partial(ProximalTeacher, 0.3), partial(to_the_mixture, alpha=0.3), None),
    "power 1": (
        partial(PowerAdvantage, 1.0),
        lambda p, q, _: (p.exp() - q.exp()).square().sum(-1) / 2,
        lambda p, q, _: (p.exp() * (p.exp() - q.exp())).sum(-1),
    ),
    "power 2.5": (
        partial(PowerAdvantage, 2.5),
        partial(power_divergence, alpha=2.5),
        lambda p, q, _: (p.exp() * (p.exp() ** 2.5 - q.exp() ** 2.5)).sum(-1),
    ),
    "extrapolated 1.4": (
        partial(ExtrapolatedTeacher, 1.4),
        partial(extrapolated, factor=1.4),
        partial(unnormalised, factor=1.4),
    ),
    "interpolated 0.6": (
        partial(ExtrapolatedTeacher, 0.6),
        partial(extrapolated, factor=0.6),
        partial(unnormalised, factor=0.6),
    ),
}
each_stated = pytest.mark.parametrize(("make", "divergence", "reported"), STATED.values(), ids=STATED.keys())
each_stop = pytest.mark.parametrize("stops", [False, True], ids=["fixed length", "stop token"])


def at_each_state(divergence, world):
    return divergence(world.student, world.teacher, world.reference)


@each_stop
@each_stated
def test_without_a_discount_it_descends_its_divergence_at_the_visited_states(make, divergence, reported, stops):
    world = make_world()
    evidence, states, answer = everything(world, world.student, stops)
    probability = answer.exp().detach()
    found = gradient((probability * make()(evidence).loss).sum(), world)
    expected = gradient((probability * at_each_state(divergence, world)[states]).sum(), world)
    assert expected.norm() > 0.05
    torch.testing.assert_close(found, expected)


@each_stated
def test_the_reported_value_has_the_divergence_as_its_mean(make, divergence, reported):
    world = make_world(1)
    evidence, states, answer = everything(world, world.student)
    found = (answer.exp() * make()(evidence).value).sum()
    expected = (answer.exp() * at_each_state(reported or divergence, world)[states]).sum()
    torch.testing.assert_close(found, expected)


@each_stop
@each_stated
def test_with_a_discount_of_1_it_descends_the_sum_over_the_answers(make, divergence, reported, stops):
    """Through the probability of reaching each state too, for which what is reported counts as the cost."""
    world = make_world(2)
    evidence, states, answer = everything(world, world.student, stops)
    found = gradient((answer.exp().detach() * make(discount=1.0)(evidence).loss).sum(), world)
    local = (answer.exp().detach() * at_each_state(divergence, world)[states]).sum()
    cost = at_each_state(reported or divergence, world).detach()
    expected = gradient(local + (answer.exp() * cost[states]).sum(), world)
    torch.testing.assert_close(found, expected)
    assert (expected - gradient(local, world)).norm() > 1e-3


@each_stop
def test_with_a_discount_of_1_the_reverse_kl_is_that_of_whole_answers(stops):
    world = make_world(3)
    evidence, _, answer = everything(world, world.student, stops)
    found = gradient((answer.exp().detach() * SampledReverseKL(discount=1.0)(evidence).loss).sum(), world)
    rows = len(answers(stops))

    def of_rows(scores):
        return torch.zeros(rows, dtype=torch.float64).index_add(0, evidence.row, scores.sampled)

    p, q = of_rows(evidence.student), of_rows(evidence.teacher)
    torch.testing.assert_close(p.exp().sum().item(), 1.0)
    torch.testing.assert_close(found, gradient(reverse_kl(p, q), world))


def test_a_discount_below_1_is_between_both():
    """Linear in the powers of the discount: three of them give the gradient at any fourth."""
    world = make_world(4)
    evidence, _, answer = everything(world, world.student)

    def at(discount):
        return gradient((answer.exp().detach() * SampledReverseKL(discount=discount)(evidence).loss).sum(), world)

    zero, half, one = at(0.0), at(0.5), at(1.0)
    linear, square = 4 * half - 3 * zero - one, 2 * zero - 4 * half + 2 * one
    torch.testing.assert_close(at(0.3), zero + 0.3 * linear + 0.09 * square)
    assert min(linear.norm(), square.norm()) > 0.01


@each_stated
def test_unclipped_ratios_correct_for_who_drew_the_tokens(make, divergence, reported):
    """The states stay those that the other one visits; the tokens are weighed as if the student had drawn them."""
    world = make_world(5)
    evidence, states, answer = everything(world, world.behaviour)
    found = gradient((answer.exp() * make(clip=None)(evidence).loss).sum(), world)
    expected = gradient((answer.exp() * at_each_state(divergence, world)[states]).sum(), world)
    torch.testing.assert_close(found, expected)
    clipped = gradient((answer.exp() * make(clip=0.2)(evidence).loss).sum(), world)
    assert (clipped - expected).norm() > 1e-3


@pytest.mark.parametrize("drawn_by", ["student", "behaviour"])
@pytest.mark.parametrize("name", ["k2", "k4", "k3pp"])
def test_estimators_of_the_reverse_kl_descend_it(name, drawn_by):
    world = make_world(6)
    evidence, states, answer = everything(world, getattr(world, drawn_by))
    probability = answer.exp().detach()
    found = gradient((probability * EstimatedReverseKL(name)(evidence).loss).sum(), world)
    expected = gradient((probability * at_each_state(reverse_kl, world)[states]).sum(), world)
    torch.testing.assert_close(found, expected)


class OneState(NamedTuple):
    """Every word at one state: the gradient of each in the logits, (V, V), and the probability of each, (V,)."""

    gradients: torch.Tensor
    probs: torch.Tensor
    student: torch.Tensor
    teacher: torch.Tensor

    @property
    def mean(self):
        return self.probs @ self.gradients

    @property
    def variance(self):
        return (self.probs @ (self.gradients - self.mean).square()).sum()


def one_state(term, words=8, seed=7, apart=1.0):
    generator = torch.Generator().manual_seed(seed)
    tables = apart * torch.randn(3, words, generator=generator, dtype=torch.float64)
    logits = tables[0].requires_grad_()
    student = logits.log_softmax(-1)
    models = (each.expand(words, -1) for each in (student, *tables[1:].log_softmax(-1)))
    loss = term(make_evidence(torch.arange(words), *models, behaviour=student.detach())).loss
    slopes = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in loss]
    return OneState(torch.stack(slopes), student.detach().exp(), student.detach(), tables[1].log_softmax(-1))


MAKERS = {name: make for name, (make, _, _) in STATED.items()}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
TRANSFORMS = [ClipAdvantage(0.5), LowerClip(), TanhAdvantage(), SoftLog()]
each_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda each: type(each).__name__)


@pytest.mark.parametrize("baseline", [ExactBaseline(), TopKBaseline(4), TopKBaseline()], ids=["exact", "top 4", "top"])
@pytest.mark.parametrize("transform", [None, ClipAdvantage(0.5)], ids=["plain", "clipped"])
@each_maker
def test_baseline_keeps_the_mean_of_the_gradient(make, transform, baseline):
    plain, less = one_state(make(transform=transform)), one_state(make(transform=transform, baseline=baseline))
    torch.testing.assert_close(less.mean, plain.mean)
    if make is SampledForwardKL and transform is None:  # its advantage, u - 1, has the mean 0 as it is
        assert (less.gradients - plain.gradients).norm() < 1e-12
    else:
        assert (less.gradients - plain.gradients).norm() > 1e-3


@pytest.mark.parametrize("baseline", [ExactBaseline(), TopKBaseline(4)], ids=["exact", "top 4"])
@pytest.mark.parametrize("transform", [None, LowerClip()], ids=["plain", "clipped"])
def test_baseline_lowers_the_variance_of_the_reverse_kl(transform, baseline):
    """On average over states: no baseline that is blind to the token's score can promise it of each."""
    seeds = range(20)
    plain = sum(one_state(SampledReverseKL(transform=transform), seed=seed).variance for seed in seeds)
    term = SampledReverseKL(transform=transform, baseline=baseline)
    less = sum(one_state(term, seed=seed).variance for seed in seeds)
    assert less < 0.9 * plain


def test_exact_baseline_of_the_reverse_kl_is_minus_the_kl():
    found = one_state(SampledReverseKL(baseline=ExactBaseline()))
    gap = found.teacher - found.student
    centred = gap + reverse_kl(found.student, found.teacher)
    expected = -centred[:, None] * (torch.eye(8) - found.probs)
    torch.testing.assert_close(found.gradients, expected.double())


@each_transform
@each_maker
def test_transform_changes_the_advantage_of_each_word_and_nothing_else(make, transform):
    plain, other = make(), one_state(make(transform=transform), apart=1.4)
    generator = torch.Generator().manual_seed(7)
    tables = 1.4 * torch.randn(3, 8, generator=generator, dtype=torch.float64)
    worth = transform(plain.advantage(*tables.log_softmax(-1)))
    expected = -(other.probs * worth) @ (torch.eye(8, dtype=torch.float64) - other.probs)
    torch.testing.assert_close(other.mean, expected)


@pytest.mark.parametrize("gated", [TrustGated, AsymmetricDivergence])
def test_gated_divergences_mix_the_policy_gradient_with_the_local_one(gated):
    found = one_state(gated(ReverseKL()))
    p, q = found.student.exp(), found.teacher.exp()
    gate = (q / p).clamp(max=1) if gated is TrustGated else (q > p).double()
    logits = found.student.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    policy = -(p * gate * (found.teacher - found.student) * logprobs).sum()
    local = (p * (1 - gate)).sum() * reverse_kl(logprobs, found.teacher)
    torch.testing.assert_close(found.mean, torch.autograd.grad(policy + local, logits)[0])


def test_weight_of_the_local_part_under_trust_is_the_total_variation_distance():
    found = one_state(TrustGated(ReverseKL()))
    gate = TrustGated().gate(found.student, found.teacher)
    distance = (found.probs - found.teacher.exp()).abs().sum() / 2
    torch.testing.assert_close((found.probs * (1 - gate)).sum(), distance)
