"""A second model that has a say in every token, against plain forwards of both."""

from functools import partial

import pytest
import torch

from families import family_model
from helpers import EOS, VOCABULARY, chi_square_limit, tiny_model
from stable_opd import Finish, InProcessEngine, Sampler, Temperature, TopP, TransformersEngine
from stable_opd.engines import in_process
from stable_opd.engines.base import Blend
from stable_opd.mixtures import mixed, speculative
from stable_opd.randomness import key
from writing import BUDGET, PROMPTS, assert_equal_completions, make_request, rows

ENGINES = {"in process": InProcessEngine, "transformers": TransformersEngine}
MIXES = {"mixed": partial(mixed, share=0.4), "speculative": partial(speculative, k=3)}
ROWS = [2, 0, 1, 0, 3] * 3


def wide(seed=2, **options):
    """A teacher of another width and depth than the student."""
    return tiny_model(
        seed, hidden_size=48, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=3, **options
    )


@pytest.fixture(params=ENGINES.values(), ids=ENGINES.keys())
def engine(request):
    return request.param()


@pytest.fixture(scope="module")
def student():
    return tiny_model(1)


@pytest.fixture(scope="module")
def teacher():
    return wide()


def full_logits(model, prompt, row, vocabulary=None):
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *row]])).logits[0, len(prompt) - 1 : -1, :vocabulary].float()


def assert_drawn_from(mix, completions, student, teacher, sampler, prompt, vocabulary=None):
    """Hold the log-probs that were captured while writing against forwards of both models over the whole text."""
    captured = completions.logprobs.split(completions.lengths.tolist())
    for number, row, found in zip(prompt, rows(completions), captured, strict=True):
        ours, theirs = (full_logits(model, PROMPTS[number], row, vocabulary) for model in (student, teacher))
        ours = torch.cat([sampler(ours[step : step + 1], torch.tensor([row[:step]])) for step in range(len(row))])
        expected = mix(ours, theirs).log_softmax(-1)[torch.arange(len(row)), row]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("sampler", [Temperature(1.0), Temperature(0.6), TopP(0.7)], ids=["t1", "t0.6", "top-p"])
@pytest.mark.parametrize("stop", [(7, 11), ()], ids=["rows end at different steps", "none ends"])
def test_log_probs_are_those_of_the_blend_at_every_step(mix, sampler, stop, engine, student, teacher):
    completions = engine.generate(student, make_request(ROWS, stop=stop), sampler, Blend(teacher, mix))
    assert_drawn_from(mix, completions, student, teacher, sampler, ROWS)
    assert (len(set(completions.lengths.tolist())) > 4) == bool(stop)
    assert not completions.logprobs.is_inference()


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_both_engines_write_the_same(mix, student, teacher):
    request, blend = make_request(ROWS, stop=(7, 11)), Blend(teacher, mix)
    found, expected = (make().generate(student, request, TopP(0.9), blend) for make in ENGINES.values())
    assert_equal_completions(found, expected)
    assert set(found.finish.tolist()) == {Finish.STOP, Finish.LENGTH}


def test_row_does_not_depend_on_what_else_is_in_the_batch(engine, student, teacher):
    blend = Blend(teacher, MIXES["mixed"])
    together = engine.generate(student, make_request(ROWS, stop=(7, 11)), Temperature(1.0), blend)
    for row, text in enumerate(rows(together)):
        request = make_request(ROWS[row : row + 1], stop=(7, 11), keys=[key("test", row)])
        assert rows(engine.generate(student, request, Temperature(1.0), blend)) == [text]


@pytest.mark.parametrize(("share", "whose"), [(0.0, "student"), (1.0, "teacher")])
def test_limits_are_what_either_writes_alone(share, whose, engine, student, teacher):
    request = make_request(ROWS, stop=(7, 11))
    found = engine.generate(student, request, Temperature(1.0), Blend(teacher, partial(mixed, share=share)))
    alone = engine.generate({"student": student, "teacher": teacher}[whose], request, Temperature(1.0))
    assert_equal_completions(found, alone)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_tokens_follow_the_blend(mix, engine, student, teacher):
    """First tokens, and second ones whose distribution is enumerated over all first ones."""
    count, prompt = 4000, PROMPTS[0]
    request = make_request([0] * count, 2, (), [key("chi", number) for number in range(count)])
    tokens = engine.generate(student, request, Temperature(2.0), Blend(teacher, mix)).tokens.view(count, 2)
    with torch.no_grad():
        first = mix(*_heated(student, teacher, torch.tensor([prompt]))).softmax(-1)[0]
        longer = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
        second = first @ mix(*_heated(student, teacher, longer)).softmax(-1)
    for column, expected in enumerate((first * count, second * count)):
        seen = expected > 1  # a token that is hardly ever drawn follows no chi-square
        observed = tokens[:, column].bincount(minlength=VOCABULARY)
        statistic = ((observed - expected) ** 2 / expected)[seen].sum()
        assert statistic < chi_square_limit(int(seen.sum()) - 1)
        assert int(observed[~seen].sum()) < 30


