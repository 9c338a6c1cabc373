"""From a rollout to gradients: who scores what, denominators, and the identities that make the objective right."""

import pytest
import torch
import torch.nn.functional as F

from helpers import EOS, TOKENIZER, VOCABULARY, make_rollout, save, tiny_model, total_of_one_process
from stable_opd import (
    Author,
    Divergence,
    GoldenMixture,
    LocalTeacher,
    ReferenceKL,
    Repetition,
    ReverseKL,
    SampledReverseKL,
    StudentOnly,
    TokenLoss,
    build,
    components,
)
from stable_opd.divergences import reverse_kl
from stable_opd.models import frozen_copy
from stable_opd.objective import Cutting, Objective, evaluate, pieces
from stable_opd.readers import Readers
from stable_opd.tally import Tally

CPU = torch.device("cpu")
PROMPTS = [[12, 3, 13, 5], [12, 1], [12, 7, 10, 2, 11, 9], [12, 3, 13, 5], [12, 1], [12, 7, 10, 2, 11, 9]]
AUTHORS = [Author.STUDENT] * 4 + [Author.GOLDEN] * 2


@pytest.fixture(scope="module")
def teacher(teacher_path):
    teacher = LocalTeacher(teacher_path)
    teacher.setup("student", TOKENIZER, CPU)
    return teacher


def draw_rollout(student, empty=False):
    """Ragged rows of random tokens; the student's carry its own log-probs, so that the ratio is 1."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 11, 0 if empty else 2, 7, 6, 3]
    rows = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    logprobs = []
    for prompt, row, author in zip(PROMPTS, rows, AUTHORS, strict=True):
        if author == Author.STUDENT:
            with torch.no_grad():
                full = student(torch.tensor([prompt + row])).logits[0].log_softmax(-1)
            logprobs.append(full[torch.arange(len(row)) + len(prompt) - 1, row])
        else:
            logprobs.append(torch.zeros(len(row)))
    return make_rollout(rows, PROMPTS, AUTHORS, behaviour=torch.cat(logprobs))


def nothing_repeats(rollout):
    return Repetition(torch.zeros(len(rollout.row), dtype=torch.bool), torch.zeros(len(rollout), dtype=torch.bool))


def cut(rollout, own, other, aggregation="sequence_mean", max_tokens=10**6, repetition=None, progress=0.0, **options):
    """Micro-batches, and the share of every token in the mean of each term."""
    found, objective = repetition or nothing_repeats(rollout), Objective(own, other, aggregation)
    work = list(pieces(rollout, found, objective, Cutting(max_tokens, progress=progress, stop=(EOS,), **options)))
    return work, objective.shares(rollout, total_of_one_process)


def step(model, teacher, reference, job):
    """Loss and gradients of one optimizer step."""
    model.zero_grad()
    work, shares = job
    tally, loss = Tally(shares, CPU), 0.0
    readers = Readers(teacher)
    readers.reference = reference
    for piece, readings in zip(work, readers.read(work, VOCABULARY), strict=True):
        result = evaluate(piece, readings, shares, model, VOCABULARY)
        result.loss.backward()
        tally.add(result)
        loss += result.loss.item()
    return loss, tally, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    """Equal up to the rounding of float32, which goes with the largest entry of a gradient and not with each."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = tensor.abs().max().item()
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-6 + 2e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


STABLE = {"divergence": SampledReverseKL(), "anchor": ReferenceKL(0.3)}
GOLDEN = {"mixture": GoldenMixture(0.7)}


def plain_loss(model, teacher, reference, rollout, aggregation):
    """Stable-OPD's objective, row by row on materialised logits, with the formulas written out."""

    def logprobs(scorer, row):
        prompt = PROMPTS[row]
        ids = rollout.select(torch.tensor([row])).tokens
        return scorer(ids[None]).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]

    own, golden = [], []
    for row, author in enumerate(AUTHORS):
        part = rollout.select(torch.tensor([row]))
        p = logprobs(model, row)
        written = p.gather(1, part.completion[:, None]).squeeze(1)
        if author == Author.GOLDEN:
            golden.append(-0.7 * written)
            continue
        with torch.no_grad():
            q, p0 = logprobs(teacher.model, row), logprobs(reference, row)
        advantage = q.gather(1, part.completion[:, None]).squeeze(1) - written.detach()
        ratio = (written - part.behaviour_logprobs).exp()
        surrogate = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        own.append(surrogate + 0.3 * F.kl_div(p0, p, reduction="none", log_target=True).sum(1))

    def mean(rows):
        if aggregation == "token_mean":
            return torch.cat(rows).mean()
        return torch.stack([row.mean() for row in rows if len(row)]).mean()

    return mean(own) + mean(golden)


