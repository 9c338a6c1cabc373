import pytest
import torch

from divergences.common import AUTHORS, draw_logits, see
from helpers import make_evidence
from stable_opd.divergences.baselines import ExactBaseline
from stable_opd.divergences.extrapolated import ExtrapolatedTeacher
from stable_opd.divergences.gated import AsymmetricDivergence, TrustGated
from stable_opd.divergences.kl import ForwardKL, ReverseKL
from stable_opd.divergences.sampled import EstimatedReverseKL, SampledReverseKL
from stable_opd.divergences.top_k import TeacherTopKForwardKL
from stable_opd.divergences.transforms import ClipAdvantage
from streams import compare, draw_evidence, draw_states

each_gate = pytest.mark.parametrize("gated", [TrustGated, AsymmetricDivergence])


def gates(gated, evidence):
    gap = evidence.teacher.sampled - evidence.student.sampled.detach()
    return gap.exp().clamp(max=1) if gated is TrustGated else (gap > 0).to(gap.dtype)


@pytest.mark.parametrize("local", [ReverseKL(), ForwardKL(), TeacherTopKForwardKL(3), EstimatedReverseKL("k4")])
@pytest.mark.parametrize("sampled", [SampledReverseKL(), SampledReverseKL(clip=None, transform=ClipAdvantage())])
@each_gate
def test_mixes_losses_values_and_gradients_token_by_token(gated, sampled, local):
    student, teacher = draw_logits(2)
    student.requires_grad_()
    evidence = see(student, teacher, behaviour=torch.full((6,), -2.0))
    gate = gates(gated, evidence)
    assert 0 < gate.sum() < 6
    found, one, other = (term(evidence) for term in (gated(local, sampled), sampled, local))
    torch.testing.assert_close(found.value, gate * one.value + (1 - gate) * other.value)
    gradients = [torch.autograd.grad(term.loss.sum(), student, retain_graph=True)[0] for term in (found, one, other)]
    torch.testing.assert_close(gradients[0], gate[:, None] * gradients[1] + (1 - gate)[:, None] * gradients[2])


@each_gate
def test_default_parts_are_those_of_the_papers(gated):
    term = gated()
    assert (type(term.local), term.local.k) == (TeacherTopKForwardKL, 64)
    assert type(term.sampled) is SampledReverseKL
    assert (term.support, term.positionwise, term.needs_reference) == ("topk", True, False)


@pytest.mark.parametrize(
    ("local", "sampled", "support", "reference"),
    [
        (ReverseKL(), None, "full", False),
        (EstimatedReverseKL(), None, "sampled", False),
        (EstimatedReverseKL(), SampledReverseKL(baseline=ExactBaseline()), "full", False),
        (None, SampledReverseKL(baseline=ExactBaseline()), "full", False),
        (None, ExtrapolatedTeacher(), "topk", True),
    ],
)
@each_gate
def test_what_it_has_to_see_follows_from_its_parts(gated, local, sampled, support, reference):
    term = gated(local, sampled)
    assert (term.support, term.needs_reference) == (support, reference)


@each_gate
def test_agreement_gives_nothing(gated):
    logits = draw_logits()[0].requires_grad_()
    found = gated(TeacherTopKForwardKL(4))(see(logits, logits.detach()))
    assert found.value.abs().max() < 1e-13
    assert torch.autograd.grad(found.loss.sum(), logits)[0].abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_gate
def test_extremes_are_finite(gated, dtype):
    certain = 1e4 * torch.eye(6, 9, dtype=torch.float64)
    far = draw_logits(3, scale=1e4)
    ruled_out = torch.zeros(6, 9, dtype=torch.float64).masked_fill(certain > 0, -float("inf"))
    for student, teacher in (far, (certain, -certain), (-certain, certain), (far[0], ruled_out)):
        logits = student.to(dtype).requires_grad_()
        models = logits.log_softmax(-1), teacher.to(dtype).log_softmax(-1)
        found = gated(TeacherTopKForwardKL(8))(make_evidence(torch.arange(6), *models))
        assert found.loss.isfinite().all()
        assert found.value.isfinite().all()
        assert torch.autograd.grad(found.loss.sum(), logits)[0].isfinite().all()


@each_gate
def test_speaks_about_the_students_tokens_and_where_a_part_is_silent_the_other_counts(gated):
    class Silent(ReverseKL):
        """Speaks about the first token alone, and calls the others nan."""

        def forward(self, evidence):
            term = super().forward(evidence)
            where = evidence.position == 0
            return term._replace(
                loss=term.loss.where(where, torch.nan), value=term.value.where(where, torch.nan), where=where
            )

    student, teacher = draw_logits(2)
    evidence = see(student, teacher, AUTHORS)
    found, sampled = gated(Silent())(evidence), SampledReverseKL()(evidence)
    assert found.where.tolist() == [True, True, False, True, False, True]
    gate = gates(gated, evidence)
    torch.testing.assert_close(found.loss[[1, 3, 5]], (gate * sampled.loss)[[1, 3, 5]])


@each_gate
def test_parts_that_follow_rows_are_refused(gated):
    for parts in ((None, SampledReverseKL(discount=0.5)), (SampledReverseKL(discount=0.5), None)):
        with pytest.raises(ValueError, match=r"got a SampledReverseKL that follows rows\. Set its discount to 0"):
            gated(*parts)


@pytest.mark.parametrize("local", [None, ReverseKL(), EstimatedReverseKL()], ids=["topk", "full", "sampled"])
@each_gate
def test_in_tiles_it_is_what_it_is_at_once(gated, local, tile):
    evidence, shares = draw_evidence()
    compare({"term": gated(local)}, evidence, shares, draw_states(0, bias=True, softcap=4.0))
