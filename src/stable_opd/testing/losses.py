"""What every term of the objective has to keep to."""

import copy
from collections.abc import Iterator
from dataclasses import fields
from unittest.mock import patch

import torch
from torch import Tensor

from stable_opd import streaming
from stable_opd.mixtures.base import Mixture
from stable_opd.models import Head
from stable_opd.scoring import HiddenStates
from stable_opd.streaming import Part, streamed_loss
from stable_opd.terms import LossTerm
from stable_opd.testing.scenes import VOCABULARY, Scene, draw, show
from stable_opd.testing.subject import Check, Subject, expect
from stable_opd.types import Author, Evidence, TokenLoss


def scene_for(term: LossTerm, dtype: torch.dtype = torch.float64, scale: float = 2.0, seed: int = 0) -> Scene:
    """Draw a scene with the authors that a term speaks about."""
    others = (term.authors if isinstance(term, Mixture) else ()) or (Author.GOLDEN,)
    return draw(dtype, scale, others, seed)


def spoken(term: TokenLoss, what: Tensor) -> Tensor:
    """Return losses or values, with 0 where the term does not speak."""
    return what.masked_fill(~term.where, 0)


def by_autograd(term: LossTerm, scene: Scene) -> tuple[TokenLoss, Tensor]:
    """Return what a term says, and the gradient of its sum in the student's logits, (n, V)."""
    leaf = scene.logits[0].clone().requires_grad_()
    with torch.enable_grad():
        found = term(show(term, scene, leaf))
        check_form(found, len(scene.facts.tokens))
        total = spoken(found, found.loss).sum() + 0 * leaf.sum()
    return found, torch.autograd.grad(total, leaf)[0]


def in_closed_form(term: LossTerm, scene: Scene) -> tuple[TokenLoss | None, Tensor]:
    """Return what a term says in closed form, and the gradient that it writes, (n, V)."""
    out = torch.full_like(scene.logits[0], torch.nan)
    with torch.no_grad():
        return term.closed_form(show(term, scene, everything=True), out), out


def shapes(subject: Subject) -> None:
    """One finite loss, value and flag per position, in two precisions, also for no position at all."""
    for dtype in (torch.float64, torch.float32):
        term = subject.build()
        scene = scene_for(term, dtype)
        for some in (scene, scene.part(torch.zeros(0, dtype=torch.long))):
            check_finite(by_autograd(term, some)[0])


def check_form(found: TokenLoss, count: int) -> None:
    """Check the form of what a term returns."""
    expect(isinstance(found, TokenLoss), f"Expected a TokenLoss, but got a {type(found).__name__}. Return one.")
    for name, tensor in found._asdict().items():
        expect(
            tensor.shape == (count,),
            f"Expected `{name}` to have one entry per position, ({count},), but got {tuple(tensor.shape)}. Leave means "
            "and sums over positions to the library.",
        )
    expect(
        found.where.dtype == torch.bool,
        f"Expected `where` to be bool, but got {found.where.dtype}. Compare, or use `evidence.written_by`.",
    )
    expect(not found.value.requires_grad, "Expected `value` without a gradient, but got one. Detach it.")


def check_finite(found: TokenLoss) -> None:
    """Check the numbers that a term returns."""
    for name in ("loss", "value"):
        expect(
            spoken(found, getattr(found, name)).isfinite().all(),
            f"Expected a finite `{name}` wherever the term speaks, but got infinite or undefined ones. Work with "
            "log-probs, and clamp what may vanish.",
        )


def gradient(subject: Subject) -> None:
    """The loss depends on the student and on nothing else, and evidence is only read."""
    term = subject.build()
    scene = scene_for(term)
    leaf = scene.logits[0].clone().requires_grad_()
    evidence = show(term, scene, leaf)
    before = {name: tensor.detach().clone() for name, tensor in _tensors(evidence)}
    found = term(evidence)
    expect(
        found.loss.requires_grad or not spoken(found, found.loss).any(),
        "Expected a loss with a gradient in the student's scores, but got one without. Do not detach it; detach "
        "weights and advantages only.",
    )
    for name, tensor in _tensors(evidence):
        expect(
            torch.equal(tensor.detach(), before[name]),
            f"Expected evidence that is only read, but got another `{name}` after the call. Other terms read the same "
            "memory: do not work in place.",
        )
        expect(
            name.startswith("student") or not tensor.requires_grad,
            f"Expected a gradient in the student's scores alone, but got one in `{name}`. Nothing learns there.",
        )


