"""The distributions that teacher and student share, against their definitions, and the correction for them."""

import itertools

import pytest
import torch

from helpers import make_evidence
from stable_opd import Author, Linear, Prompts, SampledReverseKL
from stable_opd.divergences.sampled import EstimatedReverseKL
from stable_opd.mixtures import SpeculativeMixing, TeacherMixing, mixed, speculative

PROMPTS = Prompts([[1], [2]], [None, None], [0, 1], [{}] * 2)
V = 7


def draw_logits(seed, rows=4, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, V, generator=generator) for _ in range(2)]


def ruled_out(logits, *tokens):
    return logits.index_fill(-1, torch.tensor(tokens), -float("inf"))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("out", [(), (0, 3)], ids=["all tokens", "some ruled out"])
def test_mixed_is_the_weighted_mean_of_both_distributions(share, out):
    student, teacher = draw_logits(0)
    student = ruled_out(student, *out) if out else student
    expected = (1 - share) * student.softmax(-1) + share * teacher.softmax(-1)
    found = mixed(student, teacher, share)
    torch.testing.assert_close(found.exp(), expected)
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(4), rtol=0, atol=1e-6)
    assert not found.isnan().any()


def test_mixed_keeps_the_smallest_probabilities():
    """Where both are far below what float32 tells from 0."""
    student, teacher = torch.tensor([[0.0, -200.0, -300.0]]), torch.tensor([[0.0, -300.0, -200.0]])
    expected = torch.tensor([[-200.0, -200.0]]) + torch.tensor([[0.8, 0.2]]).log()
    torch.testing.assert_close(mixed(student, teacher, 0.2)[:, 1:], expected)


@pytest.mark.parametrize("k", [1, 2, 3, V, V + 5])
@pytest.mark.parametrize("out", [(), (0, 3)], ids=["all tokens", "some ruled out"])
def test_speculative_is_what_proposing_and_replacing_gives(k, out):
    """The process itself, over every proposal and every replacement."""
    student, teacher = draw_logits(1)
    student = ruled_out(student, *out) if out else student
    p, q = student.softmax(-1), teacher.softmax(-1)
    expected = torch.zeros(4, V)
    for row, proposal, other in itertools.product(range(4), range(V), range(V)):
        rank = int((q[row] > q[row, proposal]).sum())
        expected[row, proposal if rank < k else other] += p[row, proposal] * q[row, other]
    found = speculative(student, teacher, k)
    torch.testing.assert_close(found.exp(), expected)
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(4), rtol=0, atol=1e-6)
    assert not found.isnan().any()


def test_speculative_is_the_teacher_where_nothing_of_the_student_is_acceptable():
    teacher = draw_logits(2)[1]
    student = torch.full((4, V), -float("inf")).scatter(-1, teacher.argmin(-1, keepdim=True), 0.0)
    torch.testing.assert_close(speculative(student, teacher, 3), teacher.log_softmax(-1))


def gradient(divergence, student, teacher, behaviour):
    """Expected gradient in the student's logits, (V,), over all tokens that `behaviour` (V,) may have drawn."""
    tokens, leaf = torch.arange(V), student.clone().requires_grad_()
    logprobs, theirs = leaf.log_softmax(-1).expand(V, V), teacher.log_softmax(-1).expand(V, V)
    loss = divergence(make_evidence(tokens, logprobs, theirs, behaviour=behaviour)).loss
    return torch.autograd.grad((behaviour.exp() * loss)[behaviour.isfinite()].sum(), leaf)[0]


def bias(divergence, mix, seed, heat=1.0):
    """How far the expected gradient over drawn tokens is from that over the student's own, against its size."""
    (student,), (teacher,) = draw_logits(seed, rows=1)
    expected = gradient(SampledReverseKL(clip=None), student, teacher, student.log_softmax(-1))
    found = gradient(divergence, student, teacher, mix(student / heat, teacher))
    return float((found - expected).norm() / expected.norm())


