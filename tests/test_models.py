import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from helpers import EOS, TOKENIZER, VOCABULARY, tiny_model
from stable_opd.models import (
    Head,
    check_same_vocabulary,
    context_length,
    frozen_copy,
    load_model,
    load_tokenizer,
    output_head,
    stop_ids,
)

SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
FAMILIES = [
    Qwen2Config(**SMALL, initializer_range=0.5),
    Qwen3Config(**SMALL, tie_word_embeddings=True, initializer_range=0.5),
    MistralConfig(**SMALL, initializer_range=0.5),
    Gemma2Config(**SMALL, final_logit_softcapping=2.0, initializer_range=0.5),
    GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5, eos_token_id=0, bos_token_id=0),
]
IDS = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: type(config).__name__)
def test_head_on_the_body_equals_the_whole_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(output_head(model).logits(hidden), model(IDS).logits)


def test_softcap_of_the_config_is_followed():
    """The family above with a softcap would pass by chance if its logits were small."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[3]).eval()
    assert output_head(model).softcap == 2.0
    with torch.no_grad():
        assert model(IDS).logits.abs().max() > 1.0


def test_head_cut_to_the_shared_vocabulary():
    model = tiny_model(0)
    head = output_head(model, 5)
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(head.logits(hidden), output_head(model).logits(hidden)[:, :5])


def test_bias_of_the_output_layer_is_kept_and_cut():
    model = tiny_model(0, tie_word_embeddings=False)
    model.set_output_embeddings(nn.Linear(32, VOCABULARY))
    hidden = torch.randn(3, 32)
    layer = model.get_output_embeddings()
    torch.testing.assert_close(output_head(model).logits(hidden), layer(hidden))
    torch.testing.assert_close(output_head(model, 4).logits(hidden), layer(hidden)[:, :4])


def test_head_logits_are_float32_and_not_rounded_to_less_on_the_way():
    head = Head(torch.randn(5, 4).bfloat16(), None, 3.0)
    hidden = torch.randn(2, 4).bfloat16()
    expected = 3 * (F.linear(hidden.float(), head.weight.float()) / 3).tanh()
    assert head.logits(hidden).dtype == torch.float32
    torch.testing.assert_close(head.logits(hidden), expected)


@pytest.mark.parametrize(
    ("config", "setting"), [(CohereConfig, "logit_scale"), (GraniteConfig, "logits_scaling")], ids=["cohere", "granite"]
)
def test_model_that_scales_its_logits_is_refused(config, setting):
    model = AutoModelForCausalLM.from_config(config(**{**SMALL, setting: 0.0625}))
    with pytest.raises(ValueError, match=f"sets {setting}.*Choose a Llama"):
        output_head(model)


def test_model_whose_output_is_no_linear_layer_is_refused():
    model = tiny_model(0)
    model.lm_head = nn.Sequential(nn.Linear(32, VOCABULARY))
    with pytest.raises(ValueError, match="output layer is Sequential"):
        output_head(model)


def test_model_is_loaded_in_the_precision_of_its_file(tmp_path):
    tiny_model(3).bfloat16().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_model(str(tmp_path)).parameters()} == {torch.bfloat16}


def test_loading_gives_back_what_was_saved(student_path):
    expected = tiny_model(1).state_dict()
    found = load_model(student_path).state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert load_tokenizer(student_path).get_vocab() == TOKENIZER.get_vocab()


def test_frozen_copy_is_a_copy_without_gradients_in_evaluation_mode():
    model = tiny_model(0).train()
    frozen = frozen_copy(model)
    assert not frozen.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        before = frozen(IDS % VOCABULARY).logits
        model.model.norm.weight.mul_(3)
        torch.testing.assert_close(frozen(IDS % VOCABULARY).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, [EOS]), (3, [3, EOS]), ([5, 3, EOS], [3, 5, EOS])], ids=str
)
def test_stop_tokens_are_those_of_generation_config_and_tokenizer(configured, expected):
    model = tiny_model(0)
    model.generation_config.eos_token_id = configured
    assert stop_ids(model, TOKENIZER) == expected


def test_model_without_a_stop_token_is_refused():
    model = tiny_model(0)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"has no stop token.*Set eos_token"):
        stop_ids(model, tokenizer_of({"a": 0}))


def test_context_length_is_that_of_the_config():
    assert context_length(tiny_model(0)) == 96


def test_unknown_context_length_is_none():
    """Bloom has no position table whose end could be reached."""
    config = BloomConfig(vocab_size=31, hidden_size=16, n_layer=1, n_head=2, eos_token_id=0, bos_token_id=0)
    assert context_length(AutoModelForCausalLM.from_config(config)) is None


def tokenizer_of(vocabulary):
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_equal_vocabularies_are_accepted():
    check_same_vocabulary(tokenizer_of({"a": 0, "b": 1}), tokenizer_of({"b": 1, "a": 0}), "s", "t")


@pytest.mark.parametrize(
    ("teacher", "what"),
    [
        ({"a": 0}, r"1 tokens are known to the student only \(such as 'b'\)"),
        ({"a": 0, "b": 1, "c": 2, "d": 3}, r"2 tokens are known to the teacher only \(such as 'c', 'd'\)"),
        ({"a": 1, "b": 0}, r"2 tokens have another id \(such as 'a', 'b'\)"),
    ],
    ids=["fewer", "more", "moved"],
)
def test_different_vocabularies_are_refused_with_what_differs(teacher, what):
    with pytest.raises(ValueError, match=what) as refusal:
        check_same_vocabulary(tokenizer_of({"a": 0, "b": 1}), tokenizer_of(teacher), "pupil", "master")
    assert "'pupil'" in str(refusal.value)
    assert "'master'" in str(refusal.value)
    assert "one model family" in str(refusal.value)


def test_added_tokens_may_have_other_names_and_ordinary_ones_may_not():
    """DeepSeek-R1-Distill-Qwen gives the added tokens of Qwen2.5 new names, and means the same by all others."""
    student, teacher = tokenizer_of({"a": 0, "b": 1}), tokenizer_of({"a": 0, "b": 1})
    student.add_special_tokens({"eos_token": "<|im_end|>"})
    teacher.add_tokens(["<think>", "</think>"])
    check_same_vocabulary(student, teacher, "s", "t")
    other = tokenizer_of({"a": 0, "c": 1})
    other.add_tokens(["<think>"])
    with pytest.raises(ValueError, match=r"such as 'b'.*such as 'c'"):
        check_same_vocabulary(student, other, "s", "t")


def test_every_kind_of_difference_is_named_at_once():
    with pytest.raises(ValueError, match=r"student only.*teacher only.*another id"):
        check_same_vocabulary(tokenizer_of({"a": 0, "b": 1}), tokenizer_of({"a": 1, "c": 0}), "s", "t")
