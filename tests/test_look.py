"""The first look at the student's tokens, against plain forward passes row by row."""

import pytest
import torch

from families import family_model
from helpers import TOKENIZER, VOCABULARY, make_rollout, save, tiny_model, total_of_one_process
from stable_opd import Author, Divergence, GoldenMixture, LocalTeacher, Repetition, ReverseKL, TokenLoss
from stable_opd.look import Look, glance
from stable_opd.objective import Cutting, Objective, evaluate, pieces
from stable_opd.packing import packs
from stable_opd.readers import Readers
from stable_opd.tally import Tally

PROMPTS = [[12, 3, 13, 5], [12, 1], [12, 7, 10, 2, 11, 9], [12, 3], [12, 1, 4], [12, 7, 10]]
ROWS = [[5, 4, 9], [7, 8, 3, 2, 11, 6, 1], [], [10, 2, 9, 9], [4, 4, 7, 3, 5], [6]]
S, G, T = Author.STUDENT, Author.GOLDEN, Author.TEACHER
# A row of the student's, one with a golden prefix, an empty one, a golden one, one by turns, and one of a single token.
AUTHORS = [[S] * 3, [G, G, G, S, S, S, S], [], [G] * 4, [T, S, T, S, S], [S]]
ROLLOUT = make_rollout(
    ROWS,
    PROMPTS,
    [S, S, S, G, S, S],
    token_authors=torch.tensor([int(author) for row in AUTHORS for author in row]),
)
OWN = ROLLOUT.token_author == S
REPETITION = Repetition(torch.zeros(len(OWN), dtype=torch.bool), torch.zeros(len(ROWS), dtype=torch.bool))
FIELDS = ("student", "teacher", "entropy", "divergence")

MODELS = {
    "packed": lambda seed: tiny_model(seed),
    "padded": lambda seed: family_model("gpt_neox", seed),
    "softcap": lambda seed: family_model("gemma2", seed),
    "untied, larger vocabulary": lambda seed: tiny_model(seed, tie_word_embeddings=False, vocab_size=VOCABULARY + 7),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return ready(LocalTeacher(save(tiny_model(2), tmp_path_factory.mktemp("teacher"))))


def ready(teacher):
    teacher.setup("student", TOKENIZER, torch.device("cpu"))
    return teacher


def prepare(model, teacher, max_tokens=10**6, objective=None):
    objective = objective or Objective({"divergence": ReverseKL()}, {"mixture": GoldenMixture()})
    work = list(pieces(ROLLOUT, REPETITION, objective, Cutting(max_tokens, not packs(model))))
    return work, list(Readers(teacher).read(work, VOCABULARY)), objective


def look_at(model, teacher, max_tokens=10**6):
    work, readings, _ = prepare(model, teacher, max_tokens)
    return glance(work, readings, model, VOCABULARY, len(OWN))


def plain(model, teacher):
    """The same, row by row, from logits over the whole vocabulary."""
    found = []
    for prompt, row, authors in zip(PROMPTS, ROWS, AUTHORS, strict=True):
        ids = torch.tensor([prompt + row])
        with torch.no_grad():
            p, q = (
                each(ids).logits[0, :, :VOCABULARY].log_softmax(-1)[len(prompt) - 1 : -1] for each in (model, teacher)
            )
        for place, (token, author) in enumerate(zip(row, authors, strict=True)):
            ours, theirs = p[place], q[place]
            values = [ours[token], theirs[token], -(ours.exp() * ours).sum(), (ours.exp() * (ours - theirs)).sum()]
            found.append([value.item() * (author == S) for value in values])
    return torch.tensor(found).T


@pytest.mark.parametrize("max_tokens", [1, 12, 10**6])
@pytest.mark.parametrize("kind", MODELS)
def test_each_token_of_the_students_gets_what_plain_passes_say(kind, max_tokens, teacher, tile):
    model = MODELS[kind](1).eval()
    assert packs(model) == (kind not in ("padded", "softcap"))
    work, _, _ = prepare(model, teacher, max_tokens)
    assert len(work) == {1: 5, 10**6: 1}.get(max_tokens, len(work))
    assert 1 < len(work) < 5 or max_tokens != 12
    seen, expected = look_at(model, teacher, max_tokens), plain(model, teacher.model)
    for name, values in zip(FIELDS, expected, strict=True):
        assert values[OWN].abs().min() > 1e-3
        torch.testing.assert_close(
            getattr(seen, name), values, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert getattr(seen, name)[~OWN].abs().max() == 0


def test_the_same_student_as_teacher_has_no_divergence(tmp_path):
    seen = look_at(tiny_model(1), ready(LocalTeacher(save(tiny_model(1), tmp_path))))
    torch.testing.assert_close(seen.student, seen.teacher)
    assert seen.divergence.abs().max() < 1e-6


def test_dropout_rests_while_the_student_looks_and_comes_back(teacher):
    model = tiny_model(1, attention_dropout=0.5).train()
    first, second = look_at(model, teacher), look_at(model, teacher)
    assert model.training
    assert all(module.training for module in model.modules())
    for name, values in zip(FIELDS, plain(model.eval(), teacher.model), strict=True):
        assert (getattr(first, name) == getattr(second, name)).all()
        torch.testing.assert_close(getattr(first, name), values, rtol=1e-4, atol=1e-5)
    look_at(model, teacher)
    assert not model.training


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16-mixed"])
def test_it_sees_what_the_loss_sees(mixed, teacher):
    """In the precision of the training, and without a gradient."""
    model = tiny_model(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        work, readings, objective = prepare(model, teacher, 12)
        seen = glance(work, readings, model, VOCABULARY, len(OWN))
        shares = objective.shares(ROLLOUT, total_of_one_process)
        tally = Tally(shares, OWN.device)
        for piece, reading in zip(work, readings, strict=True):
            tally.add(evaluate(piece, reading, shares, model, VOCABULARY))
    places = torch.cat([group.places for piece in work for group in piece.groups if group.on_policy])
    own = OWN[places]
    for name in ("student", "teacher"):
        assert (getattr(seen, name)[places][own] == tally.tokens(name)[own]).all()
    expected = tally.values["divergence"].item()
    assert (seen.divergence * shares["divergence"]).sum().item() == pytest.approx(expected, rel=1e-5)
    assert all(getattr(seen, name).dtype == torch.float32 for name in FIELDS)
    assert not any(getattr(seen, name).requires_grad for name in FIELDS)
    assert (seen.student - plain(tiny_model(1), teacher.model)[0]).abs().max() > 1e-3 or not mixed


def test_divergence_without_a_teacher_is_refused(teacher):
    class Silent(Divergence):
        """Asks nobody."""

        needs_teacher = False

        def forward(self, evidence):
            loss = -evidence.student.sampled
            return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    model = tiny_model(1)
    work, readings, _ = prepare(model, teacher, objective=Objective({"divergence": Silent()}, {}))
    with pytest.raises(ValueError, match=r"Expected a divergence that asks the teacher.*needs_teacher"):
        glance(work, readings, model, VOCABULARY, len(OWN))


def test_scores_that_nobody_asked_for_are_refused(teacher):
    look = Look(ROLLOUT, REPETITION, 0.0, OWN, lambda values: values)
    with pytest.raises(ValueError, match="Declare needs_scores = True"):
        _ = look.scores
    seen = look_at(tiny_model(1), teacher)
    assert Look(ROLLOUT, REPETITION, 0.0, OWN, lambda values: values, seen).scores is seen