HEADS = {"tied": {}, "untied": {"tie_word_embeddings": False}, "frozen": {"tie_word_embeddings": False}}


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("empty", [False, True], ids=["all rows", "one empty row"])
def test_stable_opd_equals_its_formulas_on_materialised_logits(head, aggregation, empty, teacher):
    model, reference = tiny_model(1, **HEADS[head]), tiny_model(7)
    model.lm_head.weight.requires_grad_(head != "frozen")
    rollout = draw_rollout(model, empty)
    loss, _, gradients = step(model, teacher, reference, cut(rollout, STABLE, GOLDEN, aggregation))
    model.zero_grad()
    expected = plain_loss(model, teacher, reference, rollout, aggregation)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert ("lm_head.weight" in gradients) == (head == "untied")


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("max_tokens", [1, 20, 34])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_micro_batches_give_the_loss_and_gradients_of_one_batch(aggregation, max_tokens, padded, teacher):
    model, reference = tiny_model(1), tiny_model(7)
    rollout = draw_rollout(model, empty=True)
    whole = cut(rollout, STABLE, GOLDEN, aggregation)
    parts = cut(rollout, STABLE, GOLDEN, aggregation, max_tokens, padded=padded)
    assert len(parts[0]) > len(whole[0]) == 1
    loss, tally, gradients = step(model, teacher, reference, parts)
    whole_loss, whole_tally, expected = step(model, teacher, reference, whole)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert_same(gradients, expected)
    assert_same(tally.losses, whole_tally.losses)
    assert_same(tally.values, whole_tally.values)


@pytest.mark.parametrize("max_tokens", [6, 9, 10**6])
def test_each_token_keeps_its_facts_when_rows_are_spread_and_reordered(max_tokens):
    """Every token of this rollout is written once, so the token says which facts belong to it."""
    rows = [[1, 2, 3], [], [4, 5, 6, 7, 8], [9], [10, 11]]
    authors = [Author.STUDENT, Author.STUDENT, Author.GOLDEN, Author.STUDENT, Author.STUDENT]
    rollout = make_rollout(rows, authors=authors, behaviour=-torch.arange(1.0, 12.0))
    repetition = Repetition(rollout.completion % 3 == 0, torch.zeros(5, dtype=torch.bool))
    seen = []
    work, _ = cut(rollout, {"o": ReverseKL()}, {"m": GoldenMixture()}, "sequence_mean", max_tokens, repetition)
    for piece in work:
        for group in piece.groups:
            evidence = group.evidence
            assert list(group.terms) == (["o"] if group.on_policy else ["m"])
            assert group.rollout.completion.tolist() == evidence.tokens.tolist()
            for place, token in enumerate(evidence.tokens.tolist()):
                row = next(number for number, each in enumerate(rows) if token in each)
                assert evidence.position[place] == rows[row].index(token)
                assert evidence.in_loop[place] == (token % 3 == 0)
                assert evidence.author[place] == authors[row]
                assert evidence.behaviour_logprobs[place] == -token
                assert rollout.completion[group.places[place]] == token
                assert (authors[row] == Author.STUDENT) == group.on_policy
                seen.append(token)
        # The states of the student stand in the order of the groups.
        assert piece.rollout.completion.tolist() == seen[-len(piece.rollout.completion) :]
    assert sorted(seen) == list(range(1, 12))


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("samples", [1, 3])
def test_weight_of_golden_rows_does_not_depend_on_the_number_of_rollouts(aggregation, samples):
    rows = [[1, 2, 3]] * samples + [[4, 5], [6, 7, 8, 9]]
    authors = [Author.STUDENT] * samples + [Author.GOLDEN] * 2
    _, shares = cut(make_rollout(rows, authors=authors), {"o": ReverseKL()}, {"m": GoldenMixture()}, aggregation)
    own = torch.arange(3 * samples + 6) < 3 * samples
    assert [shares["o"][own].sum().item(), shares["m"][~own].sum().item()] == pytest.approx([1.0, 1.0])
    assert shares["o"][~own].abs().max() == shares["m"][own].abs().max() == 0


