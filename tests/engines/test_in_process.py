"""The library's own decoder against the models whose layers it writes out, and what it leaves to others."""

import logging

import pytest
import torch
from torch import nn

from families import family_model
from helpers import EOS, VOCABULARY, tiny_model
from stable_opd import InProcessEngine, Temperature, TopP, TransformersEngine
from stable_opd.engines.decoder import obstacle
from writing import PROMPTS, assert_captured, assert_equal_completions, make_request, own_generate, rows


def rope(kind, **options):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **options}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": ("llama", {}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "as many key heads": ("llama", {"num_key_value_heads": 4}),
    "wide heads": ("llama", {"head_dim": 16, "tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "other activation": ("llama", {"hidden_act": "gelu", "rms_norm_eps": 0.3}),
    "linear rope": ("llama", rope("linear", factor=3.0)),
    "llama3 rope": ("llama", rope("llama3", **LLAMA3)),
    "yarn rope": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"rms_norm_eps": 0.3}),
    "mistral": ("mistral", {}),
}
OTHERS = {
    "gpt_neox": ("gpt_neox", {}, "layers are of the type gpt_neox"),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 2.0}, "layers are of the type gemma2"),
    "gemma3": ("gemma3_text", {}, "layers are of the type gemma3_text"),
    "mistral, window": ("mistral", {"sliding_window": 4}, "within a window of 4 tokens"),
    "qwen2, window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        "within a window of 3 tokens",
    ),
    "dynamic rope": (
        "llama",
        rope("dynamic", factor=2.0) | {"max_position_embeddings": 12},
        "rotary embedding is of the type dynamic",
    ),
}
each_model = pytest.mark.parametrize(("name", "overrides"), MODELS.values(), ids=MODELS.keys())
each_other = pytest.mark.parametrize(("name", "overrides", "reason"), OTHERS.values(), ids=OTHERS.keys())


def write(model, sampler, engine=InProcessEngine, **options):
    return engine().generate(model, make_request(**options), sampler)


@each_model
@pytest.mark.parametrize("seed", [1, 2])
def test_greedy_equals_the_models_own_generate(name, overrides, seed):
    model = family_model(name, seed, **overrides)
    assert obstacle(model) is None
    found = rows(write(model, Temperature(0.0), stop=(7, 11)))
    assert found == [own_generate(model, prompt, (7, 11)) for prompt in PROMPTS]


@each_model
@pytest.mark.parametrize("sampler", [Temperature(1.5), TopP(0.8, 1.2)], ids=["temperature", "top-p"])
def test_captured_log_probs_equal_a_full_forward(name, overrides, sampler):
    model, prompt = family_model(name, **overrides), [2, 0, 1, 0, 3, 3]
    assert_captured(write(model, sampler, prompt=prompt, stop=()), model, sampler, prompt)


@each_model
def test_equal_keys_give_the_rows_of_the_models_own_forward(name, overrides):
    model, options = family_model(name, **overrides), {"prompt": [2, 0, 1, 0, 3, 3] * 2, "stop": (EOS, 7, 11)}
    found = write(model, Temperature(1.0), **options)
    assert_equal_completions(found, write(model, Temperature(1.0), TransformersEngine, **options))
    assert found.lengths.min() < found.lengths.max()


def test_head_with_a_bias():
    model = family_model("llama")
    model.set_output_embeddings(nn.Linear(32, VOCABULARY))
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    for vocabulary in (None, VOCABULARY - 4):
        completions = write(model, Temperature(1.0), vocabulary=vocabulary)
        assert_captured(completions, model, Temperature(1.0), [0, 1, 2, 3], vocabulary)


def test_weights_are_read_anew_each_time():
    """The student learns between two rollouts."""
    model, engine = tiny_model(1), InProcessEngine()
    before = engine.generate(model, make_request(), Temperature(0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    after = engine.generate(model, make_request(), Temperature(0.0))
    assert rows(after) != rows(before)
    assert rows(after) == [own_generate(model, prompt, (EOS,)) for prompt in PROMPTS]


def test_prompt_that_nobody_answers_costs_no_room():
    model = tiny_model(1)
    prompts = [*PROMPTS, [1] * 5000]  # more than the model can read
    assert rows(write(model, Temperature(0.0), prompts=prompts)) == rows(write(model, Temperature(0.0)))


@each_other
def test_model_of_other_layers_is_left_to_its_own_forward(name, overrides, reason, caplog):
    model, engine = family_model(name, **overrides), InProcessEngine()
    options = {"prompt": [2, 0, 1, 0, 3, 3], "stop": (EOS, 7)}
    with caplog.at_level(logging.WARNING):
        found = engine.generate(model, make_request(**options), Temperature(1.0))
        assert len(caplog.records) == 1
        assert "model's own forward, which is slower" in caplog.text
        assert reason in caplog.text
        engine.generate(model, make_request(**options), Temperature(1.0))
        assert len(caplog.records) == 1  # once is enough
    assert_equal_completions(found, write(model, Temperature(1.0), TransformersEngine, **options), atol=0)
    for number, prompt in enumerate(PROMPTS):  # one by one, because a dynamic rotary embedding looks at the whole batch
        assert rows(write(model, Temperature(0.0), prompt=[number])) == [own_generate(model, prompt, (EOS,))]


def test_each_reason_is_said(caplog):
    engine = InProcessEngine()
    with caplog.at_level(logging.WARNING):
        for name, overrides, _ in OTHERS.values():
            engine.generate(family_model(name, **overrides), make_request(budget=1), Temperature(0.0))
    assert len(caplog.records) == len(OTHERS)


def test_nothing_is_said_of_a_model_that_can_be_decoded(caplog):
    with caplog.at_level(logging.DEBUG, logger="stable_opd"):
        write(family_model("llama"), Temperature(0.0))
    assert caplog.records == []