def _tensors(evidence: Evidence) -> Iterator[tuple[str, Tensor]]:
    for each in fields(evidence):
        value = getattr(evidence, each.name)
        if isinstance(value, Tensor):
            yield each.name, value
        for name in ("sampled", "logprobs", "everything"):
            tensor = getattr(value, f"_{name}", None)
            if isinstance(tensor, Tensor):
                yield f"{each.name}.{name}", tensor


def rows(subject: Subject) -> None:
    """Rows do not know of each other, because a batch may be cut between any two of them."""
    term = subject.build()
    scene = scene_for(term)
    whole, whole_gradient = by_autograd(copy.deepcopy(term), scene)
    for row in scene.facts.row.unique().tolist():
        places = (scene.facts.row == row).nonzero().squeeze(1)
        found, slope = by_autograd(copy.deepcopy(term), scene.part(places))
        agree = torch.equal(found.where, whole.where[places])
        for ours, theirs in ((found.loss, whole.loss), (found.value, whole.value)):
            agree = agree and torch.allclose(spoken(found, ours), spoken(found, theirs[places]), rtol=1e-6, atol=1e-9)
        agree = agree and torch.allclose(slope, whole_gradient[places], rtol=1e-6, atol=1e-9)
        expect(
            agree,
            "Expected a row to have the same loss and gradient by itself as among others, but got another. "
            "Micro-batches are cut by memory: use no mean, maximum or sum over the positions of several rows.",
        )


def tiles(subject: Subject) -> None:
    """The streamed loss gives in tiles what the term gives in one piece, and its gradients."""
    for size in (1, 5):
        term = subject.build()
        scene = scene_for(term, torch.float32)
        generator = torch.Generator().manual_seed(size)
        count = len(scene.facts.tokens)
        models = [torch.randn(count + VOCABULARY, 12, generator=generator) / 2 for _ in range(3)]
        models[0] = 2 * models[0].requires_grad_().clone()
        states = [HiddenStates(each[:count], Head(each[count:])) for each in models]
        shares = torch.rand(count, generator=generator) / count
        logits = [each.states @ each.head.weight.T for each in states]
        found = copy.deepcopy(term)(show(term, Scene(scene.facts, torch.stack(logits).detach()), logits[0]))
        expected = (shares * spoken(found, found.loss)).sum() + 0 * logits[0].sum()
        part = Part({"term": term}, scene.facts, {"term": shares}, teacher=states[1], reference=states[2])
        with patch.object(streaming, "tile_size", lambda *_, size=size: size):
            result = streamed_loss(states[0], [part])
        leaf = models[0]
        outcomes = [
            (result.loss, expected),
            (result.values["term"], (shares * spoken(found, found.value)).sum()),
            (*torch.autograd.grad(result.loss, leaf, retain_graph=True), *torch.autograd.grad(expected, leaf)),
        ]
        for ours, theirs in outcomes:
            expect(
                torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5),
                f"Expected the same loss, value and gradient in tiles of {size} positions as in one piece, but got "
                f"differences of up to {(ours - theirs).abs().max():.2g}. A term over the vocabulary, and one that "
                'declares positionwise = True, has to treat each position by itself; use support = "sampled" and '
                "positionwise = False to follow a row.",
            )


def closed_form(subject: Subject) -> None:
    """Where there is a closed form, it is what `forward` and autograd give."""
    for scale in (0.3, 2.0, 20.0):
        term = subject.build()
        scene = scene_for(term, scale=scale)
        found, slope = in_closed_form(term, scene)
        if found is None:
            return
        expected, expected_slope = by_autograd(term, scene)
        check_form(found, len(scene.facts.tokens))
        expect(
            found.loss.isfinite().all() and slope.isfinite().all(),
            "Expected finite losses and gradients in closed form at all positions, but got others. Overwrite all of "
            "`out`, also where the term does not speak.",
        )
        pairs = {
            "where": (found.where, expected.where),
            "loss": (spoken(found, found.loss), spoken(found, expected.loss.detach())),
            "value": (spoken(found, found.value), spoken(found, expected.value)),
            "gradient": (slope.masked_fill(~found.where[:, None], 0), expected_slope),
        }
        for name, (ours, theirs) in pairs.items():
            expect(
                torch.allclose(ours.double(), theirs.double(), rtol=1e-7, atol=1e-9),
                f"Expected `closed_form` to agree with `forward`, but got another {name}. Correct it, or leave it out: "
                "autograd does the same.",
            )


