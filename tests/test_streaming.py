"""The head and the loss in tiles, against one plain autograd computation on materialised logits."""

import pytest
import torch

from stable_opd import Author, Divergence, Mixture, TokenLoss, build, components, streaming
from stable_opd.models import Head
from stable_opd.scoring import HiddenStates
from streams import TERMS, VOCABULARY, N, author_of, compare, draw_evidence, draw_states, leaves_of, make, stream


@pytest.mark.parametrize(("kind", "name"), TERMS, ids=[name for _, name in TERMS])
@pytest.mark.parametrize("train_head", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["no softcap", "softcap"])
def test_every_term_equals_plain_autograd(kind, name, train_head, bias, softcap, tile):
    term = make(kind, name)
    evidence, shares = draw_evidence(author_of(term))
    compare({"term": term}, evidence, shares, draw_states(0, bias=bias, softcap=softcap), train_head)


def test_terms_together_equal_plain_autograd(tile):
    terms = {name: make(kind, name) for kind, name in TERMS}
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


@pytest.mark.parametrize("name", ["ReverseKL", "SampledReverseKL"])
def test_models_that_say_nothing_finite_do_not_matter_where_nothing_is_learnt(name, tile):
    """As a token that a policy masks: its weight is 0, and so is what comes of it."""
    (evidence, shares), teacher = draw_evidence(), draw_states(1)
    shares[4:9] = 0
    terms = {"term": build("divergence", name)}
    student, leaves = leaves_of(draw_states(0), train_head=True)
    expected = stream(terms, evidence, shares, student, teacher)
    expected.loss.backward()
    teacher.states[4:9] = torch.nan
    student, others = leaves_of(draw_states(0), train_head=True)
    found = stream(terms, evidence, shares, student, teacher)
    found.loss.backward()
    assert found.loss == expected.loss
    assert found.values == expected.values
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(leaves, others, strict=True))


@pytest.mark.parametrize("wanted", ["sampled", "full"])
def test_positions_without_a_share_do_not_matter_to_a_plug_in(wanted, tile):
    class Infinite(Divergence):
        """Is infinite at some positions, and so is its slope."""

        support, positionwise = wanted, True

        def forward(self, evidence):
            loss = -evidence.student.sampled / (evidence.position % 3 != 0)
            return TokenLoss(loss, loss.detach(), torch.ones_like(evidence.in_loop))

    evidence, shares = draw_evidence()
    shares[torch.arange(N) % 3 == 0] = 0
    student, leaves = leaves_of(draw_states(0), train_head=True)
    found = stream({"term": Infinite()}, evidence, shares, student, draw_states(1))
    found.loss.backward()
    assert found.loss.isfinite()
    assert found.values["term"].isfinite()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


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
    terms = {name: make(kind, name) for kind, name in TERMS}
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
        monkeypatch.setattr(streaming, "tile_size", lambda *_, positions=positions: positions)
        student, leaves = leaves_of(low, train_head=True)
        terms = {"kl": build("divergence", "ReverseKL")}
        stream(terms, evidence, shares, student, draw_states(1)).loss.backward()
        gradients.append(leaves[1].grad.float())
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[0].norm()


@pytest.mark.parametrize("wanted", ["sampled", "full"])
def test_plug_in_without_a_closed_form_equals_plain_autograd(wanted, tile):
    class Squared(Divergence):
        """A loss of no known kind that reads everything it may."""

        support = wanted
        needs_reference = True

        def forward(self, evidence):
            ours, theirs, first = (
                each.sampled if wanted == "sampled" else each.logprobs.clamp(min=-4).logsumexp(-1) + each.sampled
                for each in (evidence.student, evidence.teacher, evidence.reference)
            )
            loss = (ours - theirs) ** 2 + (ours * first).sin()
            return TokenLoss(loss, theirs.detach(), evidence.position % 4 != 1)

    evidence, shares = draw_evidence()
    leaves = compare({"term": Squared()}, evidence, shares, draw_states(0, bias=True, softcap=3.0))
    assert all(leaf.grad.norm() > 1e-3 for leaf in leaves)


def test_states_of_less_precision_than_the_head():
    """Autocast and heads that are kept in float32 bring them."""
    evidence, shares = draw_evidence()
    exact = draw_states(0, bias=True)
    rounded = exact.states.bfloat16()
    gradients = []
    for states in (rounded, rounded.float()):
        student, leaves = leaves_of(HiddenStates(states, exact.head))
        stream({"kl": build("divergence", "ReverseKL")}, evidence, shares, student, draw_states(1)).loss.backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert gradients[0][0].dtype == torch.bfloat16
    for found, expected in zip(*gradients, strict=True):
        assert (found.float() - expected).norm() < 0.01 * expected.norm()


def test_second_backward_pass_is_an_error_and_not_a_wrong_gradient():
    evidence, shares = draw_evidence()
    student, leaves = leaves_of(draw_states(0))
    loss = stream({"kl": build("divergence", "ReverseKL")}, evidence, shares, student, draw_states(1)).loss
    loss.backward(retain_graph=True)
    before = [leaf.grad.clone() for leaf in leaves]
    with pytest.raises((RuntimeError, TypeError)):
        loss.backward()
    for leaf, expected in zip(leaves, before, strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0)


def test_mixture_is_a_term_like_the_others():
    """The list of terms above would be short by one kind if it were not."""
    assert any(issubclass(components(kind)[name], Mixture) for kind, name in TERMS)
