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


@check(
    "adapter-reference",
    "error",
    "It needs a copy of all weights, where the reference is the student without its adapters.",
    "Leave model.reference out, or leave model.adapter out to train all weights.",
)
def adapter_reference(learner: Learner, adapted: bool) -> Iterator[Symptom]:
    """A reference that moves, where only adapters learn."""
    if adapted and learner.reference.moves:
        yield symptom(
            "Expected the initial student as model.reference, because model.adapter is set, but got "
            f"{type(learner.reference).__name__}."
        )


@check(
    "adapter-weights",
    "error",
    "It finds the weights that it holds frozen.",
    "Use ReferenceKL, or leave model.adapter out.",
)
def adapter_weights(learner: Learner, adapted: bool) -> Iterator[Symptom]:
    """Constraints that hold the student's weights, where only adapters learn."""
    pulling = [name for name, term in learner.objective.terms.items() if term.keeps_reference]
    if adapted and pulling:
        yield symptom(
            "Expected constraints that look at what the student says, because model.adapter is set, but got "
            f"{', '.join(pulling)}, which holds the student's weights."
        )


@check(
    "adapter-offload",
    "error",
    "It is the student without its adapters, and takes no memory.",
    "Leave it out of model.update.offload.",
)
def adapter_offload(learner: Learner, adapted: bool) -> Iterator[Symptom]:
    """A reference that is to rest in the host's memory, where it is the student itself."""
    if adapted and "reference" in learner.options.offload:
        yield symptom("Expected no reference in model.update.offload, because model.adapter is set, but got one.")
