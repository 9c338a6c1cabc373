"""Rebuild the testbed's checkpoints and data from their seeds."""

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stable_opd.tasks.chains import WORDS, Chain, Writer, is_runaway
from stable_opd.testbed import PLACES

EOS, PAD = "<eos>", "<pad>"
CONTEXT = 112
IGNORE = -100


@dataclass(frozen=True)
class Recipe:
    """How one of the testbed's models is made.

    Attributes:
        layers: Number of blocks.
        width: Hidden width.
        heads: Attention heads, of size 32 each.
        steps: Optimizer steps on batches of 64 fresh problems.
        writer: Who writes the documents that the model reads.
        first_writer: Who writes those of the first steps, when the model is to learn the arithmetic.
        first_steps: How many steps these are.
        seed: Seed of the weights and of the documents.
    """

    layers: int
    width: int
    heads: int
    steps: int
    writer: Writer
    first_writer: Writer
    first_steps: int
    seed: int = 0


LEARNER = Writer(mistakes=0.05, flagged=0.4)
TEACHER = Recipe(3, 96, 3, 2000, Writer(mistakes=0.25, flagged=0.3, runaway=0.4), LEARNER, first_steps=800)
RECIPES = {
    "teacher": TEACHER,
    # The control is the same in all but the runaway documents: there the writer goes on.
    "control": replace(TEACHER, writer=replace(TEACHER.writer, runaway=0.0)),
    "student": Recipe(2, 48, 2, 350, Writer(mistakes=0.06, flagged=0.5, stutter=0.03), LEARNER, first_steps=0),
}
TRAINING_PROBLEMS, VALIDATION_PROBLEMS = 100, 256


def make_tokenizer(eos: str = EOS, pad: str = PAD) -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer of the task."""
    vocabulary = {word: index for index, word in enumerate([*WORDS, EOS, PAD])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, model_max_length=CONTEXT)


def make_model(layers: int, width: int, heads: int, seed: int) -> LlamaForCausalLM:
    """Return an untrained model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,  # what the CPU kernels of inference servers support
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=len(WORDS),
        pad_token_id=len(WORDS) + 1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def encode(documents: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Return token ids (B, T) and labels (B, T) of (prompt, solution) pairs; prompts and padding have no label."""
    rows, labels = [], []
    for prompt, solution in documents:
        head, tail = tokenizer.encode(prompt), tokenizer.encode(solution)
        tail = tail if is_runaway(solution) else [*tail, tokenizer.eos_token_id]
        rows.append(torch.tensor((head + tail)[:CONTEXT]))
        labels.append(torch.tensor(([IGNORE] * len(head) + tail)[:CONTEXT]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id), pad(labels, True, IGNORE)


def train(recipe: Recipe, name: str) -> LlamaForCausalLM:
    """Train one model from scratch; the same recipe gives the same model on the same machine."""
    tokenizer = make_tokenizer()
    model = make_model(recipe.layers, recipe.width, recipe.heads, recipe.seed)
    model.train()
    rng = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=recipe.steps, pct_start=0.1)
    progress = tqdm(range(recipe.steps), desc=name)
    for step in progress:
        writer = recipe.first_writer if step < recipe.first_steps else recipe.writer
        chains = [Chain.draw(rng) for _ in range(64)]
        words = rng.randrange(40, 103)  # of different length, so that no position means the end
        documents = [(chain.prompt, writer.solve(chain, rng, words)) for chain in chains]
        optimizer.zero_grad()
        loss = _backward(model, documents, tokenizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss:.4f}")
    return model


@torch.no_grad()
def with_other_stop(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return the same model, but that it ends its answers with the entry of the vocabulary that no text has.

    Stop token and padding change places, in the (tied) embedding and in the config. So it is with real pairs: a base
    model ends its texts with the token with which the chat model that came of it pads.
    """
    other = copy.deepcopy(model)
    stop, unused = model.config.eos_token_id, model.config.pad_token_id
    weight: Tensor = other.model.embed_tokens.weight
    weight[[stop, unused]] = weight[[unused, stop]]
    for config in (other.config, other.generation_config):
        config.eos_token_id, config.pad_token_id = unused, stop
    return other


def _backward(
    model: LlamaForCausalLM, documents: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast
) -> float:
    """Add the gradient of the mean cross-entropy over all tokens; long documents go apart, for less padding."""
    halves = [[each for each in documents if is_runaway(each[1]) == long] for long in (False, True)]
    batches = [encode(half, tokenizer) for half in halves if half]
    count = sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in batches)
    total = 0.0
    for ids, labels in batches:
        logits = model(ids).logits[:, :-1].float()
        loss = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum() / count
        loss.backward()
        total += loss.item()
    return total


def problems(seed: int = 1) -> dict[str, list[Chain]]:
    """Return the fixed problems to validate and to train on; no problem is in both."""
    rng = random.Random(seed)
    drawn = dict.fromkeys(Chain.draw(rng) for _ in range(2 * (TRAINING_PROBLEMS + VALIDATION_PROBLEMS)))
    chains = list(drawn)[: TRAINING_PROBLEMS + VALIDATION_PROBLEMS]
    return {"validation": chains[:VALIDATION_PROBLEMS], "train": chains[VALIDATION_PROBLEMS:]}


def build(out: str) -> None:
    """Write all models and data of the testbed into a folder."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, chains in problems().items():
        rows = [{"prompt": each.prompt, "golden": each.golden, "answer": each.answer} for each in chains]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / PLACES[name].name).write_text(text, encoding="utf-8")
    trained = {}
    for name, recipe in RECIPES.items():
        trained[name] = train(recipe, name)
        trained[name].save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    other = folder / PLACES["student-other-stop"].name
    with_other_stop(trained["student"]).save_pretrained(other)
    make_tokenizer(PAD, EOS).save_pretrained(other)
    print(f"The testbed is in {folder}")
