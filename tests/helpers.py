"""What several tests build: tiny real models, data files, rollouts and evidence written by hand."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stable_opd import Author, Evidence, Finish, OPDModule, Rollout, Scores, TokenLoss
from stable_opd.tasks.chains import Chain
from stable_opd.testbed.build import make_tokenizer

TOKENIZER = make_tokenizer()
VOCABULARY = len(TOKENIZER)
EOS = TOKENIZER.eos_token_id


def tiny_model(seed: int, **overrides) -> LlamaForCausalLM:
    """A random Llama whose distributions are far from uniform, so that a wrong position or token shows."""
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 96,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": TOKENIZER.pad_token_id,
        "tie_word_embeddings": True,
    } | overrides
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def save(model: LlamaForCausalLM, path: Path) -> str:
    """Write a model with its tokenizer into a folder, and return the folder."""
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


def problems(count: int, seed: int = 0, lengths: Sequence[int] = (1, 2, 3)) -> list[dict[str, str]]:
    """Examples of the task with prompts of several lengths."""
    rng = random.Random(seed)
    chains = [Chain.draw(rng, rng.choice(lengths)) for _ in range(count)]
    return [{"prompt": chain.prompt, "golden": chain.golden, "answer": chain.answer} for chain in chains]


def write_jsonl(path: Path, records: Sequence[Mapping[str, object]]) -> str:
    """Write one JSON object per line, and return the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def make_rollout(
    completions: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]] | None = None,
    authors: Sequence[Author] | None = None,
    finish: Sequence[Finish] | None = None,
    behaviour: Tensor | None = None,
    texts: Sequence[str] | None = None,
    token_authors: Tensor | None = None,
    fields: Sequence[Mapping[str, object]] | None = None,
) -> Rollout:
    """Pack rows given as lists."""
    count = len(completions)
    prompts = prompts or [[1]] * count
    lengths = torch.tensor([len(row) for row in completions], dtype=torch.long)
    author = torch.tensor([int(author) for author in authors or [Author.STUDENT] * count], dtype=torch.long)
    flat = [token for prompt, row in zip(prompts, completions, strict=True) for token in (*prompt, *row)]
    return Rollout(
        tokens=torch.tensor(flat, dtype=torch.long),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long),
        lengths=lengths,
        prompt=torch.arange(count),
        author=author,
        token_author=author.repeat_interleave(lengths) if token_authors is None else token_authors,
        finish=torch.tensor([int(reason) for reason in finish or [Finish.LENGTH] * count]),
        behaviour_logprobs=torch.zeros(int(lengths.sum())) if behaviour is None else behaviour,
        texts=list(texts) if texts is not None else [" ".join(map(str, row)) for row in completions],
        fields=list(fields) if fields is not None else [{}] * count,
    )


def make_evidence(
    tokens: Tensor,
    student: Tensor | None = None,
    teacher: Tensor | None = None,
    reference: Tensor | None = None,
    author: Author | Tensor = Author.STUDENT,
    behaviour: Tensor | None = None,
    progress: float = 0.0,
    in_loop: Tensor | None = None,
    stop: tuple[int, ...] = (0, 3),
) -> Evidence:
    """Evidence on positions of one row, from the models' log-probs over the vocabulary, each (n, V)."""
    n = len(tokens)

    def scores(logprobs: Tensor | None) -> Scores:
        if logprobs is None:
            return Scores()
        return Scores(logprobs.gather(-1, tokens[:, None]).squeeze(-1), logprobs)

    return Evidence(
        tokens=tokens,
        row=torch.zeros(n, dtype=torch.long),
        position=torch.arange(n),
        in_loop=torch.zeros(n, dtype=torch.bool) if in_loop is None else in_loop,
        author=author if isinstance(author, Tensor) else torch.full((n,), int(author)),
        behaviour_logprobs=torch.zeros(n) if behaviour is None else behaviour,
        progress=progress,
        stop=stop,
        student=scores(student),
        teacher=scores(teacher),
        reference=scores(reference),
    )


def closed_form(term, evidence: Evidence) -> tuple[TokenLoss, Tensor]:
    """Losses and gradients in the logits of a term that knows them; the memory holds rubbish before."""
    gradient = torch.full_like(evidence.student.logprobs, torch.nan)
    loss = term.closed_form(evidence, gradient)
    assert loss is not None
    return loss, gradient


def chi_square_limit(degrees: int) -> float:
    """What a right sampler exceeds with probability 1e-4, by the approximation of Wilson and Hilferty."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3


def total_of_one_process(count: Tensor) -> Tensor:
    """The sum over all processes where there is one."""
    return count


def naive_repeated(row: list[int], max_period: int, min_copies: int, min_tokens: int) -> int:
    """Try every suffix with every period: the definition, word for word."""
    best = 0
    for period in range(1, max_period + 1):
        for start in range(len(row)):
            suffix = row[start:]
            periodic = all(suffix[place] == suffix[place - period] for place in range(period, len(suffix)))
            if periodic and len(suffix) >= min_copies * period and len(suffix) >= min_tokens:
                best = max(best, len(suffix) - period)
    return best


class Recorder(Callback):
    """Keeps what was logged in every step, and at every evaluation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.steps.append({name: float(value) for name, value in trainer.logged_metrics.items()})

    def on_validation_end(self, trainer, *_) -> None:
        self.evaluations.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def make_trainer(*callbacks: Callback, **options) -> Trainer:
    """A trainer that leaves nothing behind."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return Trainer(**quiet | options, callbacks=list(callbacks))


def weights(module: OPDModule) -> dict[str, Tensor]:
    """The student's weights, detached from what happens next."""
    return {name: tensor.detach().clone() for name, tensor in module.model.named_parameters()}
