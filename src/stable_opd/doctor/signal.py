"""Whether there is something to learn from the teacher, and something that can be learnt."""

from collections.abc import Iterator

from stable_opd.doctor.findings import Symptom, check, symptom
from stable_opd.doctor.measure import Measured
from stable_opd.doctor.patient import Speaker
from stable_opd.terminal import StopRule

#: KL(student || teacher) at a token, in nats, below which the teacher says nothing new, and above which it speaks of
#: something else.
INERT, EXTREME = 1e-3, 2.0

#: Probability of a stop token where golden solutions end, below which a model does not end there.
ENDS = 0.1


@check(
    "inert-signal",
    "warning",
    "There is nothing to learn from it, and what is left of the loss is noise.",
    "Choose another model.teacher.path; this one is {teacher}, and the student {student}.",
)
def inert_signal(measured: Measured, student: Speaker, teacher: Speaker) -> Iterator[Symptom]:
    """KL per token of student to teacher on the student's answers: below 0.001 nats."""
    if measured.kl < INERT:
        found = f"Teacher and student agree: the divergence is {measured.kl:.1e} nats a token."
        yield symptom(found, teacher=teacher.path, student=student.path)


@check(
    "extreme-signal",
    "warning",
    "Gradients are huge and far from what the student can do, and its answers may leave what it knows.",
    "Look at the prompts first (data.chat_template); then warm the student up on golden solutions: GoldenMixture with "
    "model.rollout.samples_per_prompt: 0.",
)
def extreme_signal(measured: Measured) -> Iterator[Symptom]:
    """KL per token of student to teacher on the student's answers: above 2 nats."""
    if not measured.kl <= EXTREME:  # nor is a divergence that is no number
        yield symptom(
            f"Teacher and student are far apart: the divergence is {measured.kl:.1f} nats a token, and of the "
            f"likeliest tokens they share {measured.overlap:.0%}."
        )


@check(
    "teacher-stop",
    "error",
    "Every right ending is punished, so the student unlearns to stop, and its answers grow to the token budget (arXiv "
    "2609.20511).",
    "Score the stop event over both sets ({stop}): model.terminal: SemanticClass.",
)
def teacher_stop(measured: Measured, student: Speaker, teacher: Speaker, stop_rule: StopRule) -> Iterator[Symptom]:
    """Probability of the student's stop tokens by the teacher where golden solutions end: below 0.1, its own above."""
    mass, own = measured.stop_teacher, measured.stop_teacher_own
    if stop_rule.teacher is None and mass is not None and own is not None and mass < ENDS <= own:
        yield symptom(
            f"Where golden solutions end, the teacher gives the student's stop tokens a probability of {mass:.1e}, and "
            f"its own {own:.2f} (medians).",
            stop=student.words(student.stop | teacher.stop),
        )


@check(
    "golden-ending",
    "warning",
    "Teacher and golden solutions pull in two directions there: what one teaches to end, the other wants to go on.",
    "Take golden solutions in the teacher's format that were not cut (data.train.path), or a teacher that ends as they "
    "do.",
)
def golden_ending(measured: Measured) -> Iterator[Symptom]:
    """Probability of any stop token by the teacher where golden solutions end: below 0.1."""
    mass, own = measured.stop_teacher, measured.stop_teacher_own
    if mass is not None and own is not None and max(mass, own) < ENDS:
        yield symptom(
            "The teacher does not end where golden solutions do: it gives a stop token a probability of "
            f"{max(mass, own):.1e} there (median)."
        )


@check(
    "student-stop",
    "warning",
    "An answer that seldom ends is cut, and nobody scores an ending that is never written.",
    "Warm the student up first: GoldenMixture with model.rollout.samples_per_prompt: 0.",
)
def student_stop(measured: Measured) -> Iterator[Symptom]:
    """Probability of a stop token by the student where golden solutions end: below 0.1."""
    if measured.stop_student is not None and measured.stop_student < ENDS:
        yield symptom(
            "The student has not learned to stop: where golden solutions end, it does so with a probability of "
            f"{measured.stop_student:.1e} (median)."
        )
