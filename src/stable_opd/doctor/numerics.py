"""Whether those who write and those who score reckon with the same numbers."""

from collections.abc import Iterator

from stable_opd.doctor.findings import Symptom, check, symptom
from stable_opd.doctor.measure import Measured
from stable_opd.samplers import Sampler

#: Mean difference of a token's log-prob between engine and forward pass, in nats. Rounding to bfloat16 makes some 0.01.
DRIFT = 0.05


@check(
    "precision",
    "error",
    "It scales the gradients, which would be clipped as they are scaled.",
    "Use the trainer.precision bf16-mixed, bf16-true or 32-true.",
)
def precision(precision: str) -> Iterator[Symptom]:
    """The trainer's precision."""
    if precision == "16-mixed":
        yield symptom("The precision is 16-mixed.")


@check(
    "sampler",
    "warning",
    "Divergences over the vocabulary then learn from states that the student alone would visit less or more often; "
    "advantage-shaped ones correct by the importance ratio, but never see the tokens that are ruled out.",
    "On-policy distillation assumes a temperature of 1 and nothing ruled out: leave model.sampler out.",
)
def sampler(sampler: Sampler) -> Iterator[Symptom]:
    """The distribution that the student's tokens are drawn from, against the one that is scored."""
    if not sampler.follows_student:
        yield symptom(f"{type(sampler).__name__} does not draw from the student's own distribution.")


@check(
    "drift",
    "error",
    "The student would be trained on what another model wrote, so its gradients are biased.",
    "Let model.engine serve the student's weights in the trainer's precision at temperature 1, or leave it out.",
)
def drift(measured: Measured, sampler: Sampler) -> Iterator[Symptom]:
    """Log-probs of written tokens by the engine that drew them, against the student's own forward pass."""
    if sampler.follows_student and measured.drift > DRIFT:
        yield symptom(
            f"The engine's log-probs differ from those of the student's forward pass by {measured.drift:.2f} nats in "
            "the mean."
        )
