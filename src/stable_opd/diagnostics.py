"""How student and teacher compare, measured while their scores are at hand."""

import torch
from torch import Tensor

from stable_opd.randomness import key
from stable_opd.types import Author, Evidence, Scores

#: How many of the likeliest tokens of student and teacher are compared (Li et al. 2026, arXiv 2604.13016).
OVERLAP_K = 16

#: Entries of the vocabulary that are looked at for the means over it, per micro-batch. Finding the likeliest tokens
#: of all positions would add to the time of the loss, and a mean needs no more than some hundred of them.
ENTRIES = 2**19

#: Positions that are looked at in any case.
POSITIONS = 64

#: Entries of the vocabulary that are worked on together on a CPU. Larger temporary tensors come from fresh memory, and
#: its page faults took several times as long as the arithmetic.
AT_ONCE = 2**18


def overlap(student: Scores, teacher: Scores) -> tuple[Tensor, Tensor]:
    """Compare the likeliest tokens of student and teacher, `OVERLAP_K` of each.

        share = |S & T| / k,  advantage = sum over v in S & T of p'_v (log q'_v - log p'_v)

    with p' and q' the two distributions among the tokens of S & T. The advantage is never above zero and comes to it
    where the two agree. It is zero for a single token, too, and has no meaning for none.

    Source: Li et al. 2026 (arXiv 2604.13016).

    Args:
        student: What the student says of n positions.
        teacher: What the teacher does; fewer are compared if fewer of its likeliest tokens are known.

    Returns:
        Share and advantage, (n,) each; the advantage is 0 where the share is. Nan if no token is known.
    """
    k = min(OVERLAP_K, student.known, teacher.known)
    (tokens, ours), (others, theirs) = student.top(k), teacher.top(k)
    same = tokens[:, :, None] == others[:, None, :]
    shared = same.any(-1)
    theirs = finite(theirs)[:, None, :].where(same, 0).sum(-1)
    log_p, log_q = (each.masked_fill(~shared, -torch.inf).log_softmax(-1) for each in (finite(ours), theirs))
    advantage = (log_p.exp() * (log_q - log_p)).masked_fill(~shared, 0).sum(-1)
    return shared.float().mean(-1), advantage


def finite(logprobs: Tensor) -> Tensor:
    """Return log-probs whose impossible tokens have the least of all numbers, so that 0 times it is 0 and not nan."""
    return logprobs.clamp(min=torch.finfo(logprobs.dtype).min)


def divergence(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the entropies of student and teacher and KL(student || teacher), in nats, (n, V) twice -> (n,) each.

    A token that only the teacher rules out makes the divergence a huge number, and not infinite.
    """
    size = max(1, AT_ONCE // student.shape[-1]) if student.device.type == "cpu" else max(1, len(student))
    parts = [_divergence(*pair) for pair in zip(student.split(size), teacher.split(size), strict=True)]
    ours, theirs, kl = (torch.cat(each) for each in zip(*parts, strict=True))
    return ours, theirs, kl


def _divergence(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p, log_p, log_q = student.exp(), finite(student), finite(teacher)
    ours = -torch.linalg.vecdot(p, log_p)
    kl = torch.linalg.vecdot(p, log_p.sub_(log_q))
    return ours, -torch.linalg.vecdot(torch.exp(teacher, out=p), log_q), kl


def _compared(student: Scores, teacher: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `divergence` does, with nan for what takes the teacher's whole distribution if that is not known."""
    if teacher.whole:
        return divergence(student.logprobs, teacher.logprobs)
    entropy = -torch.linalg.vecdot(student.logprobs.exp(), finite(student.logprobs))
    unknown = torch.full_like(entropy, torch.nan)
    return entropy, unknown, unknown


class Diagnostics:
    """Collects figures by name, tile by tile.

    Of every position:

    - ``student``, ``teacher``: log-probs of the written token,
    - ``own``: whether the student wrote it,
    - ``in_loop``: whether it repeats earlier ones,
    - ``stop_student``, ``stop_teacher``: probability of a stop token,
    - ``stopped``: whether the student wrote one there.

    Of evenly spaced positions, where the whole vocabulary is looked at:

    - ``entropy_student``, ``entropy_teacher``, and ``kl`` of student to teacher,
    - ``overlap`` and ``overlap_advantage``,
    - ``position``: place in the completion, from 0,
    - ``stands_for``: how many of the student's positions each speaks for; none where somebody else wrote,
    - ``overlapping``: the same, but none where no likely token is shared.

    How far apart they are depends on the size of the micro-batch, and where the first of them is on chance, which
    follows from the size and from the progress. So every position is looked at with the same chance as it has weight,
    and sums over them have the same expectation however a batch is cut.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        """Whether anything was collected under a name."""
        return name in self._parts

    def __getitem__(self, name: str) -> Tensor:
        """Return all that was collected under a name, one entry for each position that was looked at."""
        return torch.cat(self._parts[name])

    def add(self, evidence: Evidence, start: int, count: int) -> None:
        """Look at a tile.

        Args:
            evidence: n positions with the scores of student and teacher.
            start: Where the tile starts among all positions.
            count: How many positions there are in all.
        """
        student, teacher, stop = evidence.student, evidence.teacher, evidence.stop
        own, stopped = evidence.written_by(Author.STUDENT), torch.zeros_like(evidence.in_loop)
        for token in stop:
            stopped |= evidence.tokens == token
        self.put("student", student.sampled)
        self.put("teacher", teacher.sampled)
        self.put("own", own)
        self.put("in_loop", evidence.in_loop)
        self.put("stopped", own & stopped)
        self.put("stop_student", student.mass(stop, evidence.tokens))
        self.put("stop_teacher", teacher.mass(stop, evidence.tokens))
        stride = max(1, count // max(POSITIONS, ENTRIES // student.logprobs.shape[-1]))
        first = (key("diagnostics", count, repr(evidence.progress)) - start) % stride
        if first >= len(own):
            return
        seen = slice(first, None, stride)
        student, teacher = student.at(seen), teacher.at(seen)
        entropy_student, entropy_teacher, kl = _compared(student, teacher)
        share, advantage = overlap(student, teacher)
        weight = stride * own[seen].float()
        self.put("entropy_student", entropy_student)
        self.put("entropy_teacher", entropy_teacher)
        self.put("kl", kl)
        self.put("overlap", share)
        self.put("overlap_advantage", advantage)
        self.put("position", evidence.position[seen])
        self.put("stands_for", weight)
        self.put("overlapping", weight * (share > 0))

    def put(self, name: str, values: Tensor) -> None:
        """Collect values under a name."""
        self._parts.setdefault(name, []).append(values)

    def extend(self, other: "Diagnostics") -> None:
        """Collect what somebody else collected."""
        for name, parts in other._parts.items():
            self._parts.setdefault(name, []).extend(parts)
