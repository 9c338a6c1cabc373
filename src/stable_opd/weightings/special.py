"""Special tokens do not count."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stable_opd.look import Look
from stable_opd.types import Finish, Rollout
from stable_opd.weightings.base import Weighting
from stable_opd.weightings.sums import sums_before


def occurrences_of(tokens: Sequence[int], rollout: Rollout, first: int | None) -> Tensor:
    """Return where a row has one of some tokens.

    Args:
        tokens: Token ids.
        rollout: The rows.
        first: Only so many occurrences of each token in each row, counted from its start; None means all.

    Returns:
        Which completion tokens they are, (N,) bool.
    """
    found = torch.zeros_like(rollout.row, dtype=torch.bool)
    for token in tokens:
        here = rollout.completion == token
        found |= here if first is None else here & (sums_before(here, rollout.row) < first)
    return found


def ends(rollout: Rollout) -> Tensor:
    """Return the stop tokens that ended a row, (N,) bool."""
    last = rollout.position == (rollout.lengths - 1)[rollout.row]
    return last & (rollout.finish == Finish.STOP)[rollout.row]


class SpecialTokens(Weighting):
    """Special tokens do not count: tags that student and teacher were taught to set in different places.

        w_t = 0 where y_t is one of ``tokens``, for the first time in its row; 1 elsewhere

    Where the teacher was trained with tags that the student's prompt does not ask for, or the other way round, the
    divergence at a tag is larger than at any word, and says nothing about the answer. The stop token that ended a row
    counts even if it is listed, as it may well be among the tags of a turn: nothing else teaches the student to end its
    answers, and answers that do not end are how training collapses. If the teacher ends its answers with another token
    than the student, the divergence there teaches not to end, and it is better masked.

    Source: Revisiting OPD (arXiv 2603.25562), which masks the first tags of thinking and of a turn.

    Args:
        tokens: Token ids; those of a tag are ``tokenizer.convert_tokens_to_ids("<think>")``.
        first: How many occurrences of each token in a row are masked, from the start of the answer; null masks all.
        mask_end: Mask the stop token that ended a row as well, if it is one of ``tokens``.
    """

    def __init__(self, tokens: list[int], first: int | None = 1, mask_end: bool = False) -> None:
        super().__init__()
        if not tokens or min(tokens) < 0:
            raise ValueError(
                f"Expected tokens to be some token ids, but got {tokens}. The tokenizer's convert_tokens_to_ids gives "
                "the id of a tag."
            )
        if first is not None and first < 1:
            raise ValueError(f"Expected first of at least 1, but got {first}. Use null to mask every occurrence.")
        self.tokens = list(tokens)
        self.first = first
        self.mask_end = mask_end

    def forward(self, look: Look) -> Tensor:
        """Return 0 for the special tokens and 1 for the others."""
        masked = occurrences_of(self.tokens, look.rollout, self.first)
        if not self.mask_end:
            masked &= ~ends(look.rollout)
        return (~masked).float()
