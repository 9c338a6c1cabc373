"""The sampled divergence against exact enumeration over small vocabularies."""

import itertools

import torch

from helpers import make_evidence
from stable_opd import ReverseKL, SampledReverseKL
from stable_opd.divergences import reverse_kl


def tables(vocabulary, states, seed=0):
    """Logits of student (a leaf) and teacher in each of some states, (states, V) float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, states, vocabulary, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def test_value_is_an_unbiased_estimate_of_the_exact_divergence():
    student, teacher = tables(vocabulary=6, states=1)
    tokens = torch.arange(6)
    p, q = (table.detach().log_softmax(-1).expand(6, 6) for table in (student, teacher))
    value = SampledReverseKL()(make_evidence(tokens, p, q, behaviour=p[0])).value
    torch.testing.assert_close((p[0].exp() * value).sum(), reverse_kl(p[0], q[0]))


def test_expected_gradient_over_all_tokens_is_the_exact_gradient():
    student, teacher = tables(vocabulary=6, states=1)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    (exact,) = torch.autograd.grad(reverse_kl(p, q).sum(), student, retain_graph=True)
    everything = make_evidence(torch.arange(6), p.expand(6, 6), q.expand(6, 6), behaviour=p[0].detach())
    expected_loss = (p[0].detach().exp() * SampledReverseKL()(everything).loss).sum()
    (sampled,) = torch.autograd.grad(expected_loss, student)
    torch.testing.assert_close(sampled, exact)
    assert exact.norm() > 0.1


def test_expected_gradient_over_all_answers_is_that_of_the_exact_divergence_at_the_visited_states():
    """Answers of two tokens over three words: state 0 is the start, state 1 + v the answer that began with v.

    No return-to-go: the gradient takes the states as they come, as `ReverseKL` does.
    """
    words = 3
    student, teacher = tables(words, 1 + words)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    sampled, exact = 0.0, 0.0
    for answer in itertools.product(range(words), repeat=2):
        states, tokens = torch.tensor([0, 1 + answer[0]]), torch.tensor(answer)
        drawn = p[states].detach().gather(1, tokens[:, None]).squeeze(1)
        probability = drawn.sum().exp()
        evidence = make_evidence(tokens, p[states], q[states], behaviour=drawn)
        sampled = sampled + probability * SampledReverseKL()(evidence).loss.sum()
        exact = exact + probability * ReverseKL()(evidence).loss.sum()
    (sampled_gradient,) = torch.autograd.grad(sampled, student, retain_graph=True)
    (exact_gradient,) = torch.autograd.grad(exact, student)
    torch.testing.assert_close(sampled_gradient, exact_gradient)


def test_importance_ratio_corrects_for_another_behaviour():
    """Tokens drawn by somebody else: unclipped, the expectation is still the exact gradient."""
    student, teacher = tables(vocabulary=5, states=1)
    behaviour = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    (exact,) = torch.autograd.grad(reverse_kl(p, q).sum(), student, retain_graph=True)
    evidence = make_evidence(torch.arange(5), p.expand(5, 5), q.expand(5, 5), behaviour=behaviour)
    loss = (behaviour.exp() * SampledReverseKL(clip=1e9)(evidence).loss).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], exact)


def test_equal_models_give_zero_loss_and_zero_gradient():
    student, _ = tables(vocabulary=6, states=4)
    p = student.log_softmax(-1)
    tokens = torch.tensor([0, 2, 4, 5])
    behaviour = p.detach().gather(1, tokens[:, None]).squeeze(1)
    term = SampledReverseKL()(make_evidence(tokens, p, p.detach(), behaviour=behaviour))
    assert term.loss.abs().max() == 0
    assert term.value.abs().max() == 0
    assert torch.autograd.grad(term.loss.sum(), student)[0].abs().max() == 0


def test_bfloat16_within_its_tolerance():
    student, teacher = tables(vocabulary=6, states=4)
    p, q = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    tokens = torch.tensor([0, 2, 4, 5])
    behaviour = p.gather(1, tokens[:, None]).squeeze(1)
    exact = SampledReverseKL()(make_evidence(tokens, p, q, behaviour=behaviour)).loss
    low = make_evidence(tokens, p.bfloat16(), q.bfloat16(), behaviour=behaviour.bfloat16())
    rounded = SampledReverseKL()(low).loss.double()
    assert ((rounded - exact).abs() <= 0.03 * (1 + exact.abs())).all()
