"""Tiny random models of several families, with everything in them that a forward pass could get wrong."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from helpers import VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "olmo2": Olmo2Config,
    "phi3": Phi3Config,
    "smollm3": SmolLM3Config,
    "gpt_neox": GPTNeoXConfig,
}


def family_model(name: str, seed: int = 0, attention: str | None = None, **overrides) -> PreTrainedModel:
    """A model of a family; biases and norms are drawn as well, for zeros and ones would hide a mistake."""
    if name == "gpt2":
        config: PreTrainedConfig = GPT2Config(
            **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 96},
            **{"initializer_range": 0.3, "eos_token_id": 0, "bos_token_id": 0} | overrides,
        )
    else:
        # Mistral is the only one with a window by default.
        config = FAMILIES[name](**SIZES | ({"sliding_window": None} if name == "mistral" else {}) | overrides)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model
