import pytest
import torch

from stable_opd.divergences.baselines import AdvantageBaseline, ExactBaseline, TopKBaseline


def draw(seed=0, n=5, vocabulary=9, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return list((scale * torch.randn(3, n, vocabulary, generator=generator, dtype=torch.float64)).log_softmax(-1))


def gap(student, teacher, reference):
    return teacher - student


def of_three(student, teacher, reference):
    return (teacher - student).tanh() + student * (teacher - reference)


def naive(worth, student, teacher, reference, k):
    """Position by position and token by token, with all models renormalised on the student's k likeliest."""
    found = []
    for models in zip(student, teacher, reference, strict=True):
        likeliest = sorted(range(len(models[0])), key=lambda v: -models[0][v])[:k]
        kept = [[model[v] for v in likeliest] for model in models]
        kept = [[score - torch.stack(model).logsumexp(0) for score in model] for model in kept]
        found.append(sum(p.exp() * worth(p, q, r) for p, q, r in zip(*kept, strict=True)))
    return torch.stack(found)


@pytest.mark.parametrize("worth", [gap, of_three])
@pytest.mark.parametrize(
    ("baseline", "k"), [(ExactBaseline(), 9), (TopKBaseline(3), 3), (TopKBaseline(1), 1), (TopKBaseline(), 9)]
)
def test_equals_the_definition(worth, baseline, k):
    student, teacher, reference = draw()
    expected = naive(worth, student, teacher, reference, k)
    torch.testing.assert_close(baseline(worth, student, teacher, reference), expected)


def test_works_without_a_reference():
    student, teacher, _ = draw()
    for baseline in (ExactBaseline(), TopKBaseline(4)):
        found = baseline(gap, student, teacher, None)
        assert (found < 0).all()  # minus a KL divergence
        assert baseline(gap, student, student, None).abs().max() == 0


def test_top_k_reads_the_teacher_at_the_students_tokens():
    student, teacher, reference = draw()
    least = student.argmin(-1, keepdim=True)
    changed = teacher.scatter(-1, least, -50.0)
    for baseline, same in ((TopKBaseline(8), True), (ExactBaseline(), False)):
        found = baseline(gap, student, teacher, reference), baseline(gap, student, changed, reference)
        assert torch.allclose(*found) is same


def test_is_a_component_of_its_kind():
    assert issubclass(TopKBaseline, AdvantageBaseline)
    assert AdvantageBaseline.kind == "baseline"


def test_no_token_at_all_is_refused():
    with pytest.raises(ValueError, match=r"k of at least 1, but got 0\. Leave the baseline out"):
        TopKBaseline(0)
