"""Checks before the first step: impossible combinations are refused with a way out."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from transformers import PreTrainedTokenizerBase

from stable_opd.mixtures.base import Mixture
from stable_opd.objective import Objective
from stable_opd.policies import Policies
from stable_opd.references import Reference
from stable_opd.registry import summary
from stable_opd.samplers.base import Sampler
from stable_opd.terminal import TerminalIds, TerminalPolicy
from stable_opd.types import Author
from stable_opd.weightings.base import Weighting


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


def check_parts(
    objective: Objective,
    mixture: Mixture,
    policies: Policies,
    weightings: Sequence[Weighting],
    reference: Reference,
    sampler: Sampler,
) -> None:
    """Refuse a combination in which a part would do nothing, and warn of one that departs from the method.

    Raises:
        ValueError: If golden rows take the place of others and nobody learns from them, if a weighting compares models
            of which one is never asked, or if a reference moves that nobody looks at.
    """
    looking = [type(each).__name__ for each in weightings if each.needs_scores]
    if looking and not any(term.needs_teacher for term in objective.own.values()):
        raise ValueError(
            f"Expected a divergence that asks the teacher, because {', '.join(looking)} compares the student with it, "
            "but got none. Choose one that declares needs_teacher = True, or leave the weighting out."
        )
    terms = objective.terms.values()
    if reference.moves and not any(term.needs_reference or term.keeps_reference for term in terms):
        raise ValueError(
            f"Expected a term that looks at the reference, because model.reference is {type(reference).__name__}, but "
            "got none. Add a constraint such as ReferenceKL, or leave model.reference out."
        )
    if policies.needs_golden and Author.GOLDEN not in mixture.authors:
        raise ValueError(
            "Expected a mixture that learns from golden rows, because model.policies.loops is golden, but got "
            f"{type(mixture).__name__}: what takes the place of repetitive rows would teach nothing. Use "
            "GoldenMixture, or choose the policy mask for loops."
        )
    if not sampler.follows_student:
        rank_zero_warn(
            f"{type(sampler).__name__} does not draw from the student's own distribution. Divergences over the "
            "vocabulary then learn from states that the student alone would visit less or more often; advantage-shaped "
            "ones correct by the importance ratio, but never see the tokens that are ruled out. On-policy distillation "
            "assumes a temperature of 1 and nothing ruled out."
        )


def say_terminal(policy: TerminalPolicy, ids: TerminalIds, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say in the log with which tokens student and teacher end their answers, unless it is one token for both."""
    if len(ids.union) == 1:
        return
    student, teacher = (
        ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in some)
        for some in (ids.student, ids.teacher)
    )
    rank_zero_info(
        f"The student ends its answers with {student}, the teacher with {teacher}. model.terminal is "
        f"{type(policy).__name__}: {summary(type(policy))}"
    )