MIXES = {
    "mixed": lambda student, teacher: mixed(student, teacher, 0.4),
    "speculative": lambda student, teacher: speculative(student, teacher, 2),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize(
    "divergence", [SampledReverseKL(clip=None), EstimatedReverseKL("k4"), EstimatedReverseKL("k2")], ids=str
)
@pytest.mark.parametrize("heat", [1.0, 2.0])
def test_correction_without_a_clip_gives_the_gradient_of_the_students_own_tokens(mix, divergence, heat):
    assert max(bias(divergence, mix, seed, heat) for seed in range(20)) < 1e-4


def test_clip_does_not_bias_teacher_mixing():
    """The ratio is on the side of the advantage on which nothing is cut, however narrow the clip is."""
    for clip, share in itertools.product((1e-3, 0.2), (0.05, 0.4, 0.9)):
        found = [bias(SampledReverseKL(clip), lambda p, q, s=share: mixed(p, q, s), seed) for seed in range(20)]
        assert max(found) < 1e-4


def test_clip_biases_teacher_mixing_under_a_sampler_of_another_temperature():
    assert max(bias(SampledReverseKL(0.2), MIXES["mixed"], seed, heat=2.0) for seed in range(20)) > 0.05


def test_clip_biases_speculative_mixing_on_both_sides():
    """As its documentation says: a likely token whose ratio is small, and an unlikely one whose ratio is large."""
    assert max(bias(SampledReverseKL(0.2), MIXES["speculative"], seed) for seed in range(20)) > 0.02
    cut = set()
    for seed in range(50):
        (student,), (teacher,) = draw_logits(seed, rows=1)
        ratio = student.log_softmax(-1) - speculative(student, teacher, 2)
        advantage = teacher.log_softmax(-1) - student.log_softmax(-1)
        cut |= {"below"} if ((ratio.exp() < 0.8) & (advantage < 0)).any() else set()
        cut |= {"above"} if ((ratio.exp() > 1.2) & (advantage > 0)).any() else set()
    assert cut == {"below", "above"}


def test_ratio_of_teacher_mixing_has_a_bound_and_that_of_speculative_mixing_has_none():
    student, teacher = draw_logits(3, rows=2000, scale=6.0)
    p = student.log_softmax(-1)
    assert float((p - mixed(student, teacher, 0.2)).exp().max()) <= 1 / 0.8 + 1e-4
    assert float((p - speculative(student, teacher, 2)).exp().max()) > 1e3


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.4), (0.5, 0.2), (1.0, 0.0)])
def test_share_is_annealed(progress, share):
    student, teacher = draw_logits(4)
    found = TeacherMixing(0.4, Linear(1.0, 0.0)).blend(student, teacher, progress)
    torch.testing.assert_close(found, mixed(student, teacher, share))
    assert (TeacherMixing(0.4).blend(student, teacher, progress) == mixed(student, teacher, 0.4)).all()


@pytest.mark.parametrize("factor", [-1.0, 9.0])
def test_annealing_does_not_leave_the_interval(factor):
    student, teacher = draw_logits(4)
    found = TeacherMixing(0.4, Linear(factor, factor)).blend(student, teacher, 0.0)
    torch.testing.assert_close(found, mixed(student, teacher, float(factor > 0)))


def test_speculative_mixing_accepts_its_k():
    student, teacher = draw_logits(5)
    torch.testing.assert_close(SpeculativeMixing(3).blend(student, teacher, 0.0), speculative(student, teacher, 3))


@pytest.mark.parametrize("mixture", [TeacherMixing(), SpeculativeMixing()], ids=lambda each: type(each).__name__)
def test_all_rows_are_the_students_and_the_mixture_has_nothing_to_say(mixture):
    plan = mixture.plan(PROMPTS, 2, 0.0, 0)
    assert plan.author == [Author.STUDENT] * 4
    assert mixture.blends
    term = mixture(make_evidence(torch.tensor([0, 1]), torch.zeros(2, 3).log_softmax(-1), author=Author.STUDENT))
    assert not term.where.any()


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match=r"share of at least 0 and below 1, but got .*TeacherMixture"):
        TeacherMixing(share)


def test_impossible_k_is_refused():
    with pytest.raises(ValueError, match=r"k of at least 1, but got 0\. .*TeacherMixture"):
        SpeculativeMixing(0)
