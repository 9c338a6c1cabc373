"""How student and teacher compare, measured while their scores are at hand."""

import torch
from torch import Tensor

from stable_opd.types import Author, Evidence

#: How many of the likeliest tokens of student and teacher are compared (Li et al. 2026, arXiv 2604.13016).
OVERLAP_K = 16

#: Entries of the vocabulary that are looked at for the means over it, per micro-batch. Finding the likeliest tokens
#: of all positions would add to the time of the loss, and a mean needs no more than some hundred of them.
ENTRIES = 2**19

#: Positions that are looked at in any case.
POSITIONS = 64


def overlap(student: Tensor, teacher: Tensor) -> Tensor:
    """Return which share of the teacher's likeliest tokens is among the student's likeliest, (n, V) twice -> (n,)."""
    k = min(OVERLAP_K, student.shape[-1])
    ours, theirs = student.topk(k, -1).indices, teacher.topk(k, -1).indices
    return (ours[:, :, None] == theirs[:, None, :]).any(-1).float().mean(-1)


def entropy(logprobs: Tensor) -> Tensor:
    """Return the entropy of distributions in nats, (..., V) -> (...)."""
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


class Diagnostics:
    """Collects figures by name, tile by tile.

    ``student`` and ``teacher`` are the log-probs of every written token, ``own`` says which of them the student wrote
    and ``in_loop`` which of them repeat. ``entropy_student``, ``entropy_teacher`` and ``overlap`` look at the whole
    vocabulary, at evenly spaced positions, each of which ``stands_for`` so many of the student's.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        """Whether anything was collected under a name."""
        return name in self._parts

    def __getitem__(self, name: str) -> Tensor:
        """Return all that was collected under a name, float32, one entry for each position that was looked at."""
        return torch.cat(self._parts[name])

    def add(self, evidence: Evidence, start: int, count: int) -> None:
        """Look at a tile.

        Args:
            evidence: n positions with the scores of student and teacher.
            start: Where the tile starts among all positions.
            count: How many positions there are in all.
        """
        student, teacher = evidence.student, evidence.teacher
        own = evidence.written_by(Author.STUDENT)
        self.put("student", student.sampled)
        self.put("teacher", teacher.sampled)
        self.put("own", own)
        self.put("in_loop", evidence.in_loop)
        stride = max(1, count // max(POSITIONS, ENTRIES // student.logprobs.shape[-1]))
        seen = slice(-start % stride, None, stride)
        ours, theirs = student.logprobs[seen], teacher.logprobs[seen]
        self.put("entropy_student", entropy(ours))
        self.put("entropy_teacher", entropy(theirs))
        self.put("overlap", overlap(ours, theirs))
        self.put("stands_for", stride * own[seen].float())

    def put(self, name: str, values: Tensor) -> None:
        """Collect values under a name."""
        self._parts.setdefault(name, []).append(values)

    def extend(self, other: "Diagnostics") -> None:
        """Collect what somebody else collected."""
        for name, parts in other._parts.items():
            self._parts.setdefault(name, []).extend(parts)