def extremes(subject: Subject) -> None:
    """Finite losses and gradients where the models are certain, of the same token or of different ones."""
    for dtype in (torch.float64, torch.float32):
        term = subject.build()
        scene = scene_for(term, dtype)
        certain = -1e4 * torch.ones_like(scene.logits)
        count = torch.arange(certain.shape[1])
        for model, shift in enumerate((0, 1, 2)):
            token = torch.where(count % 2 == 0, scene.facts.tokens, (count + shift * (count % 3)) % VOCABULARY)
            certain[model] = certain[model].scatter(-1, token[:, None], 1e4)
        wild = torch.where(scene.logits > 0, 1e4, -1e4).to(dtype)
        for logits in (certain, wild, 1e4 * scene.logits, torch.stack([wild[0], certain[1], scene.logits[2]])):
            here = Scene(scene.facts, logits)
            found, slope = by_autograd(term, here)
            closed, closed_slope = in_closed_form(term, here)
            seen = [spoken(found, found.loss), spoken(found, found.value), slope]
            seen += [] if closed is None else [closed.loss, closed.value, closed_slope]
            expect(
                all(tensor.isfinite().all() for tensor in seen),
                f"Expected finite losses and gradients at logits of +-1e4 in {dtype}, but got others. 0 * inf is not a "
                "number: clamp log-probs and log-ratios, and mask before a function whose slope is infinite.",
            )


def rounding(subject: Subject) -> None:
    """Log-probs that were rounded to bfloat16 change little; a gate may flip at a position in ten."""
    term = subject.build()
    scene = scene_for(term, scale=1.0, seed=4)
    low = Scene(scene.facts, scene.logits.log_softmax(-1).bfloat16().double())
    exact, rounded = (spoken(found, found.value) for found, _ in (by_autograd(term, each) for each in (scene, low)))
    near = (rounded - exact).abs() <= 0.05 * (1 + exact.abs())
    expect(
        rounded.isfinite().all() and near.double().mean() >= 0.9,
        f"Expected nine values in ten to move by at most 5 % when log-probs are rounded to bfloat16, but got "
        f"{near.double().mean():.0%}. Avoid differences of large numbers.",
    )


def agreement(subject: Subject) -> None:
    """A divergence is 0 where the teacher is the student, and so is its expected gradient."""
    term = subject.build()
    logits = draw().logits[0, :3]
    every = torch.arange(VOCABULARY)
    for own in logits:
        lsm = own.log_softmax(-1)
        facts = Evidence(
            tokens=every,
            row=every,
            position=torch.zeros_like(every),
            in_loop=torch.zeros_like(every, dtype=torch.bool),
            author=torch.full_like(every, int(Author.STUDENT)),
            behaviour_logprobs=lsm,
            progress=0.5,
            stop=(0, 3),
        )
        found, slope = by_autograd(term, Scene(facts, own.expand(3, VOCABULARY, VOCABULARY)))
        expect(
            bool(found.where.any()) and spoken(found, found.value).abs().max() < 1e-9,
            "Expected a value of 0 where teacher and student agree, at positions of the student's, but got others. If "
            'that is meant, pass skip=("agreement",).',
        )
        expect(
            (lsm.exp() @ slope).abs().max() < 1e-9,
            "Expected no gradient on average over the student's tokens where teacher and student agree, but got one: "
            "the student would be moved away from a teacher that it has reached. If that is meant, pass "
            'skip=("agreement",).',
        )


def use(term: LossTerm) -> None:
    """Call a term as a training step does."""
    term(show(term, scene_for(term)))


LOSS: dict[str, Check] = {
    "shapes": shapes,
    "gradient": gradient,
    "rows": rows,
    "tiles": tiles,
    "closed form": closed_form,
    "extremes": extremes,
    "rounding": rounding,
}
