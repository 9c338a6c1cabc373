"""Packed rows, against the model's own eager attention on each row alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import family_model
from helpers import VOCABULARY, make_rollout
from stable_opd import packing
from stable_opd.models import frozen_copy
from stable_opd.packing import PACKED, Packing, attend_packed, packs
from stable_opd.scoring import body

MODELS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    # The only sort of these that minds where a row stands: the longest position changes all angles.
    "llama, dynamic rope": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
            "max_position_embeddings": 50,
        },
    ),
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "gemma3_text": ("gemma3_text", {"layer_types": ["full_attention", "full_attention"]}),
    "gemma3_text, window": (
        "gemma3_text",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 3},
    ),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", {"sliding_window": 5}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
}
each_model = pytest.mark.parametrize(("name", "overrides"), MODELS.values(), ids=MODELS.keys())

#: Prompt and completion tokens of each row.
ROWS = {
    "ragged": [(3, 4), (1, 9), (6, 2), (5, 5)],
    "very different": [(1, 1), (2, 40), (1, 2), (30, 11), (3, 8), (1, 1), (9, 3)],
    "single": [(3, 7)],
    "single token": [(1, 1)],
    "tokens": [(1, 1), (1, 1), (1, 1)],
}


def draw_rollout(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()

    return make_rollout([tokens(completion) for _, completion in sizes], [tokens(prompt) for prompt, _ in sizes])


def each_row_alone(model, rollout):
    """The states before each completion token, from the model's own forward over one row at a time."""
    states = []
    for row in range(len(rollout)):
        part = rollout.select(torch.tensor([row]))
        hidden = model.base_model(input_ids=part.tokens[None], use_cache=False).last_hidden_state[0]
        states.append(hidden[int(part.prompt_lengths) - 1 : -1])
    return torch.cat(states)


def states_and_gradients(model, states):
    """Gradients of a random linear functional; the sum of squares is what a norm keeps constant."""
    model.zero_grad()
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(7))
    (states * direction).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.base_model.named_parameters()}
    return states.detach(), gradients


def assert_same(found, expected):
    (states, gradients), (expected_states, expected_gradients) = found, expected
    torch.testing.assert_close(states, expected_states, rtol=0, atol=2e-5 * expected_states.abs().max().item())
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # A token that sees itself alone has gradients that are zero but for rounding.
        limit = 5e-5 * gradient.abs().max().item() + 1e-6 * largest
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )


@each_model
@pytest.mark.parametrize("sizes", [ROWS["ragged"], ROWS["very different"]], ids=["ragged", "very different"])
def test_packed_is_padded_is_each_row_alone(name, overrides, sizes, monkeypatch):
    rollout = draw_rollout(sizes)
    plain = family_model(name, attention="eager", **overrides)
    expected = states_and_gradients(plain, each_row_alone(plain, rollout))
    model = family_model(name, **overrides)
    assert packs(model)
    assert_same(states_and_gradients(model, body(model, rollout)), expected)
    monkeypatch.setattr(packing, "PACKABLE", frozenset())
    padded = family_model(name, **overrides)
    assert not packs(padded)
    assert_same(states_and_gradients(padded, body(padded, rollout)), expected)


