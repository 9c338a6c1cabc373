"""Whether the components fit together: impossible combinations are refused with a way out."""

from collections.abc import Iterator

from stable_opd.doctor.findings import Symptom, check, symptom
from stable_opd.learning import Learner
from stable_opd.mixtures import Mixture
from stable_opd.types import Author


@check(
    "weighting",
    "error",
    "It would have nothing to compare.",
    "Choose a divergence that declares needs_teacher = True, or leave the weighting out.",
)
def weighting(learner: Learner) -> Iterator[Symptom]:
    """Weightings that compare the student with the teacher, where no term asks the teacher."""
    looking = [type(each).__name__ for each in learner.weightings if each.needs_scores]
    if looking and not learner.compares_models:
        yield symptom(
            f"Expected a divergence that asks the teacher, because {', '.join(looking)} compares the student with it, "
            "but got none."
        )


@check(
    "reference",
    "error",
    "It would be kept up to date for nobody.",
    "Add a constraint such as ReferenceKL, or leave model.reference out.",
)
def reference(learner: Learner) -> Iterator[Symptom]:
    """A reference that moves, where no term looks at it."""
    terms = learner.objective.terms.values()
    if learner.reference.moves and not any(term.needs_reference or term.keeps_reference for term in terms):
        yield symptom(
            "Expected a term that looks at the reference, because model.reference is "
            f"{type(learner.reference).__name__}, but got none."
        )


@check(
    "loops",
    "error",
    "What takes the place of repetitive rows would teach nothing.",
    "Use GoldenMixture, or choose the policy mask for loops.",
)
def loops(learner: Learner, mixture: Mixture) -> Iterator[Symptom]:
    """Golden solutions in the place of repetitive rows, where the mixture does not learn from them."""
    if learner.policies.needs_golden and Author.GOLDEN not in mixture.authors:
        yield symptom(
            "Expected a mixture that learns from golden rows, because model.policies.loops is golden, but got "
            f"{type(mixture).__name__}."
        )
