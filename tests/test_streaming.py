"""The head and the loss in tiles, against one plain autograd computation on materialised logits."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical

from helpers import make_evidence
from stable_opd import Author, Divergence, Mixture, TokenLoss, build, components, streaming
from stable_opd.models import Head
from stable_opd.scoring import HiddenStates
from stable_opd.diagnostics import entropy, overlap
from stable_opd.streaming import Part, StreamedLoss, streamed_loss
from stable_opd.types import Scores

N, WIDTH, VOCABULARY = 23, 12, 29
TERMS = [(kind, name) for kind in ("divergence", "constraint", "mixture") for name in components(kind)]


def draw_states(seed, width=WIDTH, bias=False, softcap=None, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(N, width, generator=generator)
    weight = scale * torch.randn(VOCABULARY, width, generator=generator) / 2
    offset = torch.randn(VOCABULARY, generator=generator) if bias else None
    return HiddenStates(states, Head(weight, offset, softcap))


def stream(terms, evidence, shares, student, teacher=None, reference=None) -> StreamedLoss:
    return streamed_loss(student, [Part(terms, evidence, shares, teacher, reference, diagnose=teacher is not None)])


def draw_evidence(author=Author.STUDENT):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (N,), generator=generator)
    evidence = make_evidence(tokens, author=author, behaviour=-3 + torch.randn(N, generator=generator), progress=0.5)
    shares = torch.rand(N, generator=generator) / N
    return replace(evidence, row=torch.tensor([0] * 9 + [1] + [2] * 13)), shares


def leaves_of(student, train_head):
    head = student.head
    leaves = [student.states.detach().clone().requires_grad_()]
    leaves += [
        part.detach().clone().requires_grad_(train_head) for part in (head.weight, head.bias) if part is not None
    ]
    copy = HiddenStates(leaves[0], Head(leaves[1], leaves[2] if head.bias is not None else None, head.softcap))
    return copy, [leaf for leaf in leaves if leaf.requires_grad]


def materialised(terms, evidence, shares, student, teacher, reference):
    """Loss and value of each term from the whole (N, V) at once."""

    def scores(model):
        logits = model.states @ model.head.weight.T + (0 if model.head.bias is None else model.head.bias)
        if model.head.softcap:
            logits = model.head.softcap * (logits / model.head.softcap).tanh()
        logprobs = logits.log_softmax(-1)
        return Scores(logprobs[torch.arange(N), evidence.tokens], logprobs)

    seen = evidence.seen(slice(None), *(scores(model) for model in (student, teacher, reference)))
    reduced = {name: (shares[result.where] * result.loss[result.where]).sum() for name, result in _call(terms, seen)}
    values = {name: (shares[result.where] * result.value[result.where]).sum() for name, result in _call(terms, seen)}
    return sum(reduced.values()), reduced, values


def _call(terms, seen):
    return [(name, term(seen)) for name, term in terms.items()]


def compare(terms, evidence, shares, student, train_head=True):
    teacher, reference = draw_states(1, width=9), draw_states(2)
    ours, our_leaves = leaves_of(student, train_head)
    plain, plain_leaves = leaves_of(student, train_head)
    result = stream(terms, evidence, shares, ours, teacher, reference)
    expected, losses, values = materialised(terms, evidence, shares, plain, teacher, reference)
    # A factor, because a strategy or a scaler may scale the loss before it goes backward.
    (3.0 * result.loss).backward()
    if expected.requires_grad:
        (3.0 * expected).backward()
    torch.testing.assert_close(result.loss, expected.detach())
    for name in terms:
        torch.testing.assert_close(result.losses[name], losses[name].detach())
        torch.testing.assert_close(result.values[name], values[name].detach())
    for ours_leaf, plain_leaf in zip(our_leaves, plain_leaves, strict=True):
        want = torch.zeros_like(plain_leaf) if plain_leaf.grad is None else plain_leaf.grad
        torch.testing.assert_close(ours_leaf.grad, want, rtol=1e-4, atol=1e-6)
    return our_leaves


@pytest.fixture(params=[1, 5, 10_000], ids=["tiles of 1", "tiles of 5", "one tile"])
def tile(request, monkeypatch):
    monkeypatch.setattr(streaming, "tile_size", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize(("kind", "name"), TERMS, ids=[name for _, name in TERMS])
@pytest.mark.parametrize("train_head", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["no softcap", "softcap"])
def test_every_term_equals_plain_autograd(kind, name, train_head, bias, softcap, tile):
    author = Author.GOLDEN if kind == "mixture" else Author.STUDENT
    evidence, shares = draw_evidence(author)
    compare({"term": build(kind, name)}, evidence, shares, draw_states(0, bias=bias, softcap=softcap), train_head)


def test_terms_together_equal_plain_autograd(tile):
    terms = {name: build(kind, name) for kind, name in TERMS}
    author = torch.tensor([int(Author.STUDENT), int(Author.GOLDEN)]).repeat(N)[:N]
    evidence, shares = draw_evidence(author)
    leaves = compare(terms, evidence, shares, draw_states(0, bias=True))
    assert all(leaf.grad.norm() > 1e-3 for leaf in leaves)


def recorder(wanted):
    class Recorder(Divergence):
        """Remembers what it was shown."""

        support = wanted

        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, evidence):
            self.seen.append(evidence)
            loss = -evidence.student.sampled
            return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    return Recorder()


def test_full_terms_see_every_position_once_in_tiles(monkeypatch):
    """This is what keeps tensors of (N, V) away."""
    monkeypatch.setattr(streaming, "tile_size", lambda *_: 5)
    term, (evidence, shares) = recorder("full"), draw_evidence()
    stream({"term": term}, evidence, shares, draw_states(0), draw_states(1))
    assert [len(seen.tokens) for seen in term.seen] == [5, 5, 5, 5, 3]
    assert torch.cat([seen.tokens for seen in term.seen]).tolist() == evidence.tokens.tolist()
    assert torch.cat([seen.row for seen in term.seen]).tolist() == evidence.row.tolist()
    assert all(seen.student.logprobs.shape == (len(seen.tokens), VOCABULARY) for seen in term.seen)


def test_sampled_terms_see_whole_rows_at_once_and_no_vocabulary(monkeypatch):
    monkeypatch.setattr(streaming, "tile_size", lambda *_: 5)
    term, (evidence, shares) = recorder("sampled"), draw_evidence()
    stream({"term": term}, evidence, shares, draw_states(0), draw_states(1))
    (seen,) = term.seen
    assert seen.row.tolist() == evidence.row.tolist()
    for model in (seen.student, seen.teacher):
        assert model.sampled.shape == (N,)
        with pytest.raises(ValueError, match='support = "full"'):
            _ = model.logprobs


def test_sampled_term_may_couple_positions(tile):
    """Rows are whole, so a rule may follow a row from token to token; tiles must not cut its gradient."""

    class Coupled(Divergence):
        """Cumulative sums along the batch."""

        def forward(self, evidence):
            loss = evidence.student.sampled.cumsum(0) ** 2
            return TokenLoss(loss, loss.detach(), torch.ones_like(evidence.in_loop))

    evidence, shares = draw_evidence()
    compare({"term": Coupled()}, evidence, shares, draw_states(0))


@pytest.mark.parametrize("wanted", ["sampled", "full"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_positions_that_a_term_does_not_speak_about_do_not_matter(wanted, bad, tile):
    class Picky(Divergence):
        """Says nonsense where it does not speak."""

        support = wanted

        def forward(self, evidence):
            where = evidence.position % 3 == 0
            loss = torch.where(where, -evidence.student.sampled, bad)
            return TokenLoss(loss, loss.detach(), where)

    evidence, shares = draw_evidence()
    leaves = compare({"term": Picky()}, evidence, shares, draw_states(0))
    spoken = (torch.arange(N) % 3 == 0).tolist()
    assert (leaves[0].grad.abs().sum(1) > 0).tolist() == spoken


def test_position_without_a_share_gets_no_gradient():
    evidence, shares = draw_evidence()
    shares[4:9] = 0
    leaves = compare({"term": build("divergence", "ReverseKL")}, evidence, shares, draw_states(0))
    assert (leaves[0].grad.abs().sum(1) == 0).tolist() == [4 <= place < 9 for place in range(N)]


def test_term_that_speaks_about_nothing_still_gives_a_loss_with_a_graph():
    """Every process must be able to go backward, also one whose rows are all somebody else's."""
    evidence, shares = draw_evidence(Author.GOLDEN)
    student, leaves = leaves_of(draw_states(0), train_head=True)
    loss = stream({"term": build("divergence", "ReverseKL")}, evidence, shares, student, draw_states(1)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(leaf.grad is not None and leaf.grad.abs().max() == 0 for leaf in leaves)


def test_models_that_only_serve_get_no_gradient():
    evidence, shares = draw_evidence()
    teacher, teacher_leaves = leaves_of(draw_states(1), train_head=True)
    reference, reference_leaves = leaves_of(draw_states(2), train_head=True)
    student, _ = leaves_of(draw_states(0), train_head=True)
    terms = {"d": build("divergence", "ReverseKL"), "s": build("divergence", "SampledReverseKL")}
    terms |= {"c": build("constraint", "ReferenceKL")}
    stream(terms, evidence, shares, student, teacher, reference).loss.backward()
    assert all(leaf.grad is None for leaf in teacher_leaves + reference_leaves)


def test_missing_teacher_is_an_error_and_not_a_zero():
    evidence, shares = draw_evidence()
    with pytest.raises(ValueError, match="needs_teacher"):
        stream({"term": build("divergence", "SampledReverseKL")}, evidence, shares, draw_states(0))


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_huge_logits_give_finite_gradients(scale, tile):
    evidence, shares = draw_evidence()
    student, leaves = leaves_of(draw_states(0, scale=scale), train_head=True)
    terms = {name: build(kind, name) for kind, name in TERMS}
    stream(terms, evidence, shares, student, draw_states(1), draw_states(2)).loss.backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_bfloat16_is_near_float32(tile):
    """8 bits of mantissa in states and head; the loss itself is computed in float32."""
    evidence, shares = draw_evidence()
    terms = {"kl": build("divergence", "ReverseKL")}
    exact = draw_states(0)
    low = HiddenStates(exact.states.bfloat16(), Head(exact.head.weight.bfloat16()))
    student, leaves = leaves_of(low, train_head=True)
    plain, plain_leaves = leaves_of(exact, train_head=True)
    result = stream(terms, evidence, shares, student, draw_states(1))
    expected = stream(terms, evidence, shares, plain, draw_states(1))
    result.loss.backward()
    expected.loss.backward()
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    for leaf, exact_leaf in zip(leaves, plain_leaves, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        assert (leaf.grad.float() - exact_leaf.grad).norm() < 0.03 * exact_leaf.grad.norm()


def test_head_gradient_is_added_up_in_float32(monkeypatch):
    """Many tiles in bfloat16 give the gradient of one tile: the rounding comes once, at the end."""
    evidence, shares = draw_evidence()
    low = HiddenStates(draw_states(0).states.bfloat16(), Head(draw_states(0).head.weight.bfloat16()))
    gradients = []
    for positions in (N, 1):
        monkeypatch.setattr(streaming, "tile_size", lambda *_: positions)
        student, leaves = leaves_of(low, train_head=True)
        terms = {"kl": build("divergence", "ReverseKL")}
        stream(terms, evidence, shares, student, draw_states(1)).loss.backward()
        gradients.append(leaves[1].grad.float())
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[0].norm()


def test_diagnostics_are_those_of_the_whole_vocabulary(tile):
    evidence, shares = draw_evidence()
    student, teacher = draw_states(0), draw_states(1)
    found = stream({"kl": build("divergence", "ReverseKL")}, evidence, shares, student, teacher).diagnostics
    ours, theirs = (Categorical(logits=model.states @ model.head.weight.T) for model in (student, teacher))
    torch.testing.assert_close(found["student"], ours.log_prob(evidence.tokens))
    torch.testing.assert_close(found["teacher"], theirs.log_prob(evidence.tokens))
    torch.testing.assert_close(found["entropy_student"], ours.entropy())
    torch.testing.assert_close(found["entropy_teacher"], theirs.entropy())
    likeliest = [[set(row.topk(16).indices.tolist()) for row in each.logits] for each in (ours, theirs)]
    shared = [len(a & b) / 16 for a, b in zip(*likeliest, strict=True)]
    torch.testing.assert_close(found["overlap"], torch.tensor(shared))


def test_without_a_teacher_there_are_no_diagnostics():
    evidence, shares = draw_evidence(Author.GOLDEN)
    assert stream({"m": build("mixture", "GoldenMixture")}, evidence, shares, draw_states(0)).diagnostics._parts == {}


def test_entropy_of_a_distribution_with_impossible_tokens():
    logprobs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    torch.testing.assert_close(entropy(logprobs), torch.tensor([2.0, 1.0]).log())


def test_overlap_of_a_small_vocabulary_is_complete():
    assert overlap(torch.randn(4, 5), torch.randn(4, 5)).tolist() == [1.0] * 4


def test_mixture_is_a_term_like_the_others():
    """The list of terms above would be short by one kind if it were not."""
    assert any(issubclass(components(kind)[name], Mixture) for kind, name in TERMS)
