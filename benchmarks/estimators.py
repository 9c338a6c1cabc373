"""Bias and variance of the gradient of every sampled divergence, exactly, by enumeration.

    python -m benchmarks.estimators

A student is a table of logits, one row for each prefix over a vocabulary of 4 tokens; all 256 answers of 4 tokens are
enumerated with their probabilities in float64, so the mean and the variance of a gradient estimate are exact. Writes
benchmarks/results/estimators.md.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from stable_opd import Author, Divergence, Evidence, Scores, TokenLoss
from stable_opd.divergences import (
    AlphaDivergence,
    ClipAdvantage,
    EstimatedReverseKL,
    ExactBaseline,
    ForwardKL,
    HeadTailKL,
    JensenShannon,
    LowerClip,
    PowerAdvantage,
    ProximalTeacher,
    ReverseKL,
    SampledAlpha,
    SampledForwardKL,
    SampledJensenShannon,
    SampledReverseKL,
    SampledTotalVariation,
    SoftLog,
    StudentTopK,
    TailBucketTopK,
    TanhAdvantage,
    TeacherTopK,
    TopKBaseline,
    TotalVariation,
)
from stable_opd.divergences.estimators import k5

WORDS, LENGTH = 4, 4
RESULTS = Path(__file__).parent / "results"

#: Standard deviation of the difference between teacher and student in their logits.
DISTANCES = (0.3, 1.0, 3.0)
SEEDS = range(5)


class Study(Divergence):
    """A loss that the library refuses, or does not name; it is built here to be measured."""

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the loss of log p, log q and log behaviour."""
        loss = self.loss(evidence.student.sampled, evidence.teacher.sampled, evidence.behaviour_logprobs)
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))


def k1(p: Tensor, q: Tensor, behaviour: Tensor) -> Tensor:
    """Back-propagate log p - log q."""
    return p - q


def k3(p: Tensor, q: Tensor, behaviour: Tensor) -> Tensor:
    """Back-propagate r - 1 - log r."""
    return torch.expm1(q - p) - (q - p)