def test_rows_of_student_and_others_share_a_micro_batch_where_they_fit():
    rows, authors = [[1, 2, 3], [4, 5, 6], [7]], [Author.GOLDEN, Author.STUDENT, Author.STUDENT]
    (piece,), _ = cut(make_rollout(rows, authors=authors), {"o": ReverseKL()}, {"m": GoldenMixture()}, max_tokens=10)
    assert [group.on_policy for group in piece.groups] == [True, False]
    assert [group.rollout.author.tolist() for group in piece.groups] == [[Author.STUDENT] * 2, [Author.GOLDEN]]
    assert piece.rollout.author.tolist() == [Author.STUDENT] * 2 + [Author.GOLDEN]
    # 10 tokens with their prompts; where rows are padded they would be 12.
    assert len(cut(make_rollout(rows, authors=authors), {}, {}, max_tokens=10, padded=True)[0]) == 2


def test_progress_reaches_the_components():
    (piece,), _ = cut(make_rollout([[1]]), {"o": ReverseKL()}, {}, progress=0.375)
    assert piece.groups[0].evidence.progress == 0.375


def test_rollout_without_tokens_has_no_pieces():
    assert cut(make_rollout([[], []]), {"o": ReverseKL()}, {"m": GoldenMixture()})[0] == []


@pytest.mark.parametrize("name", components("divergence"))
def test_teacher_equal_to_the_student_gives_zero_loss_and_zero_gradient(name, student_path):
    model, same = tiny_model(1), LocalTeacher(student_path)
    same.setup("student", TOKENIZER, CPU)
    work = cut(draw_rollout(model), {"divergence": build("divergence", name)}, {})
    loss, tally, gradients = step(model, same, frozen_copy(model), work)
    assert loss == pytest.approx(0, abs=1e-6)
    assert tally.values["divergence"].item() == pytest.approx(0, abs=1e-6)
    assert max(gradient.abs().max().item() for gradient in gradients.values()) < 1e-5


@pytest.mark.parametrize("name", components("divergence"))
def test_another_teacher_gives_a_gradient_everywhere(name, teacher):
    """Otherwise the test above would pass on a divergence that is always zero."""
    model = tiny_model(1)
    _, _, gradients = step(
        model, teacher, tiny_model(7), cut(draw_rollout(model), {"d": build("divergence", name)}, {})
    )
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert min(gradient.norm().item() for gradient in gradients.values()) > 1e-3


@pytest.mark.parametrize("name", [name for name, cls in components("constraint").items() if cls.needs_reference])
def test_reference_equal_to_the_student_gives_zero_loss_and_zero_gradient(name, teacher):
    model = tiny_model(1)
    constraint = build("constraint", name, weight=1.0)
    work = cut(draw_rollout(model), {"anchor": constraint}, {})
    loss, tally, gradients = step(model, teacher, frozen_copy(model), work)
    assert loss == pytest.approx(0, abs=1e-6)
    assert tally.values["anchor"].item() == pytest.approx(0, abs=1e-6)
    assert max(gradient.abs().max().item() for gradient in gradients.values()) < 1e-5
    _, _, others = step(model, teacher, tiny_model(7), work)
    assert min(gradient.norm().item() for gradient in others.values()) > 1e-3


@pytest.mark.parametrize("prompt", [[12, 3, 13, 5], [12, 1]], ids=str)
def test_expected_sampled_gradient_over_all_continuations_is_the_exact_one(prompt, teacher):
    """One row for each token of the vocabulary, weighted with its probability under the student."""
    model = tiny_model(1)
    with torch.no_grad():
        p = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    rollout = make_rollout([[token] for token in range(VOCABULARY)], [prompt] * VOCABULARY, behaviour=p)
    work, _ = cut(rollout, {"divergence": SampledReverseKL()}, {})
    _, tally, sampled = step(model, teacher, None, (work, {"divergence": p.exp()}))

    model.zero_grad()
    student = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    with torch.no_grad():
        target = teacher.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    exact = reverse_kl(student, target)
    exact.backward()
    assert tally.values["divergence"].item() == pytest.approx(exact.item(), rel=1e-5)
    assert_same(sampled, {name: parameter.grad for name, parameter in model.named_parameters()})


def test_only_models_that_a_term_needs_are_asked(teacher):
    """A teacher may cost money: supervised rows must not be sent to it."""

    class Expensive(LocalTeacher):
        """Keeps what it was asked."""

        def __init__(self, path):
            super().__init__(path)
            self.authors = []

        def score(self, rollout):
            self.authors.append(rollout.author.tolist())
            return super().score(rollout)

    counting = Expensive(teacher.path)
    counting.setup("student", TOKENIZER, CPU)
    model = tiny_model(1)
    rollout = draw_rollout(model)
    step(model, counting, None, cut(rollout, {}, GOLDEN))
    assert counting.authors == []
    step(model, counting, None, cut(rollout, {"divergence": ReverseKL()}, GOLDEN))
    assert counting.authors == [[Author.STUDENT] * 4]


