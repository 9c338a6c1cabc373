"""The whole recipe with models of the families that people bring, from folders, as a user would run it."""

import math

import pytest
import torch

from families import family_model
from helpers import EOS, TOKENIZER, VOCABULARY, Recorder, make_trainer, save
from stable_opd import (
    Author,
    GoldenMixture,
    LocalTeacher,
    OPDModule,
    PeriodicSuffix,
    PromptDataModule,
    ReferenceKL,
    ReverseKL,
    Temperature,
)
from stable_opd.mixtures.student import student_rows
from stable_opd.models import load_model
from stable_opd.options import RolloutOptions
from stable_opd.sources import Source

LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
#: Vocabularies are padded, to another size in the teacher, as within Qwen2.5.
FAMILIES = {
    "Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Llama 3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "Gemma 3": ("gemma3_text", {}),
    "Mistral": ("mistral", {}),
}


def logprobs_of(model, vocabulary, rollout, row):
    """Log-probs over the tokenizer's vocabulary of a row's tokens, by transformers alone."""
    one = rollout.select(torch.tensor([row]))
    with torch.no_grad():
        logits = model(one.tokens[None]).logits[0, :, :vocabulary]
    return logits.log_softmax(-1)[int(one.prompt_lengths) - 1 : -1]


@pytest.mark.parametrize(("family", "overrides"), FAMILIES.values(), ids=FAMILIES)
def test_a_family_runs_the_whole_recipe(family, overrides, tmp_path, train_path):
    sizes = {"eos_token_id": EOS, "pad_token_id": TOKENIZER.pad_token_id, "initializer_range": 0.1} | overrides
    student, teacher = (
        save(family_model(family, seed, vocab_size=VOCABULARY + padding, **sizes), tmp_path / str(seed))
        for seed, padding in ((1, 4), (2, 12))
    )
    module = OPDModule(
        student,
        LocalTeacher(teacher),
        ReverseKL(),
        GoldenMixture(),
        PeriodicSuffix(),
        constraints={"anchor": ReferenceKL(0.1)},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        rollout=RolloutOptions(samples_per_prompt=2, max_new_tokens=8),
    )
    recorder, rollouts, write = Recorder(), [], module.write
    module.write = lambda *args, **options: rollouts.append(write(*args, **options)) or rollouts[-1]
    data = PromptDataModule(Source(train_path), batch_size=4)
    make_trainer(recorder, max_steps=3).fit(module, data)
    assert all(math.isfinite(step["train/loss"]) for step in recorder.steps)
    assert recorder.steps[0]["train/value/anchor"] == pytest.approx(0, abs=1e-5)
    assert recorder.steps[2]["train/value/anchor"] > 1e-4

    first, (initial, theirs) = rollouts[0], (load_model(path).eval() for path in (student, teacher))
    values, behaviour = [], []
    for row in first.written_by(Author.STUDENT).tolist():
        p, q = (logprobs_of(model, len(module.tokenizer), first, row) for model in (initial, theirs))
        values.append((p.exp() * (p - q)).sum(-1).mean())
        behaviour.append(p.gather(-1, first.select(torch.tensor([row])).completion[:, None]).squeeze(-1))
    assert recorder.steps[0]["train/value/divergence"] == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)
    drawn = first.behaviour_logprobs[first.token_author == Author.STUDENT]
    torch.testing.assert_close(drawn, torch.cat(behaviour), rtol=1e-4, atol=1e-4)

    nameless = list(range(len(module.tokenizer), VOCABULARY + 4))  # rows of the output layer that no token has
    batch = next(iter(data.train_dataloader()))
    answers = write(batch, student_rows(batch, 1), Temperature(0.0), "test")
    for row, ids in enumerate(batch.ids):
        one = torch.tensor([list(ids)])
        generated = module.model.generate(
            one, attention_mask=torch.ones_like(one), do_sample=False, max_new_tokens=8, suppress_tokens=nameless
        )
        assert answers.select(torch.tensor([row])).tokens.tolist() == generated[0].tolist()
