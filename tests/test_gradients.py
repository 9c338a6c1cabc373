"""Norms and cosines of the terms' gradients, against gradients of plain losses on materialised logits."""

import csv
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from helpers import EOS, TOKENIZER, Recorder, make_trainer, problems, save, tiny_model, weights
from stable_opd import (
    GoldenMixture,
    LocalTeacher,
    OPDModule,
    PeriodicSuffix,
    PromptDataModule,
    ReferenceKL,
    ReverseKL,
    TransformersEngine,
)
from stable_opd.gradients import compare_gradients
from stable_opd.models import load_model
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.sources import Source

RATE = 0.1


def test_norms_and_cosines_by_hand():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    gradients = {"a": [[3.0, 0.0], [4.0]], "b": [[0.0, 5.0], [12.0]], "none": [[0.0, 0.0], [0.0]]}

    def backward(name):
        for parameter, gradient in zip(parameters, gradients[name], strict=False):
            parameter.grad = torch.tensor(gradient)

    found = {name: value.item() for name, value in compare_gradients(list(gradients), backward, parameters).items()}
    nans = {name for name, value in found.items() if value != value}
    assert nans == {"gradient_cosine/a/none", "gradient_cosine/b/none"}
    assert {name: found[name] for name in found.keys() - nans} == pytest.approx(
        {"gradient_norm/a": 5, "gradient_norm/b": 13, "gradient_norm/none": 0, "gradient_cosine/a/b": 48 / 65}
    )
    assert [parameter.grad for parameter in parameters] == [None] * 3


class _Keeping(TransformersEngine):
    """Keeps what it wrote, step by step."""

    def __init__(self):
        self.written = []

    def generate(self, model, request, sampler):
        self.written.append((request, super().generate(model, request, sampler)))
        return self.written[-1][1]


class Snapshots(Recorder):
    """Keeps the weights after every step, and whether a gradient was left behind."""

    def __init__(self):
        super().__init__()
        self.weights, self.left, self.compared = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        super().on_train_batch_end(trainer)
        self.weights.append(weights(pl_module))
        self.compared.append("train/gradient_norm/anchor" in pl_module.report.figures)
        self.left += [name for name, each in pl_module.model.named_parameters() if each.grad is not None]


@pytest.fixture
def fit(student_path, teacher_path, train_path):
    """Train for two steps on the same data, comparing every so many steps."""

    def fit(every, micro_batch_tokens=16_384, student=student_path, max_steps=2, **options):
        engine, recorder = _Keeping(), Snapshots()
        module = OPDModule(
            student,
            LocalTeacher(teacher_path),
            ReverseKL(),
            GoldenMixture(0.7),
            PeriodicSuffix(4, 3, 3),
            {"anchor": ReferenceKL(0.5)},
            engine=engine,
            optimizer=partial(torch.optim.SGD, lr=RATE),
            rollout=RolloutOptions(samples_per_prompt=2, max_new_tokens=10),
            update=UpdateOptions(
                gradient_clip=1e9, micro_batch_tokens=micro_batch_tokens, compare_gradients_every=every
            ),
        )
        source = PromptDataModule(Source(train_path), batch_size=24)
        make_trainer(recorder, max_steps=max_steps, **options).fit(module, datamodule=source)
        return recorder, engine

    return fit


def plain_gradients(model, reference, teacher, engine):
    """Gradient of each term's loss in the second step, by autograd on materialised logits."""
    request, completions = engine.written[1]

    def logits(scorer, prompt, row):
        return scorer(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

    losses = {"divergence": [], "anchor": [], "mixture": []}
    for row, number in zip(completions.tokens.split(completions.lengths.tolist()), request.prompt, strict=True):
        prompt, row = list(request.prompts[number]), row.tolist()
        p = logits(model, prompt, row)
        with torch.no_grad():
            q, p0 = logits(teacher, prompt, row), logits(reference, prompt, row)
        losses["divergence"].append(F.kl_div(q, p, reduction="none", log_target=True).sum(1).mean())
        losses["anchor"].append(0.5 * F.kl_div(p0, p, reduction="none", log_target=True).sum(1).mean())
    for record in problems(24):
        prompt, golden = TOKENIZER.encode(record["prompt"]), [*TOKENIZER.encode(record["golden"]), EOS]
        losses["mixture"].append(0.7 * F.nll_loss(logits(model, prompt, golden), torch.tensor(golden)))
    gradients = {}
    for name, rows in losses.items():
        found = torch.autograd.grad(torch.stack(rows).mean(), list(model.parameters()), retain_graph=True)
        gradients[name] = torch.cat([each.flatten() for each in found])
    return gradients


@pytest.mark.parametrize("micro_batch_tokens", [100, 16_384])
def test_comparison_in_training_equals_plain_autograd(micro_batch_tokens, fit):
    """In the second step, in which the student has left its reference; all problems are in every batch."""
    recorder, engine = fit(1, micro_batch_tokens)
    model = tiny_model(1)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(recorder.weights[0][name])
    gradients = plain_gradients(model, tiny_model(1), tiny_model(2), engine)
    expected = {f"train/gradient_norm/{name}": each.norm().item() for name, each in gradients.items()}
    for one, other in (("divergence", "anchor"), ("divergence", "mixture"), ("anchor", "mixture")):
        cosine = F.cosine_similarity(gradients[one], gradients[other], 0).item()
        expected[f"train/gradient_cosine/{one}/{other}"] = cosine
    found = {name: value for name, value in recorder.steps[1].items() if "gradient_" in name}
    assert found == pytest.approx(expected, rel=2e-3, abs=2e-4)
    assert min(abs(value) for value in expected.values()) > 0.01
    assert recorder.steps[1]["train/grad_norm"] == pytest.approx(sum(gradients.values()).norm().item(), rel=1e-3)
    assert recorder.left == []


@pytest.mark.parametrize("micro_batch_tokens", [100, 16_384])
def test_the_step_is_the_same_whether_terms_are_compared_or_not(micro_batch_tokens, fit, tmp_path):
    """Even for a student with dropout: the comparison meets the random numbers of the step, and takes none."""
    student = save(tiny_model(1, attention_dropout=0.2), tmp_path)
    assert load_model(student, torch.float32).config.attention_dropout == 0.2
    runs = []
    for every in (1, 0, 2):
        torch.manual_seed(3)
        runs.append(fit(every, micro_batch_tokens, student)[0])
    for run in runs[1:]:
        for step in range(2):
            for name, value in runs[0].weights[step].items():
                torch.testing.assert_close(run.weights[step][name], value, rtol=0, atol=0)
    assert [run.compared for run in runs] == [[True, True], [False, False], [False, True]]
    assert [run.left for run in runs] == [[], [], []]


@pytest.mark.filterwarnings("ignore:.*number of training batches")
def test_what_is_compared_reaches_the_loggers(fit, tmp_path):
    """Every second step is compared, and every second one is logged."""
    fit(2, max_steps=4, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "3"]
    assert all(float(row["train/gradient_norm/divergence"]) > 0 for row in rows)
