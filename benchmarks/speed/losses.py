"""The loss alone, from the hidden states of both models: forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.speed.turns import Job, Turns
from torch import Tensor

from stable_opd import Divergence, Evidence, ReverseKL, SampledReverseKL
from stable_opd.models import Head
from stable_opd.scoring import HiddenStates
from stable_opd.streaming import Part, streamed_loss

BARE_TILE = 1024  # positions of one product; small enough that no tensor of (N, V) exists


@dataclass(frozen=True)
class LossCell:
    """One size of the loss.

    Attributes:
        positions: Completion tokens N.
        vocabulary: Tokens V.
        student: Hidden width of the student.
        teacher: Hidden width of the teacher.
    """

    positions: int
    vocabulary: int
    student: int
    teacher: int

    @property
    def name(self) -> str:
        """How the cell is called in the results."""
        return f"n{self.positions}-v{self.vocabulary}"

    @property
    def outputs(self) -> int:
        """Numbers in the gradients of hidden states and head, which every contestant must return."""
        return (self.positions + self.vocabulary) * self.student

    @property
    def logits(self) -> int:
        """Bytes of one float32 tensor of logits."""
        return 4 * self.positions * self.vocabulary


@dataclass(frozen=True)
class Inputs:
    """Hidden states (N, H) and heads (V, H) of both models; those of the student get gradients."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    tokens: Tensor

    def first(self, count: int) -> "Inputs":
        """Return the inputs of the first positions only, as leaves of their own."""
        student = self.student[:count].detach().clone().requires_grad_()
        return Inputs(student, self.student_head, self.teacher[:count], self.teacher_head, self.tokens[:count])


Loss = Callable[[Inputs], None]


def make_inputs(cell: LossCell, device: str) -> Inputs:
    """Draw inputs whose logits have a standard deviation of one."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(rows: int, width: int, scale: float) -> Tensor:
        return torch.randn(rows, width, device=device, dtype=dtype, generator=generator).mul_(scale)

    return Inputs(
        normal(cell.positions, cell.student, 1.0).requires_grad_(),
        normal(cell.vocabulary, cell.student, cell.student**-0.5).requires_grad_(),
        normal(cell.positions, cell.teacher, 1.0),
        normal(cell.vocabulary, cell.teacher, cell.teacher**-0.5),
        torch.randint(cell.vocabulary, (cell.positions,), device=device, generator=generator),
    )


def our_loss(divergence: Divergence, inputs: Inputs) -> Tensor:
    """Return our loss, the mean over all positions."""
    count, device = len(inputs.tokens), inputs.tokens.device
    zeros = torch.zeros(count, device=device)
    evidence = Evidence(
        tokens=inputs.tokens,
        row=zeros.long(),
        position=torch.arange(count, device=device),
        in_loop=zeros.bool(),
        author=zeros.long(),
        behaviour_logprobs=zeros,
        progress=0.0,
    )
    teacher = HiddenStates(inputs.teacher, Head(inputs.teacher_head))
    part = Part({"divergence": divergence}, evidence, {"divergence": torch.full_like(zeros, 1 / count)}, teacher)
    return streamed_loss(HiddenStates(inputs.student, Head(inputs.student_head)), [part]).loss


def ours(inputs: Inputs) -> None:
    """Take the exact reverse KL."""
    our_loss(ReverseKL(), inputs).backward()


def sampled(inputs: Inputs) -> None:
    """Take the reverse KL estimated from the written tokens."""
    our_loss(SampledReverseKL(), inputs).backward()


def trl(inputs: Inputs) -> None:
    """Take TRL's exact reverse KL, as its trainer reduces it."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        inputs.student, inputs.student_head, None, inputs.teacher, inputs.teacher_head, None, 1.0
    )
    (divergence.sum() / len(inputs.tokens)).backward()


@torch.no_grad()
def bare(inputs: Inputs) -> None:
    """Do the matrix products that no exact loss can do without, and nothing else."""
    to_head = torch.zeros_like(inputs.student_head)
    for start in range(0, len(inputs.tokens), BARE_TILE):
        tile = slice(start, start + BARE_TILE)
        logits = inputs.student[tile] @ inputs.student_head.T
        _ = inputs.teacher[tile] @ inputs.teacher_head.T
        _ = logits @ inputs.student_head
        to_head.addmm_(logits.T, inputs.student[tile])


LOSSES: dict[str, Loss] = {"ours": ours, "sampled": sampled, "trl": trl, "bare": bare}


def work(job: Job, turns: Turns) -> None:
    """Take losses while released."""
    settings: dict[str, Any] = dict(job.settings)
    loss = LOSSES[settings.pop("loss")]
    inputs = make_inputs(LossCell(**settings), job.device)
    loss(inputs.first(8))  # threads, libraries and kernels are there before the memory is measured
    inputs.student_head.grad = None
    alive = turns.start()
    while alive:
        loss(inputs)
        inputs.student.grad = inputs.student_head.grad = None
        alive = turns.finish(dict)
