"""The contract of a constraint: what keeps the student stable.

A complete plug-in:

    from stable_opd import Author, Constraint, Evidence, TokenLoss

    class EntropyBonus(Constraint):
        \"\"\"Reward entropy, so that the student keeps exploring.\"\"\"

        support = "full"

        def forward(self, evidence: Evidence) -> TokenLoss:
            logprobs = evidence.student.logprobs
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            return TokenLoss(-0.001 * entropy, entropy.detach(), evidence.written_by(Author.STUDENT))
"""

from typing import ClassVar

from torch import Tensor

from stable_opd.terms import LossTerm


class Constraint(LossTerm):
    """What keeps the student stable; it is called on the rows that the student wrote."""

    kind: ClassVar[str] = "constraint"

    def adapt(self, value: Tensor) -> None:
        """Learn of the term's mean value in the batch just trained on, once per optimizer step; does nothing here.

        Args:
            value: Mean over the student's tokens in the global batch (0 where the term does not speak), a scalar, the
                same on every process.
        """
