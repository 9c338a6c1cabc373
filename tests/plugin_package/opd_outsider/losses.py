from stable_opd import Author, Divergence, Evidence, TokenLoss


class OutsiderKL(Divergence):
    """Forward KL over the whole vocabulary, times a weight.

    Source: the documentation of stable-opd.

    Args:
        weight: Multiplies the loss.
    """

    support = "full"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        p, q = evidence.student.logprobs, evidence.teacher.logprobs
        loss = (q.exp() * (q - p)).sum(-1)
        return TokenLoss(self.weight * loss, loss.detach(), evidence.written_by(Author.STUDENT))