@pytest.mark.parametrize("sizes", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("window", [None, 2], ids=["no window", "window"])
def test_rows_of_all_sizes_are_those_of_the_model(sizes, window):
    rollout = draw_rollout(sizes)
    plain = family_model("mistral", attention="eager", sliding_window=window)
    expected = states_and_gradients(plain, each_row_alone(plain, rollout))
    model = family_model("mistral", sliding_window=window)
    assert_same(states_and_gradients(model, body(model, rollout)), expected)


def test_rows_of_the_tests_come_in_several_groups():
    """Otherwise the tests above would not see groups of several sizes."""
    groups = draw_rollout(ROWS["very different"]).packing.groups
    assert len(groups) > 2
    assert max(group.rows for group in groups) > 1


@pytest.mark.parametrize("window", [None, 3], ids=["no window", "window"])
@pytest.mark.parametrize("changed", range(7))
def test_rows_never_see_each_other(changed, window):
    model = family_model("mistral", sliding_window=window)
    rollout = draw_rollout(ROWS["very different"])
    start, length = int(rollout.starts[changed]), int((rollout.prompt_lengths + rollout.lengths)[changed])
    with torch.no_grad():
        before = body(model, rollout)
        rollout.tokens[start : start + length] = (rollout.tokens[start : start + length] + 1) % VOCABULARY
        after = body(model, rollout)
    others = rollout.row != changed
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=1e-6)
    assert (after - before)[~others].abs().amax(1).min() > 1e-3


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gemma2", {"attn_logit_softcapping": 1.5, "sliding_window": 4}),
        ("llama", {"attention_dropout": 0.5}),
    ],
    ids=["gpt2", "gpt_neox", "gemma2", "dropout"],
)
def test_model_that_cannot_be_packed_is_padded(name, overrides):
    rollout = draw_rollout(ROWS["very different"])
    plain = family_model(name, attention="eager", **overrides)
    model = family_model(name, attention="eager", **overrides)
    assert not packs(model)
    assert model.config._attn_implementation == "eager"
    expected = states_and_gradients(plain, each_row_alone(plain, rollout))
    assert_same(states_and_gradients(model, body(model, rollout)), expected)


@pytest.mark.parametrize("window", [None, 3], ids=["no window", "window"])
def test_model_whose_rows_were_packed_still_generates_with_padding(window):
    """Its attention is another one from then on."""
    plain = family_model("mistral", attention="eager", sliding_window=window)
    model = family_model("mistral", sliding_window=window)
    body(model, draw_rollout(ROWS["ragged"]))
    assert model.config._attn_implementation == PACKED
    ids = torch.tensor([[0, 0, 0, 12, 4], [12, 3, 13, 5, 2], [0, 0, 0, 0, 12]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    found, expected = (each.generate(ids, pad_token_id=0, **options) for each in (model, plain))
    assert found.tolist() == expected.tolist()
    alone = plain.generate(ids[:1, 3:], pad_token_id=0, **options | {"attention_mask": mask[:1, 3:]})
    assert found[0, 3:].tolist() == alone[0].tolist()


def test_model_whose_rows_were_packed_can_be_copied_saved_and_loaded(tmp_path):
    model, rollout = family_model("llama"), draw_rollout(ROWS["ragged"])
    with torch.no_grad():
        expected = body(model, rollout)
        model.save_pretrained(tmp_path)
        assert PACKED not in (tmp_path / "config.json").read_text()  # nobody else knows it
        for other in (frozen_copy(model), AutoModelForCausalLM.from_pretrained(tmp_path)):
            torch.testing.assert_close(body(other, rollout), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_gradient_checkpointing_changes_nothing(name):
    rollout = draw_rollout(ROWS["very different"])
    model = family_model(name).train()
    expected = states_and_gradients(model, body(model, rollout))
    model.gradient_checkpointing_enable()
    calls = []
    model.base_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert_same(states_and_gradients(model, body(model, rollout)), expected)
    assert len(calls) == 2  # once more in the backward pass


@pytest.mark.parametrize("window", [None, 1, 4, 11, 12, 100])
@pytest.mark.parametrize("scaling", [None, 0.9])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attention_and_its_gradients_equal_their_formula(key_heads, scaling, window):
    """In float64, row by row, with the mask written out."""
    lengths, heads, width = [5, 1, 30, 12, 6], 4, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), count, width, generator=generator, dtype=torch.float64, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    )
    rows = []
    for length, ours, keys, values in zip(lengths, *(each.split(lengths) for each in (q, k, v)), strict=True):
        keys, values = (each.repeat_interleave(heads // key_heads, 1) for each in (keys, values))
        scores = torch.einsum("ihd,jhd->hij", ours, keys) * (width**-0.5 if scaling is None else scaling)
        back = torch.arange(length)[:, None] - torch.arange(length)
        seen = (back >= 0) & (back < (window or length))
        rows.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -float("inf")).softmax(-1), values))
    expected = torch.cat(rows)
    found = attend_packed(q, k, v, Packing(torch.tensor(lengths)), scaling, window)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = (torch.autograd.grad(each, (q, k, v), direction) for each in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