def _heated(student, teacher, ids):
    return student(ids).logits[:, -1] / 2, teacher(ids).logits[:, -1]


def test_teacher_padded_to_a_larger_vocabulary(engine, student):
    padded, mix = wide(vocab_size=VOCABULARY + 40), MIXES["mixed"]
    request = make_request(ROWS, vocabulary=VOCABULARY)
    completions = engine.generate(student, request, Temperature(1.0), Blend(padded, mix))
    assert completions.tokens.max() < VOCABULARY
    assert_drawn_from(mix, completions, student, padded, Temperature(1.0), ROWS, VOCABULARY)


@pytest.mark.parametrize("foreign", ["student", "teacher"])
def test_model_that_the_decoder_does_not_know_takes_both_through_their_own_forward(foreign, student, teacher, caplog):
    models = {"student": student, "teacher": teacher} | {foreign: family_model("gpt2")}
    engine, mix = InProcessEngine(), MIXES["speculative"]
    for _ in range(2):
        completions = engine.generate(
            models["student"], make_request(ROWS), Temperature(1.0), Blend(models["teacher"], mix)
        )
    assert_drawn_from(mix, completions, models["student"], models["teacher"], Temperature(1.0), ROWS)
    assert caplog.text.count("through the model's own forward") == 1


def test_steps_of_a_fixed_shape_give_the_same(student, teacher, monkeypatch):
    """As on a GPU, where each model's step is recorded."""
    request, blend = make_request(ROWS, stop=(7, 11)), Blend(teacher, MIXES["mixed"])
    expected = InProcessEngine().generate(student, request, Temperature(1.0), blend)
    monkeypatch.setattr(in_process, "recordable", lambda device: True)
    assert_equal_completions(InProcessEngine().generate(student, request, Temperature(1.0), blend), expected)


def test_sampler_need_not_know_what_comes_after_a_stop_token(engine, student, teacher):
    class Grammar(Sampler):
        """Leaves nothing to say to those who have ended."""

        def forward(self, logits, prefix):
            ended = torch.isin(prefix, torch.tensor([7, 11])).any(1)
            return logits.masked_fill(ended[:, None], -float("inf"))

    request = make_request(ROWS, stop=(7, 11))
    for mix in MIXES.values():
        found = engine.generate(student, request, Grammar(), Blend(teacher, mix))
        assert_equal_completions(found, engine.generate(student, request, Temperature(1.0), Blend(teacher, mix)))


def test_teacher_that_is_not_finite_is_an_error(engine, student):
    broken = wide()
    broken.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="no finite log-prob"):
        engine.generate(student, make_request(ROWS), Temperature(1.0), Blend(broken, MIXES["mixed"]))


def test_low_precision_blend_is_near_float32(engine):
    exact = [model.bfloat16().float() for model in (tiny_model(1, initializer_range=0.1), wide(initializer_range=0.1))]
    low = tiny_model(1, initializer_range=0.1).bfloat16(), wide(initializer_range=0.1).bfloat16()
    mix = MIXES["mixed"]
    completions = engine.generate(low[0], make_request(ROWS), Temperature(1.0), Blend(low[1], mix))
    captured = completions.logprobs.split(completions.lengths.tolist())
    for number, row, found in zip(ROWS, rows(completions), captured, strict=True):
        logits = [full_logits(model, PROMPTS[number], row) for model in exact]
        expected = mix(*logits).log_softmax(-1)[torch.arange(len(row)), row]
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_smallest_budgets(engine, student, teacher):
    blend, whole = Blend(teacher, MIXES["mixed"]), {}
    for budget in (1, 2, BUDGET):
        completions = engine.generate(student, make_request(ROWS, budget, (EOS,)), Temperature(1.0), blend)
        whole[budget] = rows(completions)
    assert whole[1] == [row[:1] for row in whole[BUDGET]]
    assert whole[2] == [row[:2] for row in whole[BUDGET]]
