"""How student and teacher compare, against torch.distributions and sets."""

import pytest
import torch
from torch.distributions import Categorical

from stable_opd import Author, build, diagnostics
from stable_opd.diagnostics import entropy, overlap
from streams import VOCABULARY, N, draw_evidence, draw_states, stream


def diagnose(evidence, shares):
    student, teacher = draw_states(0), draw_states(1)
    found = stream({"kl": build("divergence", "ReverseKL")}, evidence, shares, student, teacher).diagnostics
    return found, [Categorical(logits=model.states @ model.head.weight.T) for model in (student, teacher)]


# 23 positions of 41 entries each: as many as the limit on entries allows, and never fewer than the least number.
@pytest.mark.parametrize(
    ("entries", "positions", "stride"),
    [(10**6, 1, 1), (943, 1, 1), (400, 1, 2), (115, 1, 11), (1, 1, 23), (1, 5, 4), (400, 5, 2), (1, 64, 1)],
)
def test_means_over_the_vocabulary_are_taken_at_evenly_spaced_positions(entries, positions, stride, tile, monkeypatch):
    monkeypatch.setattr(diagnostics, "ENTRIES", entries)
    monkeypatch.setattr(diagnostics, "POSITIONS", positions)
    evidence, shares = draw_evidence()
    found, (ours, theirs) = diagnose(evidence, shares)
    torch.testing.assert_close(found["student"], ours.log_prob(evidence.tokens))
    torch.testing.assert_close(found["teacher"], theirs.log_prob(evidence.tokens))
    seen = torch.arange(0, N, stride)
    torch.testing.assert_close(found["entropy_student"], ours.entropy()[seen])
    torch.testing.assert_close(found["entropy_teacher"], theirs.entropy()[seen])
    likeliest = [[set(row.topk(16).indices.tolist()) for row in each.logits[seen]] for each in (ours, theirs)]
    shared = [len(a & b) / 16 for a, b in zip(*likeliest, strict=True)]
    torch.testing.assert_close(found["overlap"], torch.tensor(shared))
    assert 0 < min(shared) <= max(shared) < 1


def test_a_model_of_common_size_is_looked_at_in_part():
    """Otherwise the tests with a limit of their own would say nothing about what is shipped."""
    assert N * VOCABULARY < diagnostics.ENTRIES < 4096 * 151_936


def test_without_a_teacher_there_are_no_diagnostics():
    evidence, shares = draw_evidence(Author.GOLDEN)
    found = stream({"m": build("mixture", "GoldenMixture")}, evidence, shares, draw_states(0)).diagnostics
    assert not any(name in found for name in ("student", "teacher", "entropy_student", "entropy_teacher", "overlap"))


def test_entropy_of_a_distribution_with_impossible_tokens():
    logprobs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    torch.testing.assert_close(entropy(logprobs), torch.tensor([2.0, 1.0]).log())


def test_overlap_of_a_small_vocabulary_is_complete():
    assert overlap(torch.randn(4, 5), torch.randn(4, 5)).tolist() == [1.0] * 4
