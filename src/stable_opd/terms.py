"""What the three kinds that contribute to the loss have in common."""

from abc import abstractmethod
from collections.abc import Collection, Iterable
from typing import Any, Literal, get_args

from torch import Tensor, nn

from stable_opd.registry import Component
from stable_opd.types import Evidence, TokenLoss

Support = Literal["sampled", "topk", "full"]
SUPPORTS: tuple[Support, ...] = get_args(Support)  # from the least that is read to the most


class LossTerm(Component, nn.Module):
    """A term of the objective: it declares what it needs to see, and turns evidence into a loss per position."""

    # What a class declares holds for all its objects, unless the parts that one is composed of need more.

    #: What is read of the models' scores. "sampled": log-probs of the written tokens, whole rows at once. "topk": all
    #: of the student's, but of the teacher its likeliest tokens alone (`Scores.top`), in tiles. "full": everything, in
    #: tiles.
    support: Support = "sampled"
    #: For "topk": how many of the teacher's likeliest tokens are read.
    k: int = 0
    needs_teacher: bool = False
    needs_reference: bool = False
    #: The reference has to be there, though it need not read anything for this term.
    keeps_reference: bool = False
    #: For "sampled": the term looks at each position by itself and may be called on tiles of them, which saves a pass.
    positionwise: bool = False
    #: The weights of tokens apply to it (`Weighting`, and what is done with loops and truncated rows).
    weighted: bool = False
    #: Factor of the term beside its own weight; `CollapseGuard` sets it while a run goes on. A term of strength 0
    #: rests: nothing is written, read or evaluated for it.
    strength: float = 1.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a support that nobody would ever serve, so that a typing error is not a term that does nothing."""
        super().__init_subclass__(**kwargs)
        if cls.support not in get_args(Support):
            raise ValueError(
                f"Expected {cls.__name__}.support to be one of {get_args(Support)}, but got {cls.support!r}."
            )

    @abstractmethod
    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the loss of each position; no masking, no reduction."""

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss | None:
        """Return what `forward` returns and write the gradient of each loss in the student's logits, if it is known.

        It spares a term of the whole vocabulary the passes of autograd. It has to agree with `forward`, which is what
        happens where it is None, as it is here. The log-probs are finite, as those of a head are, and what is returned
        has to be finite too, also where the term does not speak.

        Args:
            evidence: The same as `forward` gets.
            out: Memory for d loss_i / d logits_i at each position i, (n, V); what it holds is to be overwritten.

        Returns:
            The losses, without a graph; or None.
        """
        return None


def check_term_names(place: str, names: Iterable[str], taken: Collection[str] = ()) -> None:
    """Make sure that components can be logged under their names, and apart from the other terms.

    Args:
        place: The key of the configuration that holds them.
        names: Their keys.
        taken: Names that others have.

    Raises:
        ValueError: If one cannot.
    """
    names = list(names)
    odd = sorted(name for name in names if not name.isidentifier() or hasattr(nn.ModuleDict, name))
    if odd:
        raise ValueError(
            f"Expected plain words as keys of {place}, but got {', '.join(map(repr, odd))}. Choose a name of "
            "letters, digits and underscores that is no method of a dictionary, such as 'anchor'."
        )
    twice = sorted(set(taken) & set(names))
    if twice:
        raise ValueError(
            f"Expected a name for each constraint that no other term has, but got {', '.join(map(repr, twice))}. The "
            f"keys of {place} name the terms in the logs; choose another key, such as 'anchor'."
        )
