import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from divergences.common import assert_reads_the_top_alone, assert_same, draw_logits, each_check, likeliest, outcomes
from stable_opd import ReverseKL, TeacherTopK
from stable_opd.divergences.tail_bucket import TailBucketTopK, least_remainder, tail_bucket_kl, with_bucket

LEAST = least_remainder(torch.float32)


@each_check
@pytest.mark.parametrize("k", [1, 3, 32])
def test_contract(check, k):
    check(TailBucketTopK(k))


def test_known_value():
    """One token stands for itself: the events are (1/2, 1/2) and (1/4, 3/4), and the KL is 1/2 log 4/3."""
    head = torch.tensor([[0.5], [0.25]], dtype=torch.float64).log()
    assert tail_bucket_kl(head[:1], head[1:]).item() == pytest.approx(0.5 * torch.tensor(4 / 3).log().item())


@pytest.mark.parametrize("k", [1, 4, 8])
def test_equals_torch_distributions_over_the_events(k):
    student, teacher = draw_logits()
    inside = likeliest(teacher, k)

    def events(logits):
        probs = logits.softmax(-1)
        return Categorical(torch.cat([probs[inside].view(6, k), (probs * ~inside).sum(-1, keepdim=True)], -1))

    for found, _ in outcomes(TailBucketTopK(k), student, teacher):
        torch.testing.assert_close(found.loss.detach(), kl_divergence(events(student), events(teacher)))


@pytest.mark.parametrize(("scale", "slack"), [(0.3, 1e-12), (3.0, 1e-12), (30.0, 0.1)])
def test_never_negative_and_grows_with_k_up_to_the_reverse_kl(scale, slack):
    """Merging events loses information. A teacher's remainder next to the rounding is known to some percent."""
    student, teacher = draw_logits(scale=scale)
    values = [torch.zeros(6, dtype=torch.float64)]
    values += [outcomes(TailBucketTopK(k), student, teacher)[1][0].value for k in range(1, 10)]
    for less, more in zip(values, [*values[1:], outcomes(ReverseKL(), student, teacher)[1][0].value], strict=True):
        assert (less <= more + slack).all()
    assert (values[2] < values[8] - 1e-6).any()


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_never_negative_and_below_the_reverse_kl_in_float32(scale):
    student, teacher = draw_logits(n=200, vocabulary=50, scale=scale).float()
    exact = kl_divergence(Categorical(logits=student.double()), Categorical(logits=teacher.double()))
    for k in (1, 5, 32, 50):
        for found, _ in outcomes(TailBucketTopK(k), student, teacher):
            assert (found.value > -2e-6).all()
            assert (found.value < exact * (1 + 1e-5) + 2e-6).all()


def test_all_tokens_are_the_reverse_kl():
    student, teacher = draw_logits()
    assert_same(
        outcomes(TailBucketTopK(9), student, teacher), outcomes(ReverseKL(), student, teacher), rtol=1e-9, atol=1e-12
    )


def test_mass_outside_of_the_tokens_is_taken_back_alike():
    """The teacher's two tokens hold 98%, the student gives half of its mass elsewhere."""
    teacher = torch.tensor([[0.6, 0.38, 0.01, 0.01]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.19, 0.4, 0.11]], dtype=torch.float64).log()
    for found, gradient in outcomes(TailBucketTopK(2), student, teacher):
        assert found.value > 1
        assert (gradient[0, 2:] > 0.01).all()
        assert (gradient[0, :2] < 0).all()
        per_mass = gradient / student.exp()
        torch.testing.assert_close(per_mass[0, 2], per_mass[0, 3])
    for found, gradient in outcomes(TeacherTopK(2), student, teacher):
        assert max(found.value.abs().max(), gradient.abs().max()) < 1e-12


def test_sum_over_the_tokens_alone_would_pull_where_both_agree():
    """It is what the bucket is for: the derivative of p log p brings a 1 that adds up to nothing only over all."""
    logits = draw_logits()[0].requires_grad_()
    inside = likeliest(logits, 3)
    p, q = logits.log_softmax(-1), logits.detach().log_softmax(-1)
    (slope,) = torch.autograd.grad((p.exp() * (p - q) * inside).sum(), logits)
    assert slope.abs().max() > 0.01
    for _, gradient in outcomes(TailBucketTopK(3), logits.detach(), logits.detach()):
        assert gradient.abs().max() < 1e-13


@pytest.mark.parametrize("held", [1.0, 1 + 3e-6, 1 - LEAST / 4])
def test_remainder_is_raised_above_the_rounding(held):
    """Also where rounding makes the tokens hold more than everything."""
    head = torch.tensor([[0.75, 0.25]]).log() + torch.tensor(held).log()
    head.requires_grad_()
    found = with_bucket(head)
    torch.testing.assert_close(found.exp(), torch.tensor([[0.75, 0.25, LEAST]]), rtol=1e-4, atol=1e-7)
    assert found[0, 2].item() == pytest.approx(torch.tensor(LEAST).log().item(), abs=1e-3)
    assert found.exp().sum().item() == pytest.approx(1, abs=2e-7)
    assert torch.autograd.grad(found.sum(), head)[0].isfinite().all()


def test_reads_the_top_alone():
    assert_reads_the_top_alone(TailBucketTopK(4))


@pytest.mark.parametrize("k", [0, -3])
def test_fewer_than_one_token_are_refused(k):
    with pytest.raises(ValueError, match=rf"Expected k of at least 1, but got {k}. With the bucket alone"):
        TailBucketTopK(k)