def test_a_padded_student_learns_over_the_shared_vocabulary(tmp_path):
    """Head rows beyond the tokenizer get no gradient, and change nothing."""
    padded = tiny_model(1, tie_word_embeddings=False, vocab_size=VOCABULARY + 9)
    small = tiny_model(1, tie_word_embeddings=False)
    parameters = dict(padded.named_parameters())
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(parameters[name][: len(parameter)])
    same = LocalTeacher(save(tiny_model(2, vocab_size=VOCABULARY + 5), tmp_path))
    same.setup("student", TOKENIZER, CPU)
    rollout = draw_rollout(small)
    work = cut(rollout, {"divergence": ReverseKL()}, GOLDEN)
    _, _, expected = step(small, same, None, work)
    _, _, found = step(padded, same, None, work)
    head = found["lm_head.weight"]
    assert head[VOCABULARY:].abs().max() == 0
    torch.testing.assert_close(head[:VOCABULARY], expected["lm_head.weight"], rtol=1e-4, atol=1e-6)


def test_student_only_has_nothing_to_say_about_rows_of_others(teacher):
    model = tiny_model(1)
    loss, _, gradients = step(model, teacher, None, cut(draw_rollout(model), {}, {"mixture": StudentOnly()}))
    assert loss == 0
    assert max(gradient.abs().max().item() for gradient in gradients.values()) == 0


def test_tally_reports_means_over_the_students_tokens(teacher):
    model = tiny_model(1)
    rollout = draw_rollout(model)
    marks = Repetition(rollout.position > 2, torch.zeros(len(rollout), dtype=torch.bool))
    work = cut(rollout, {"divergence": ReverseKL()}, GOLDEN, max_tokens=20, repetition=marks)
    _, tally, _ = step(model, teacher, None, work)
    own = int(rollout.lengths[rollout.author == Author.STUDENT].sum())
    compared = tally.compared(total_of_one_process, 11)
    scalars = tally.reduced(total_of_one_process) | compared
    with torch.no_grad():
        states = [
            model(rollout.select(torch.tensor([row])).tokens[None]).logits[0, len(PROMPTS[row]) - 1 : -1]
            for row in range(4)
        ]
    entropies = torch.distributions.Categorical(logits=torch.cat(states)).entropy()
    assert len(tally.tokens("student")) == len(tally.tokens("teacher")) == own
    assert tally.tokens("in_loop").sum() == (rollout.position[:own] > 2).sum()
    assert scalars["entropy_student"].item() == pytest.approx(entropies.mean().item(), rel=1e-4)
    sampled = torch.cat(states).log_softmax(-1).gather(1, rollout.completion[:own, None])
    assert scalars["logprob_student"].item() == pytest.approx(sampled.mean().item(), rel=1e-4)
    assert scalars["loss"].item() == pytest.approx((scalars["loss/divergence"] + scalars["loss/mixture"]).item())
    assert scalars["value/mixture"].item() == pytest.approx(scalars["loss/mixture"].item() / 0.7, rel=1e-5)
    terms = {"loss", "loss/divergence", "loss/mixture", "value/divergence", "value/mixture"}
    assert set(scalars) - set(compared) == terms


def test_tally_adds_up_over_processes(teacher):
    """Losses double and means stay, if another process has done the same."""
    model = tiny_model(1)
    _, tally, _ = step(model, teacher, None, cut(draw_rollout(model), {"divergence": ReverseKL()}, GOLDEN))
    alone, both = (
        tally.reduced(total) | tally.compared(total, 11) for total in (total_of_one_process, lambda local: 2 * local)
    )
    for name in ("loss", "loss/divergence"):
        assert both[name].item() == pytest.approx(2 * alone[name].item())
    means = ("logprob_student", "logprob_teacher", "entropy_student", "entropy_teacher", "overlap")
    for name in (*means, "value/divergence", "value/mixture"):
        assert both[name].item() == pytest.approx(alone[name].item())


def test_a_component_from_elsewhere_trains_the_student(teacher):
    class Scaled(Divergence):
        """Cross-entropy with the student's own log-probs."""

        def forward(self, evidence):
            loss = -2 * evidence.student.sampled
            return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    model = tiny_model(1)
    row, prompt = [1, 2, EOS], [12, 3]
    rollout = make_rollout([row], [prompt])
    loss, _, gradients = step(model, teacher, None, cut(rollout, {"d": Scaled()}, {}, "token_mean"))
    model.zero_grad()
    expected = 2 * F.cross_entropy(model(torch.tensor([prompt + row])).logits[0, 1:-1], torch.tensor(row))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients, {name: parameter.grad for name, parameter in model.named_parameters()})
