"""How student and teacher compare, against torch.distributions, sets and plain loops."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from helpers import make_evidence
from stable_opd import Author, build, diagnostics
from stable_opd.diagnostics import Diagnostics, divergence, overlap
from stable_opd.streaming import known_logprobs
from stable_opd.types import Scores
from streams import VOCABULARY, N, draw_evidence, draw_states, stream

STOP = (3, 17, 40)


def diagnose(evidence, shares, k=None):
    """With a k, the teacher tells no more than its k likeliest tokens."""
    student, teacher = draw_states(0), draw_states(1)
    term = build("divergence", "ReverseKL" if k is None else "SampledReverseKL")
    told = teacher if k is None else known_logprobs(teacher, evidence.tokens, k)
    found = stream({"kl": term}, evidence, shares, student, told).diagnostics
    return found, [Categorical(logits=model.states @ model.head.weight.T) for model in (student, teacher)]


def shared_tokens(p, q, k=16):
    """Share and advantage of the overlap at one position, by sets and sums of probabilities."""
    ours, theirs = (sorted(range(len(each)), key=lambda v: -each[v])[:k] for each in (p, q))
    both = set(ours) & set(theirs)
    mass, other = sum(p[v] for v in both), sum(q[v] for v in both)
    advantage = sum(p[v] / mass * (math.log(q[v] / other) - math.log(p[v] / mass)) for v in both)
    return len(both) / k, advantage


# 23 positions of 41 entries each: as many as the limit on entries allows, and never fewer than the least number.
@pytest.mark.parametrize(
    ("entries", "positions", "stride"),
    [(10**6, 1, 1), (943, 1, 1), (400, 1, 2), (115, 1, 11), (1, 1, 23), (1, 5, 4), (400, 5, 2), (1, 64, 1)],
)
def test_means_over_the_vocabulary_are_taken_at_evenly_spaced_positions(entries, positions, stride, tile, monkeypatch):
    monkeypatch.setattr(diagnostics, "ENTRIES", entries)
    monkeypatch.setattr(diagnostics, "POSITIONS", positions)
    evidence, shares = draw_evidence()
    evidence.author[4:9] = int(Author.GOLDEN)
    found, (ours, theirs) = diagnose(evidence, shares)
    torch.testing.assert_close(found["student"], ours.log_prob(evidence.tokens))
    torch.testing.assert_close(found["teacher"], theirs.log_prob(evidence.tokens))
    first = int(found["position"][0])
    assert 0 <= first < stride
    seen = torch.arange(first, N, stride)
    assert found["position"].tolist() == seen.tolist()
    assert found["stands_for"].tolist() == [0 if 4 <= place < 9 else stride for place in seen.tolist()]
    torch.testing.assert_close(found["entropy_student"], ours.entropy()[seen])
    torch.testing.assert_close(found["entropy_teacher"], theirs.entropy()[seen])
    torch.testing.assert_close(found["kl"], kl_divergence(ours, theirs)[seen])
    pairs = zip(ours.probs[seen].double().tolist(), theirs.probs[seen].double().tolist(), strict=True)
    share, advantage = torch.tensor([shared_tokens(p, q) for p, q in pairs]).T
    torch.testing.assert_close(found["overlap"], share)
    torch.testing.assert_close(found["overlap_advantage"], advantage)
    assert 0 < share.min() <= share.max() < 1
    assert advantage.max() < -0.1


def test_stop_is_looked_at_at_every_position(tile, monkeypatch):
    monkeypatch.setattr(diagnostics, "ENTRIES", 1)
    monkeypatch.setattr(diagnostics, "POSITIONS", 2)
    evidence, shares = draw_evidence()
    evidence.tokens[[2, 5, 21]] = torch.tensor([17, 40, 3])
    evidence.author[5] = int(Author.TEACHER)
    found, (ours, theirs) = diagnose(replace(evidence, stop=STOP), shares)
    torch.testing.assert_close(found["stop_student"], ours.probs[:, list(STOP)].sum(1))
    torch.testing.assert_close(found["stop_teacher"], theirs.probs[:, list(STOP)].sum(1))
    assert found["stopped"].tolist() == [n != 5 and token in STOP for n, token in enumerate(evidence.tokens.tolist())]
    assert len(found["kl"]) <= 3


def test_stop_tokens_beyond_the_shared_vocabulary_have_no_mass():
    scores = Scores(logprobs=torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log())
    written = torch.tensor([0, 1])
    torch.testing.assert_close(scores.mass((1, 7), written), torch.tensor([0.75, 0.5]))
    assert scores.mass((7,), written).tolist() == scores.mass((), written).tolist() == [0, 0]


def test_of_a_teacher_that_tells_its_likeliest_tokens_only_what_is_known_is_compared():
    evidence, shares = draw_evidence()
    whole, (_, theirs) = diagnose(replace(evidence, stop=STOP), shares)
    k = 20
    found, _ = diagnose(replace(evidence, stop=STOP), shares, k=k)
    for name in ("student", "teacher", "entropy_student", "overlap", "overlap_advantage", "stop_student"):
        torch.testing.assert_close(found[name], whole[name])
    best = theirs.probs.topk(k, -1).indices
    known = torch.cat([best, evidence.tokens[:, None]], -1)
    known = torch.stack([theirs.probs[:, token] * (known == token).any(-1) for token in STOP]).sum(0)
    torch.testing.assert_close(found["stop_teacher"], known)
    assert found["kl"].isnan().all()
    assert found["entropy_teacher"].isnan().all()


@pytest.mark.parametrize("count", [9, 23, 150, 999])
def test_over_many_steps_every_position_weighs_as_much_as_any_other(count, monkeypatch):
    """Also the first of a row, and those at the end; otherwise a mean would depend on where a batch is cut."""
    monkeypatch.setattr(diagnostics, "ENTRIES", 1)
    monkeypatch.setattr(diagnostics, "POSITIONS", 10)
    logprobs = torch.zeros(count, 2).log_softmax(-1)
    evidence = make_evidence(torch.zeros(count, dtype=torch.long), logprobs, logprobs)
    steps, sums = 1500, torch.zeros(count)
    for step in range(steps):
        found = Diagnostics()
        found.add(replace(evidence, progress=step / steps), 0, count)
        sums[found["position"]] += found["stands_for"]
    stride = max(1, count // 10)
    deviation = math.sqrt((stride - 1) / steps)  # of a mean of draws that are `stride` with chance 1 / stride, else 0
    assert ((sums / steps - 1).abs() <= 4.5 * deviation).all()


def test_a_model_of_common_size_is_looked_at_in_part():
    """Otherwise the tests with a limit of their own would say nothing about what is shipped."""
    assert N * VOCABULARY < diagnostics.ENTRIES < 4096 * 151_936


def test_without_a_teacher_there_are_no_diagnostics():
    evidence, shares = draw_evidence(Author.GOLDEN)
    found = stream({"m": build("mixture", "GoldenMixture")}, evidence, shares, draw_states(0)).diagnostics
    assert not any(name in found for name in ("student", "teacher", "kl", "entropy_teacher", "overlap", "stopped"))


def test_entropies_and_divergence_of_distributions_with_impossible_tokens():
    student = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]).log()
    teacher = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.25, 0.5], [0.0, 1.0, 0.0]]).log()
    ours, theirs, kl = divergence(student, teacher)
    torch.testing.assert_close(ours, torch.tensor([2.0, 1.0, 2.0]).log())
    expected = [0.25 * math.log(4) + 0.75 * math.log(4 / 3), 1.5 * math.log(2), 0.0]
    torch.testing.assert_close(theirs, torch.tensor(expected))
    torch.testing.assert_close(kl[:2], torch.tensor([0.5 * math.log(4 / 3), math.log(4)]))
    assert 1e30 < kl[2] < math.inf


def test_overlap_of_a_small_vocabulary_is_complete():
    student, teacher = torch.randn(4, 5).log_softmax(-1), torch.randn(4, 5).log_softmax(-1)
    share, advantage = overlap(Scores(logprobs=student), Scores(logprobs=teacher))
    assert share.tolist() == [1.0] * 4
    torch.testing.assert_close(
        advantage, -kl_divergence(Categorical(logits=student), Categorical(logits=teacher)), rtol=1e-4, atol=1e-6
    )


def test_where_no_likely_token_is_shared_the_advantage_has_no_weight():
    """The first position has none; at the second there is one, whose advantage is 0 whatever its probabilities."""
    order = torch.arange(40.0)
    student = torch.stack([order, order]).log_softmax(-1)
    teacher = torch.stack([order.flip(0), order.flip(0).index_fill(0, torch.tensor([39]), 60.0)]).log_softmax(-1)
    share, advantage = overlap(Scores(logprobs=student), Scores(logprobs=teacher))
    assert share.tolist() == [0, 1 / 16]
    assert advantage.tolist() == [0, 0]
    found = Diagnostics()
    found.add(make_evidence(torch.tensor([0, 0]), student, teacher), 0, 2)
    assert found["overlapping"].tolist() == [0, 1]
    assert found["stands_for"].tolist() == [1, 1]


def test_overlap_of_two_shared_tokens_by_hand(monkeypatch):
    """Tokens 0 and 1 are shared: p' = (2/3, 1/3), q' = (1/4, 3/4)."""
    monkeypatch.setattr(diagnostics, "OVERLAP_K", 3)
    student = torch.tensor([[0.4, 0.2, 0.3, 0.05, 0.05]]).log()
    teacher = torch.tensor([[0.2, 0.6, 0.01, 0.15, 0.04]]).log()
    share, advantage = overlap(Scores(logprobs=student), Scores(logprobs=teacher))
    assert share.item() == pytest.approx(2 / 3)
    assert advantage.item() == pytest.approx(2 / 3 * math.log(3 / 8) + 1 / 3 * math.log(9 / 4), rel=1e-5)
