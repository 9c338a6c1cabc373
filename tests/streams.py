"""States, heads, evidence and the plain computation that the tests of the streamed loss compare with."""

from dataclasses import replace

import torch

from helpers import make_evidence
from stable_opd import Author, build, components
from stable_opd.models import Head
from stable_opd.scoring import HiddenStates
from stable_opd.streaming import Part, StreamedLoss, streamed_loss
from stable_opd.types import Scores

N, WIDTH, VOCABULARY = 23, 12, 41
TERMS = [(kind, name) for kind in ("divergence", "constraint", "mixture") for name in components(kind)]

#: What a term needs to be built, or to have something to say about the logits of these tests.
SETTINGS = {
    "CombinedMixture": lambda: {"parts": [build("mixture", "GoldenMixture", loss=build("divergence", "ForwardKL"))]},
    "EntropyFloor": lambda: {"floor": 10.0, "weight": 1.0},
}


def make(kind, name, **settings):
    """A term of these tests."""
    return build(kind, name, **(SETTINGS.get(name, dict)() | settings))


def author_of(term):
    """Whose tokens a term speaks about."""
    return next(iter(getattr(term, "authors", ())), Author.STUDENT)


def draw_states(seed, width=WIDTH, bias=False, softcap=None, scale=1.0, count=N):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, width, generator=generator)
    weight = scale * torch.randn(VOCABULARY, width, generator=generator) / 2
    offset = torch.randn(VOCABULARY, generator=generator) if bias else None
    return HiddenStates(states, Head(weight, offset, softcap))


def draw_evidence(author=Author.STUDENT, seed=5, count=N):
    """Evidence on positions of three rows, and the share of each position in the mean."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (count,), generator=generator)
    behaviour = -3 + torch.randn(count, generator=generator)
    evidence = make_evidence(tokens, author=author, behaviour=behaviour, progress=0.5)
    shares = torch.rand(count, generator=generator) / count
    return replace(evidence, row=torch.tensor([0] * 9 + [1] + [2] * (count - 10))), shares


def stream(terms, evidence, shares, student, teacher=None, reference=None) -> StreamedLoss:
    return streamed_loss(
        student, [Part(terms, evidence, dict.fromkeys(terms, shares), teacher, reference, teacher is not None)]
    )


def leaves_of(student, train_head=True):
    """A copy of the student whose states and head are leaves of a graph, and those leaves."""
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
        return Scores(logprobs[torch.arange(len(logprobs)), evidence.tokens], logprobs)

    seen = evidence.seen(slice(None), *(scores(model) for model in (student, teacher, reference)))
    results = {name: term(seen) for name, term in terms.items()}
    losses = {name: (shares[each.where] * each.loss[each.where]).sum() for name, each in results.items()}
    values = {name: (shares[each.where] * each.value[each.where]).sum() for name, each in results.items()}
    return sum(losses.values()), losses, values


def compare(terms, evidence, shares, student, train_head=True):
    """Hold the streamed loss and its gradients against plain autograd; return the leaves with their gradients."""
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
