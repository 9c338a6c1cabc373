"""What must hold before anything is timed: both sides compute the same.

On one frozen batch of answers the whole way of a training step is compared, from token ids to gradients: TRL's
``compute_loss`` and our ``training_step``. And our engine must write what ``generate`` writes, token for token.
"""

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed.ours import Settings, make_module, make_trainer
from benchmarks.speed.turns import Job, Turns
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from stable_opd import PromptDataModule, Temperature
from stable_opd.data import Source
from stable_opd.engines import Completions, Request, RolloutEngine
from stable_opd.models import load_model, load_tokenizer, stop_ids
from stable_opd.samplers import Sampler
from stable_opd.types import Finish

#: Largest relative difference of the losses and smallest cosine of the gradients, by dtype.
TOLERANCE = {"float32": (1e-5, 0.9999), "bfloat16": (1e-3, 0.999)}


class Frozen(RolloutEngine):
    """Writes answers that follow from nothing but the request, and remembers the prompts that they answer."""

    def generate(self, model: Any, request: Request, sampler: Sampler) -> Completions:
        """Return random tokens of random lengths; the longest row has the whole budget."""
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, request.max_new_tokens, (len(request.prompt),), generator=generator)
        lengths[0] = request.max_new_tokens
        tokens = torch.randint(2, request.vocabulary or 2, (int(lengths.sum()),), generator=generator)
        self.rows = [
            (list(request.prompts[prompt]), row.tolist())
            for prompt, row in zip(request.prompt, tokens.split(lengths.tolist()), strict=True)
        ]
        finish = torch.full_like(lengths, int(Finish.LENGTH))
        place = model.device
        return Completions(tokens.to(place), torch.zeros(len(tokens)).to(place), lengths.to(place), finish.to(place))


class Keeper(torch.optim.SGD):
    """An optimizer that keeps the gradients and steps nowhere."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep the gradients."""
        self.kept = [parameter.grad.clone() for group in self.param_groups for parameter in group["params"]]


class LossKept(Callback):
    """Remembers the loss of the step."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Remember it."""
        self.loss = float(trainer.callback_metrics["train/loss"])


def our_step(settings: Settings, device: str, engine: Frozen) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of one of our training steps on frozen answers."""
    kept = LossKept()
    module = make_module(settings, engine, Keeper, clip=1e9)
    trainer = make_trainer(device, settings.precision, kept, steps=1)
    trainer.fit(module, PromptDataModule(train=Source(settings.prompts), batch_size=settings.rows // settings.samples))
    names = [name for name, _ in module.model.named_parameters()]
    return kept.loss, dict(zip(names, trainer.optimizers[0].kept, strict=True))  # type: ignore[attr-defined]


def their_step(
    settings: Settings, device: str, rows: list[tuple[list[int], list[int]]]
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of TRL on the same answers, padded as its trainer pads them."""
    from benchmarks.speed.peer import make_trainer as make_peer

    def padded(parts: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        width = max(map(len, parts))
        gaps = [[0] * (width - len(part)) for part in parts]
        ids = [gap + part if left else part + gap for gap, part in zip(gaps, parts, strict=True)]
        ones = [gap + [1] * len(part) if left else [1] * len(part) + gap for gap, part in zip(gaps, parts, strict=True)]
        return torch.tensor(ids, device=device), torch.tensor(ones, device=device)

    prompt_ids, prompt_mask = padded([prompt for prompt, _ in rows], left=True)
    completion_ids, completion_mask = padded([completion for _, completion in rows], left=False)
    with tempfile.TemporaryDirectory() as output:
        trainer = make_peer(settings, device, output)
        trainer.model.train()
        batch = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "num_items_in_batch": completion_mask.sum(),
        }
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return float(loss), {name: each.grad for name, each in trainer.model.named_parameters()}


def cosine(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the cosine of two gradients given by the names of the parameters."""
    mine = torch.cat([ours[name].double().flatten() for name in sorted(ours)])
    other = torch.cat([theirs[name].double().flatten() for name in sorted(ours)])
    return float(mine @ other / (mine.norm() * other.norm()))


@torch.no_grad()
def greedy_rows_that_differ(settings: Settings, device: str) -> int:
    """Return in how many rows our engine's greedy answer is not that of ``generate``."""
    module = make_module(settings, None, torch.optim.SGD)
    model = load_model(settings.student, torch.float32).eval().to(device)
    tokenizer = load_tokenizer(settings.student)
    texts = first_prompts(settings.prompts, settings.rows)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    stop = stop_ids(model, tokenizer)
    rows = list(range(len(prompts)))
    request = Request(prompts, rows, rows, settings.limit, stop, len(tokenizer))
    written = module.engine.generate(model, request, Temperature(0.0))
    ours = [row.tolist() for row in written.tokens.split(written.lengths.tolist())]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(device)
    output: Any = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=settings.limit,
        do_sample=False,
        eos_token_id=stop,
    )
    theirs = output[:, inputs["input_ids"].shape[1] :].tolist()
    return sum(
        row[: len(mine)] != mine or not ends(mine, stop, settings.limit) for row, mine in zip(theirs, ours, strict=True)
    )


def ends(row: list[int], stop: list[int], limit: int) -> bool:
    """Whether an answer ends at its first stop token, or else at the limit."""
    first = next((place + 1 for place, token in enumerate(row) if token in stop), limit)
    return len(row) == first


def first_prompts(path: str, count: int) -> list[str]:
    """Return the first prompts of a file."""
    with Path(path).open(encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in islice(lines, count)]


def compare(job: Job, turns: Turns) -> None:
    """Report what was found, and whether it is within the tolerance."""
    settings = Settings(**job.settings)
    differing = greedy_rows_that_differ(settings, job.device)
    engine = Frozen()
    our_loss, our_gradient = our_step(settings, job.device, engine)
    their_loss, their_gradient = their_step(settings, job.device, engine.rows)
    difference = abs(our_loss - their_loss) / abs(their_loss)
    similarity = cosine(our_gradient, their_gradient)
    largest, smallest = TOLERANCE["float32" if settings.precision == "32-true" else "bfloat16"]
    turns.report(
        {
            "greedy_rows": settings.rows,
            "greedy_rows_that_differ": differing,
            "our_loss": our_loss,
            "their_loss": their_loss,
            "relative_difference": difference,
            "cosine": similarity,
            "passed": differing == 0 and difference <= largest and similarity >= smallest,
        }
    )
