"""The sampled divergence against exact enumeration over small vocabularies."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml

from helpers import make_evidence
from stable_opd import ReverseKL, SampledReverseKL
from stable_opd.cli import main
from stable_opd.divergences.estimators import estimator
from stable_opd.divergences.kl import reverse_kl
from stable_opd.divergences.sampled import EstimatedReverseKL


def tables(vocabulary, states, seed=0):
    """Logits of student (a leaf) and teacher in each of some states, (states, V) float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, states, vocabulary, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def test_value_is_an_unbiased_estimate_of_the_exact_divergence():
    student, teacher = tables(vocabulary=6, states=1)
    tokens = torch.arange(6)
    p, q = (table.detach().log_softmax(-1).expand(6, 6) for table in (student, teacher))
    value = SampledReverseKL()(make_evidence(tokens, p, q, behaviour=p[0])).value
    torch.testing.assert_close((p[0].exp() * value).sum(), reverse_kl(p[0], q[0]))


def test_expected_gradient_over_all_tokens_is_the_exact_gradient():
    student, teacher = tables(vocabulary=6, states=1)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    (exact,) = torch.autograd.grad(reverse_kl(p, q).sum(), student, retain_graph=True)
    everything = make_evidence(torch.arange(6), p.expand(6, 6), q.expand(6, 6), behaviour=p[0].detach())
    expected_loss = (p[0].detach().exp() * SampledReverseKL()(everything).loss).sum()
    (sampled,) = torch.autograd.grad(expected_loss, student)
    torch.testing.assert_close(sampled, exact)
    assert exact.norm() > 0.1


def test_expected_gradient_over_all_answers_is_that_of_the_exact_divergence_at_the_visited_states():
    """Answers of two tokens over three words: state 0 is the start, state 1 + v the answer that began with v.

    No return-to-go: the gradient takes the states as they come, as `ReverseKL` does.
    """
    words = 3
    student, teacher = tables(words, 1 + words)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    sampled, exact = 0.0, 0.0
    for answer in itertools.product(range(words), repeat=2):
        states, tokens = torch.tensor([0, 1 + answer[0]]), torch.tensor(answer)
        drawn = p[states].detach().gather(1, tokens[:, None]).squeeze(1)
        probability = drawn.sum().exp()
        evidence = make_evidence(tokens, p[states], q[states], behaviour=drawn)
        sampled = sampled + probability * SampledReverseKL()(evidence).loss.sum()
        exact = exact + probability * ReverseKL()(evidence).loss.sum()
    (sampled_gradient,) = torch.autograd.grad(sampled, student, retain_graph=True)
    (exact_gradient,) = torch.autograd.grad(exact, student)
    torch.testing.assert_close(sampled_gradient, exact_gradient)


def test_importance_ratio_corrects_for_another_behaviour():
    """Tokens drawn by somebody else: unclipped, the expectation is still the exact gradient."""
    student, teacher = tables(vocabulary=5, states=1)
    behaviour = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    (exact,) = torch.autograd.grad(reverse_kl(p, q).sum(), student, retain_graph=True)
    evidence = make_evidence(torch.arange(5), p.expand(5, 5), q.expand(5, 5), behaviour=behaviour)
    loss = (behaviour.exp() * SampledReverseKL(clip=None)(evidence).loss).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], exact)


def test_equal_models_give_zero_loss_and_zero_gradient():
    student, _ = tables(vocabulary=6, states=4)
    p = student.log_softmax(-1)
    tokens = torch.tensor([0, 2, 4, 5])
    behaviour = p.detach().gather(1, tokens[:, None]).squeeze(1)
    term = SampledReverseKL()(make_evidence(tokens, p, p.detach(), behaviour=behaviour))
    assert term.loss.abs().max() == 0
    assert term.value.abs().max() == 0
    assert torch.autograd.grad(term.loss.sum(), student)[0].abs().max() == 0


def test_bfloat16_within_its_tolerance():
    student, teacher = tables(vocabulary=6, states=4)
    p, q = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    tokens = torch.tensor([0, 2, 4, 5])
    behaviour = p.gather(1, tokens[:, None]).squeeze(1)
    exact = SampledReverseKL()(make_evidence(tokens, p, q, behaviour=behaviour)).loss
    low = make_evidence(tokens, p.bfloat16(), q.bfloat16(), behaviour=behaviour.bfloat16())
    rounded = SampledReverseKL()(low).loss.double()
    assert ((rounded - exact).abs() <= 0.03 * (1 + exact.abs())).all()


