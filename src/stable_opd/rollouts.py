"""Carrying out a plan: the student writes its rows, golden rows are copied, and both stand in one rollout."""

from collections import Counter

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.engines.base import Completions, Request, RolloutEngine
from stable_opd.randomness import key
from stable_opd.samplers.base import Sampler
from stable_opd.types import Author, Finish, Plan, Prompts, Rollout


def row_keys(plan: Plan, prompts: Prompts, rows: list[int], *parts: int | str) -> list[int]:
    """Return the random key of each row: the parts, the prompt's place in its dataset, and the sample's number."""
    seen: Counter[int] = Counter()
    keys = []
    for row in rows:
        prompt = plan.prompt[row]
        keys.append(key(*parts, prompts.index[prompt], seen[prompt]))
        seen[prompt] += 1
    return keys


def carry_out(
    plan: Plan,
    prompts: Prompts,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: RolloutEngine,
    sampler: Sampler,
    max_new_tokens: int,
    stop: list[int],
    key_parts: tuple[int | str, ...],
) -> Rollout:
    """Return the rollout that a plan asks for.

    Raises:
        ValueError: If a prompt and the token budget do not fit into the model's context, or if the plan names an author
            who does not write here.
    """
    strangers = {author.name for author in plan.author} - {Author.STUDENT.name, Author.GOLDEN.name}
    if strangers:
        raise ValueError(f"Expected a plan with rows by STUDENT or GOLDEN, but got {', '.join(sorted(strangers))}.")
    if not plan.author:
        raise ValueError(
            "There is no row to learn from: the mixture plans none, and model.rollout.samples_per_prompt is 0. Set it "
            "to 1 or more, or choose a mixture with rows of its own, such as GoldenMixture."
        )
    own = [row for row, author in enumerate(plan.author) if author == Author.STUDENT]
    keys = row_keys(plan, prompts, own, *key_parts)
    request = Request(prompts.ids, [plan.prompt[row] for row in own], keys, max_new_tokens, stop, len(tokenizer))
    written = engine.generate(model, request, sampler) if own else _nothing(model.device)
    return _assemble(plan, prompts, written, tokenizer, set(stop), model.device)


def _assemble(
    plan: Plan,
    prompts: Prompts,
    written: Completions,
    tokenizer: PreTrainedTokenizerBase,
    stop: set[int],
    device: torch.device,
) -> Rollout:
    lengths = written.lengths.tolist()
    tokens = iter(written.tokens.split(lengths))
    logprobs = iter(written.logprobs.split(lengths))
    reasons = iter(written.finish.tolist())
    rows, behaviour, finish = [], [], []
    for prompt, author in zip(plan.prompt, plan.author, strict=True):
        if author == Author.STUDENT:
            rows.append(next(tokens))
            behaviour.append(next(logprobs))
            finish.append(next(reasons))
        else:
            golden = prompts.golden[prompt] or []
            rows.append(torch.tensor(golden, dtype=torch.long, device=device))
            behaviour.append(torch.zeros(len(golden), dtype=torch.float32, device=device))
            finish.append(int(Finish.STOP if golden and golden[-1] in stop else Finish.LENGTH))
    heads = {index: torch.tensor(prompts.ids[index], device=device) for index in set(plan.prompt)}
    return Rollout(
        tokens=torch.cat(
            [part for prompt, row in zip(plan.prompt, rows, strict=True) for part in (heads[prompt], row)]
        ),
        prompt_lengths=torch.tensor([len(prompts.ids[prompt]) for prompt in plan.prompt], device=device),
        lengths=torch.tensor([len(row) for row in rows], device=device),
        prompt=torch.tensor(plan.prompt, device=device),
        author=torch.tensor(plan.author, device=device),
        finish=torch.tensor(finish, device=device),
        behaviour_logprobs=torch.cat(behaviour),
        texts=tokenizer.batch_decode([row.tolist() for row in rows], skip_special_tokens=True),
    )


def _nothing(device: torch.device) -> Completions:
    def empty(dtype: torch.dtype) -> Tensor:
        return torch.zeros(0, dtype=dtype, device=device)

    return Completions(empty(torch.long), empty(torch.float32), empty(torch.long), empty(torch.long))
