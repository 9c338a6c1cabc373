"""Checks before the first step: impossible combinations are refused with a way out."""

from collections.abc import Iterable, Mapping

from torch import nn


def check_context(contexts: Mapping[str, int | None], prompt: int, golden: int, budget: int) -> None:
    """Make sure that the longest row fits into what the models can read.

    Args:
        contexts: Tokens that each model can read, by what it is called in messages; None if it does not say.
        prompt: Tokens of the longest prompt.
        golden: Tokens of the longest golden solution.
        budget: Token budget of an answer.

    Raises:
        ValueError: If a prompt with its answer, or with its golden solution, is longer than a model's context.
    """
    for reader, context in contexts.items():
        if context is None:
            continue
        if prompt + budget > context:
            raise ValueError(
                f"The {reader} reads at most {context} tokens, but the longest prompt has {prompt} and the token "
                f"budget is {budget}. Lower model.rollout.max_new_tokens to {max(context - prompt, 0)} or less, drop "
                "long prompts with data.max_prompt_tokens, or choose a model with a longer context."
            )
        if prompt + golden > context:
            raise ValueError(
                f"The {reader} reads at most {context} tokens, but the longest prompt has {prompt} and the longest "
                f"golden solution {golden}. Drop long ones with data.max_golden_tokens, or choose a model with a "
                "longer context."
            )


def check_golden(mixture: str, having: int, examples: int) -> None:
    """Make sure that every training example has a golden solution.

    Args:
        mixture: Who needs them.
        having: Examples that have one.
        examples: All training examples.

    Raises:
        ValueError: If some have none.
    """
    if having < examples:
        raise ValueError(
            f"{mixture} needs a golden solution for every prompt, but {examples - having} of {examples} training "
            "examples have none. Name the column that holds them with data.columns.golden, drop the examples without "
            "one, or use StudentOnly."
        )


def check_term_names(constraints: Iterable[str]) -> None:
    """Make sure that the constraints can be logged under their names, and apart from the other terms.

    Raises:
        ValueError: If one cannot.
    """
    constraints = list(constraints)
    odd = sorted(name for name in constraints if not name.isidentifier() or hasattr(nn.ModuleDict, name))
    if odd:
        raise ValueError(
            f"Expected plain words as keys of model.constraints, but got {', '.join(map(repr, odd))}. Choose a name of "
            "letters, digits and underscores that is no method of a dictionary, such as 'anchor'."
        )
    taken = sorted({"divergence", "mixture"} & set(constraints))
    if taken:
        raise ValueError(
            f"Expected a name for each constraint that no other term has, but got {', '.join(map(repr, taken))}. The "
            "keys of model.constraints name the terms in the logs; choose another key, such as 'anchor'."
        )