def one_token(words=6, seed=1, scale=1.0):
    """Logits at one state, with the log-probs of each word under student, teacher and somebody else."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher, other = scale * torch.randn(3, words, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    return student, *(each.log_softmax(-1) for each in (student, teacher, other))


def forward_kl(p, q):
    return reverse_kl(q, p)


LOSSES = {"k2": reverse_kl, "k4": reverse_kl, "k3pp": reverse_kl, "k5": forward_kl}


@pytest.mark.parametrize("on_policy", [True, False], ids=["on policy", "drawn by another"])
@pytest.mark.parametrize(("name", "divergence"), LOSSES.items())
def test_estimator_descends_its_divergence(name, divergence, on_policy):
    logits, p, q, other = one_token()
    drawn = p.detach() if on_policy else other
    loss, value = estimator(name)(p, q, drawn)
    (found,) = torch.autograd.grad((drawn.exp() * loss).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(divergence(p, q), logits)
    torch.testing.assert_close(found, expected)
    if name != "k2":
        torch.testing.assert_close((p.detach().exp() * value).sum(), divergence(p, q).detach())
    assert not value.requires_grad


def test_estimators_token_by_token():
    """Worked out from the table of their gradients: d loss / d log p is -log r for k4 and k3++, 1 - r for k5."""
    student = torch.tensor([-1.0, -0.5, -2.0, -1.5], dtype=torch.float64).requires_grad_()
    teacher = torch.tensor([-2.0, -0.5, -0.3, -1.4], dtype=torch.float64)
    log_r = teacher - student.detach()
    r = log_r.exp()
    expected = {
        "k2": (log_r**2 / 2, log_r**2 / 2, -log_r),
        "k4": (-log_r, -log_r, -log_r),
        "k3pp": (r - 1 - log_r, r - 1 - log_r, -log_r),
        "k5": (r * log_r, r * log_r, 1 - r),
    }
    for name, (loss, value, slope) in expected.items():
        found = estimator(name)(student, teacher, student.detach())
        (gradient,) = torch.autograd.grad(found[0].sum(), student)
        torch.testing.assert_close(found[0].detach(), loss, msg=name)
        torch.testing.assert_close(found[1], value, msg=name)
        torch.testing.assert_close(gradient, slope, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_estimator_at_extremes_is_finite_and_still_pulls(name, dtype):
    student = torch.tensor([-1e4, 0.0, -1e-3, -1e4, -30.0], dtype=dtype).requires_grad_()
    teacher = torch.tensor([0.0, -1e4, -float("inf"), -1e4, -1.0], dtype=dtype)
    for behaviour in (student.detach(), torch.full((5,), -1e4, dtype=dtype)):
        loss, value = estimator(name)(student, teacher, behaviour)
        (slope,) = torch.autograd.grad(loss.sum(), student)
        assert all(each.isfinite().all() for each in (loss, value, slope))
    slope = torch.autograd.grad(estimator(name)(student, teacher, student.detach())[0].sum(), student)[0]
    assert slope[0] < 0  # towards what the teacher likes
    assert slope[1] > 0  # away from what it rules out
    assert slope[4] < 0
    if name != "k5":
        assert slope[[0, 1, 2, 4]].abs().tolist() == [20, 20, 20, 20]


REFUSED = {
    "k1": "'k1'. .*gradient of log p, whose mean is zero.*teacher does not occur. Use k4",
    "k3": "'k3'. .*gradient of the forward KL.*Use k3pp .*k5 or ForwardKL",
    "stop_gradient": "'stop_gradient'. .*-u log u.*no divergence.*Use SampledForwardKL",
    "k6": "out of k2, k3pp, k4, k5, but got 'k6'",
}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_losses_that_do_not_descend_what_they_measure_are_refused_with_the_reason(name, reason):
    for refuse in (estimator, EstimatedReverseKL):
        with pytest.raises(ValueError, match=reason):
            refuse(name)


def test_refusals_are_right_about_the_gradients():
    logits, p, q, _ = one_token()
    weight, log_r = p.detach().exp(), q - p

    def mean(loss):
        return torch.autograd.grad((weight * loss).sum(), logits, retain_graph=True)[0]

    exact, forward = (
        torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (reverse_kl(p, q), forward_kl(p, q))
    )
    assert mean(-log_r).abs().max() < 1e-12
    torch.testing.assert_close(mean(log_r.exp() - 1 - log_r), forward)
    stopped = mean((log_r.exp() * log_r).detach() * p)
    assert all((stopped - other).norm() > 0.1 * other.norm() for other in (exact, forward))


def test_forward_estimator_is_no_reverse_kl():
    with pytest.raises(ValueError, match=r"'k5', which descends the forward KL\. Use SampledForwardKL"):
        EstimatedReverseKL("k5")


@pytest.mark.parametrize("name", ["k2", "k4", "k3pp"])
def test_estimated_reverse_kl_is_the_estimator(name):
    student, teacher = tables(vocabulary=6, states=4)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    author = torch.tensor([0, 1, 0, 2])
    evidence = make_evidence(torch.tensor([0, 2, 4, 5]), p, q, behaviour=p.detach()[:, 1], author=author)
    term = EstimatedReverseKL(name)(evidence)
    loss, value = estimator(name)(evidence.student.sampled, evidence.teacher.sampled, evidence.behaviour_logprobs)
    torch.testing.assert_close(term.loss, loss)
    torch.testing.assert_close(term.value, value)
    assert term.where.tolist() == [True, False, True, False]


COMPOSED = {
    "class_path": "SampledReverseKL",
    "init_args": {
        "clip": None,
        "transform": {"class_path": "ClipAdvantage", "init_args": {"limit": 0.5}},
        "baseline": "ExactBaseline",
    },
}


@pytest.fixture
def resolved(tmp_path, monkeypatch, capsys):
    """What the command line makes of a divergence."""
    monkeypatch.chdir(tmp_path)

    def resolved(divergence, *flags):
        config = {
            "model": {
                "student": "nowhere",
                "teacher": {"class_path": "LocalTeacher", "init_args": {"path": "nowhere"}},
                "divergence": divergence,
                "mixture": "StudentOnly",
                "repetition": "PeriodicSuffix",
            },
            "data": {"class_path": "PromptDataModule", "init_args": {"train": {"path": "nowhere.jsonl"}}},
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(SystemExit) as done:
            main(["fit", "-c", "recipe.yaml", *flags, "--print_config"])
        assert done.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)["model"]["divergence"]

    return resolved


def names(divergence):
    """The class names, without their modules."""
    if isinstance(divergence, dict):
        return {
            key: value.rpartition(".")[2] if key == "class_path" else names(value) for key, value in divergence.items()
        }
    return divergence


def test_composed_divergence_is_understood_and_read_back(resolved):
    found = resolved(COMPOSED)
    expected = {"clip": None, "dual_clip": None, "discount": 0.0, "baseline": {"class_path": "ExactBaseline"}}
    expected["transform"] = {"class_path": "ClipAdvantage", "init_args": {"limit": 0.5}}
    assert names(found) == {"class_path": "SampledReverseKL", "init_args": expected}
    assert resolved(found) == found


def test_parts_are_chosen_by_flags_too(resolved):
    found = resolved(
        "ReverseKL",
        *("--model.divergence", "SampledReverseKL", "--model.divergence.discount", "1.0"),
        *("--model.divergence.transform", "TanhAdvantage", "--model.divergence.transform.scale", "2.0"),
    )
    assert found["init_args"]["discount"] == 1.0
    assert found["init_args"]["transform"]["init_args"] == {"scale": 2.0}


def test_list_shows_the_common_arguments(capsys):
    main(["list", "divergence", "SampledReverseKL"])
    printed = capsys.readouterr().out
    for argument in ("clip", "dual_clip", "transform", "baseline", "discount"):
        assert f"{argument}: " in printed.partition("\n")[0]
        assert f"\n  {argument}: " in printed  # with what it means


def test_list_shows_the_parts(capsys):
    for kind, members in {"transform": 4, "baseline": 2}.items():
        main(["list", kind])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{kind}:"
        assert len(lines) >= 1 + members
        assert all(line.endswith(".") for line in lines[1:])