def stop_gradient(p: Tensor, q: Tensor, behaviour: Tensor) -> Tensor:
    """Take the policy gradient of the advantage -u log u, which is minus the integrand of the forward KL."""
    u = (q - p).detach()
    return (p - behaviour).exp() * u.exp() * u


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        title: What is measured.
        term: The estimator.
        truth: The divergence whose gradient it is held against, over the vocabulary and at the visited states.
        sequence: Hold it against the gradient of the divergence of whole answers instead, visited states included.
    """

    title: str
    term: Divergence
    truth: Divergence
    sequence: bool = False


def lines() -> list[tuple[str, tuple[str, str], list[Line]]]:
    """Return headlines, columns and lines."""
    jsd, tv, alpha = JensenShannon(), TotalVariation(), AlphaDivergence(0.5)
    reverse = [
        Line("`ReverseKL`, exact over the vocabulary", ReverseKL(), ReverseKL()),
        Line("`SampledReverseKL`", SampledReverseKL(), ReverseKL()),
        Line("... with `ExactBaseline`", SampledReverseKL(baseline=ExactBaseline()), ReverseKL()),
        Line("... with `TopKBaseline`, k = 2", SampledReverseKL(baseline=TopKBaseline(2)), ReverseKL()),
        *(
            Line(f"`EstimatedReverseKL`, {name}", EstimatedReverseKL(name), ReverseKL())
            for name in ("k2", "k3pp", "k4")
        ),
        *(Line(f"`HeadTailKL`, k = {k}", HeadTailKL(k), ReverseKL()) for k in (1, 2)),
        Line("k1 as a loss (refused)", Study(k1), ReverseKL()),
        Line("k3 as a loss (refused)", Study(k3), ReverseKL()),
    ]
    others = [
        Line("`SampledForwardKL` against `ForwardKL`", SampledForwardKL(), ForwardKL()),
        Line("k5 against `ForwardKL`", Study(lambda *each: k5(*each)[0]), ForwardKL()),
        Line("k3 as a loss against `ForwardKL`", Study(k3), ForwardKL()),
        Line("advantage -u log u against `ForwardKL` (refused)", Study(stop_gradient), ForwardKL()),
        Line("`SampledJensenShannon` against `JensenShannon`", SampledJensenShannon(), jsd),
        Line("`SampledTotalVariation` against `TotalVariation`", SampledTotalVariation(), tv),
        Line("`SampledAlpha` against `AlphaDivergence`, 0.5", SampledAlpha(alpha=0.5), alpha),
    ]
    changed = [
        Line("`SampledReverseKL`", SampledReverseKL(), ReverseKL()),
        *(
            Line(f"`SampledReverseKL` with `{type(each).__name__}`", SampledReverseKL(transform=each), ReverseKL())
            for each in (ClipAdvantage(), LowerClip(), TanhAdvantage(), SoftLog())
        ),
        Line("`PowerAdvantage`", PowerAdvantage(), ReverseKL()),
        Line("`ProximalTeacher`", ProximalTeacher(), ReverseKL()),
        *(Line(f"`{type(each).__name__}`, k = 2", each, ReverseKL()) for each in (TeacherTopK(2), StudentTopK(2))),
        Line("`TailBucketTopK`, k = 2", TailBucketTopK(2), ReverseKL()),
    ]
    sequence = [
        Line(f"`SampledReverseKL`, discount {gamma:g}", SampledReverseKL(discount=gamma), ReverseKL(), sequence=True)
        for gamma in (0.0, 0.5, 1.0)
    ]
    return [
        ("Reverse KL at the visited states", ("bias", "deviation"), reverse),
        ("Other divergences at the visited states", ("bias", "deviation"), others),
        ("Other objectives, beside the reverse KL", ("cosine", "own deviation"), changed),
        ("Reverse KL of whole answers", ("bias", "deviation"), sequence),
    ]


class World:
    """All answers, and what student and teacher say of their tokens."""

    def __init__(self, distance: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        prefixes = [each for t in range(LENGTH) for each in itertools.product(range(WORDS), repeat=t)]
        place = {prefix: number for number, prefix in enumerate(prefixes)}
        answers = list(itertools.product(range(WORDS), repeat=LENGTH))
        self.states = torch.tensor([place[answer[:t]] for answer in answers for t in range(LENGTH)])
        self.tokens = torch.tensor(answers).flatten()
        shape = len(prefixes), WORDS
        start = torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.logits = start.requires_grad_()
        self.teacher = (start + distance * noise).detach().log_softmax(-1)
        self.count = len(answers)

    def evidence(self) -> Evidence:
        """Return evidence on every token of every answer, one row for each."""
        n = len(self.tokens)

        def scores(table: Tensor) -> Scores:
            rows = table[self.states]
            return Scores(rows.gather(1, self.tokens[:, None]).squeeze(1), rows)

        student = scores(self.logits.log_softmax(-1))
        return Evidence(
            tokens=self.tokens,
            row=torch.arange(self.count).repeat_interleave(LENGTH),
            position=torch.arange(LENGTH).repeat(self.count),
            in_loop=torch.zeros(n, dtype=torch.bool),
            author=torch.full((n,), int(Author.STUDENT)),
            behaviour_logprobs=student.sampled.detach(),
            progress=0.0,
            student=student,
            teacher=scores(self.teacher),
        )

    def probability(self, evidence: Evidence) -> Tensor:
        """Return the probability of each answer under the student, with its graph, (answers,)."""
        return evidence.student.sampled.view(self.count, LENGTH).sum(1).exp()


def measure(line: Line, world: World) -> dict[str, float]:
    """Return what the tables say of the gradient on one pair of models."""
    evidence = world.evidence()
    weight = world.probability(evidence)
    truths = line.truth(evidence).loss.view(world.count, LENGTH).sum(1)
    true = ((weight if line.sequence else weight.detach()) * truths).sum()
    (target,) = torch.autograd.grad(true, world.logits, retain_graph=True)
    losses = line.term(evidence).loss.view(world.count, LENGTH).sum(1)
    every = torch.eye(world.count, dtype=torch.float64)
    (gradients,) = torch.autograd.grad(losses, world.logits, every, is_grads_batched=True)
    chance = weight.detach()[:, None, None]
    mean = (chance * gradients).sum(0)
    variance = (chance * (gradients - mean).square()).sum()
    return {
        "bias": ((mean - target).norm() / target.norm()).item(),
        "deviation": (variance.sqrt() / target.norm()).item(),
        "cosine": ((mean * target).sum() / (mean.norm() * target.norm())).item(),
        "own deviation": (variance.sqrt() / mean.norm()).item(),
    }


INTRODUCTION = f"""\
# Bias and variance of gradient estimates

A student over {WORDS} tokens with a logit of its own for each prefix, answers of {LENGTH} tokens, a teacher whose
logits differ by normal numbers of the given standard deviation. All answers are enumerated in float64, so the figures
are exact; they are means over {len(SEEDS)} random pairs.

- *bias*: length of (mean gradient - true gradient), in units of the length of the true one.
- *deviation*: square root of the trace of the covariance for one answer, in the same unit. The exact divergences have
  one too, because which states are visited is drawn.
- *cosine* and *own deviation*, for objectives that are others by design: the cosine between the mean gradient and that
  of the reverse KL, and the deviation in units of the length of the mean gradient itself.

Every token was drawn by the student (ratio 1, so no clip acts), and all settings are the defaults unless the line says
otherwise. The f-divergences clamp the log-ratio to 6, which is the bias that shows at a distance of 3.

Made by `python -m benchmarks.estimators` with stable-opd {version("stable-opd")}, torch {torch.__version__}.
"""


def table(parts: Sequence[tuple[str, tuple[str, str], list[Line]]]) -> str:
    """Return the Markdown page."""
    page = [INTRODUCTION]
    for headline, columns, some in parts:
        heads = [f"{what}, {distance:g}" for distance in DISTANCES for what in columns]
        page += [f"## {headline}", "", "| estimator | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for line in some:
            cells = []
            for distance in DISTANCES:
                found = [measure(line, World(distance, seed)) for seed in SEEDS]
                means = [sum(each[what] for each in found) / len(found) for what in columns]
                cells += ["0" if abs(each) < 1e-9 else f"{each:.3g}" for each in means]
            page.append(f"| {line.title} | " + " | ".join(cells) + " |")
        page.append("")
    return "\n".join(page)


def main() -> None:
    """Measure everything and write the page."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "estimators.md").write_text(table(lines()), encoding="utf-8")


if __name__ == "__main__":
    main()
