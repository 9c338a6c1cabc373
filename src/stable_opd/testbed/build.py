"""Rebuild the testbed's checkpoints and data from seeds."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stable_opd.tasks.chains import WORDS, Chain, is_runaway

EOS, PAD = "<eos>", "<pad>"
CONTEXT = 160


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer of the task."""
    vocabulary = {word: index for index, word in enumerate([*WORDS, EOS, PAD])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=CONTEXT)


@dataclass(frozen=True)
class Recipe:
    """How one of the testbed's models is made: its size and the documents that it reads."""

    layers: int
    width: int
    heads: int
    steps: int
    mistakes: float
    runaway: float
    problems: int = 0  # 0: fresh problems without end
    batch: int = 64
    lr: float = 3e-3
    seed: int = 0


def make_model(recipe: Recipe) -> LlamaForCausalLM:
    """Return an untrained model of the recipe's size."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=recipe.width,
        intermediate_size=8 * recipe.width // 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=len(WORDS),
        pad_token_id=len(WORDS) + 1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def encode(
    documents: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, context: int
) -> tuple[Tensor, Tensor]:
    """Return token ids (B, T) and labels (B, T) of (prompt, solution) pairs, right padded; the prompt has no label."""
    rows, labels = [], []
    for prompt, solution in documents:
        head, tail = tokenizer.encode(prompt), tokenizer.encode(solution)
        tail = tail if is_runaway(solution) else [*tail, tokenizer.eos_token_id]
        rows.append(torch.tensor((head + tail)[:context]))
        labels.append(torch.tensor(([-100] * len(head) + tail)[:context]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id), pad(
        labels, batch_first=True, padding_value=-100
    )


def train(
    recipe: Recipe, name: str, callback: Callable[[int, LlamaForCausalLM], None] | None = None
) -> LlamaForCausalLM:
    """Train one model from scratch on solutions with mistakes; deterministic given the recipe and the machine."""
    tokenizer, model = make_tokenizer(), make_model(recipe)
    rng = random.Random(recipe.seed)
    pool = [Chain.draw(rng) for _ in range(recipe.problems)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1)
    progress = tqdm(range(recipe.steps), desc=name)
    for step in progress:
        chains = [rng.choice(pool) if pool else Chain.draw(rng) for _ in range(recipe.batch)]
        documents = [(c.prompt, c.solution(rng, recipe.mistakes, recipe.runaway, CONTEXT)) for c in chains]
        ids, labels = encode(documents, tokenizer, CONTEXT)
        logits = model(ids).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if callback:
            callback(step, model)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return model.eval()
