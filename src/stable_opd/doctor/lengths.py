"""Whether prompts, answers and golden solutions fit."""

from collections.abc import Iterator, Mapping

from stable_opd.data import PromptDataModule
from stable_opd.doctor.findings import Symptom, check, symptom
from stable_opd.learning import Learner
from stable_opd.mixtures import Mixture

#: Share of the golden solutions that may be longer than the token budget.
TOO_LONG = 0.05


@check(
    "context",
    "error",
    "Its positions beyond that are unknown to it, so it would write or score nonsense there.",
    "Lower model.rollout.max_new_tokens to {room} or less, drop long prompts with data.max_prompt_tokens, or choose a "
    "model with a longer context.",
)
def context(contexts: Mapping[str, int | None], data: PromptDataModule, budget: int) -> Iterator[Symptom]:
    """The longest prompt with the token budget, against what student and teacher can read."""
    for reader, length in contexts.items():
        if length is not None and data.longest_prompt + budget > length:
            yield symptom(
                f"The {reader} reads at most {length} tokens, but the longest prompt has {data.longest_prompt} and the "
                f"token budget is {budget}.",
                room=max(length - data.longest_prompt, 0),
            )


@check(
    "golden-context",
    "error",
    "Its positions beyond that are unknown to it, so it would learn or score nonsense there.",
    "Drop long ones with data.max_golden_tokens, or choose a model with a longer context.",
)
def golden_context(
    contexts: Mapping[str, int | None], data: PromptDataModule, learner: Learner, mixture: Mixture
) -> Iterator[Symptom]:
    """The longest prompt with the longest golden solution, against what student and teacher can read."""
    if not (mixture.needs_golden or learner.policies.needs_golden):
        return
    for reader, length in contexts.items():
        if length is not None and data.longest_prompt + data.longest_golden > length:
            yield symptom(
                f"The {reader} reads at most {length} tokens, but the longest prompt has {data.longest_prompt} and the "
                f"longest golden solution {data.longest_golden}."
            )


@check(
    "golden-missing",
    "error",
    "There would be nothing to learn from in their place.",
    "Name the column that holds them with data.columns.golden, drop the examples without one, or use StudentOnly.",
)
def golden_missing(data: PromptDataModule, mixture: Mixture) -> Iterator[Symptom]:
    """Training examples without a golden solution, if the mixture needs one."""
    having, examples = data.golden_count
    if mixture.needs_golden and having < examples:
        yield symptom(
            f"{type(mixture).__name__} needs a golden solution for every prompt, but {examples - having} of {examples} "
            "training examples have none."
        )


@check(
    "golden-budget",
    "warning",
    "Answers like them are cut, and count as truncated from the first step on.",
    "Raise model.rollout.max_new_tokens to {longest}, or drop long ones with data.max_golden_tokens.",
)
def golden_budget(data: PromptDataModule, budget: int) -> Iterator[Symptom]:
    """Golden solutions that are longer than the token budget: more than 1 in 20."""
    lengths = [len(each.golden) for each in data.examples.get("train", []) if each.golden]
    longer = sum(length > budget for length in lengths)
    if longer > TOO_LONG * len(lengths):
        found = f"{longer} of {len(lengths)} golden solutions are longer than the token budget of {budget}."
        yield symptom(found, longest=max(lengths))
