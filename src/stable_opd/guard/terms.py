"""Which terms a guard raises."""

from collections.abc import Sequence
from typing import Any

from stable_opd.terms import LossTerm
from stable_opd.types import Author


def guarded_terms(module: Any, chosen: Sequence[str] | None, resting: bool) -> dict[str, LossTerm]:
    """Return the terms to raise by their names.

    Args:
        module: The `OPDModule`.
        chosen: Their names; none takes a mixture that brings rows of others, and all constraints that hold on to the
            reference.
        resting: Whether they rest at first.

    Raises:
        ValueError: If there is none, a name is unknown, or golden rows would be written that no term learns from.
    """
    known: dict[str, LossTerm] = {"mixture": module.mixture, **module.constraints}
    if chosen is None:
        chosen = [name for name in module.constraints if _holds_on(known[name])]
        chosen = [*(["mixture"] if module.mixture.authors else []), *chosen]
    unknown = sorted(set(chosen) - known.keys())
    if unknown or not chosen:
        raise ValueError(
            f"Expected a CollapseGuard that acts to have terms to raise, but got {', '.join(unknown) or 'none'}. Add a "
            "mixture such as GoldenMixture or a constraint such as ReferenceKL to the model, with resting: true in the "
            f"guard if they are to count only when needed; or set its mode to warn. Known terms: {', '.join(known)}."
        )
    if resting and "mixture" in chosen and module.policies.needs_golden and Author.GOLDEN in module.mixture.authors:
        raise ValueError(
            "Expected golden rows to be learnt from in every step, because model.policies.loops is golden, but got a "
            "CollapseGuard with resting: true. Choose the policy mask for loops, or resting: false."
        )
    return {name: known[name] for name in chosen}


def _holds_on(term: LossTerm) -> bool:
    return term.needs_reference or term.keeps_reference
