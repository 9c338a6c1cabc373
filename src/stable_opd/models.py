"""Language models as this library uses them: where they are loaded from, their head, and whether two of them fit."""

import copy
import hashlib
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stable_opd.testbed import resolve

#: Characters of a library's message that are passed on.
LONGEST_REASON = 800

#: How the matrices of a model's layers are stored: 4 bits each (QLoRA, arXiv 2305.14314), or 8 (LLM.int8, 2208.07339).
Quantization = Literal["nf4", "int8"]


def load_model(
    path: str, dtype: torch.dtype | None = None, quantization: Quantization | None = None
) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        path: A folder, a hub name, or one of the testbed's (``testbed:student``).
        dtype: Precision of the weights; none takes that in which they were saved.
        quantization: How bitsandbytes is to store the matrices of the layers; embeddings, norms and head stay as they
            are, and in 4 bits so do matrices whose rows are no multiple of 64. None leaves all as it is.

    Raises:
        ValueError: If there is no such model, if it brings code of its own, if weights are missing or not finite, if
            the logits are no linear layer of the hidden states, or if the quantization cannot be had.
    """
    options = {} if quantization is None else _quantized(resolve(path), dtype, quantization)
    what = "a causal language model"
    loaded = _read(what, path, AutoModelForCausalLM, dtype=dtype or "auto", output_loading_info=True, **options)
    model: PreTrainedModel = loaded[0]
    output_head(model)  # a model whose head we cannot follow is refused here and not an hour later
    _check_weights(model, path, sorted(loaded[1]["missing_keys"]))
    layer: Any
    for layer in model.modules():
        # On a CPU with the instructions avx512_bf16, bitsandbytes 0.50.2 repacks a layer the first time that it is not
        # in training mode, for a product in bfloat16 that has no gradient, and keeps it so when the training goes on.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def _read(what: str, path: str, loader: Any, **options: Any) -> Any:
    """Load from a folder or a hub, and never run code that lies there.

    Raises:
        ValueError: If that cannot be done; the message says why and what to change.
    """
    try:
        # Left open, transformers asks on the terminal whether it may run what it found.
        return loader.from_pretrained(resolve(path), trust_remote_code=False, **options)
    except Exception as error:  # whatever a folder or a hub may do, the user must learn which model it was
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"Expected {what} that transformers knows by itself, but {path!r} brings code of its own, which is "
                "never run. Take a model of a family that is part of transformers, or convert this one to it."
            ) from error
        reason = f"{type(error).__name__}: {error}"[:LONGEST_REASON]
        raise ValueError(
            f"Expected {what} in {path!r}, but transformers cannot read it: {reason}. Name a folder that was written "
            "by save_pretrained, or a hub name."
        ) from error


def _check_weights(model: PreTrainedModel, path: str, missing: list[str]) -> None:
    """Refuse weights that are not there, which transformers draws at random, or that are no numbers."""
    broken = [name for name, each in model.named_parameters() if not is_finite(each)]
    found = f"none for {', '.join(missing[:3])}" if missing else f"nan or infinity in {', '.join(broken[:3])}"
    if missing or broken:
        raise ValueError(
            f"Expected finite weights of the whole model in {path!r}, but got {found}. Take an earlier checkpoint, or "
            "fetch the files again."
        )


def is_finite(weights: Tensor) -> bool:
    """Whether weights are neither nan nor infinite; whole numbers always are. One pass, without a copy."""
    return not weights.is_floating_point() or bool(weights.detach().sum(dtype=torch.float32).isfinite())


def _quantized(path: str, dtype: torch.dtype | None, quantization: Quantization) -> dict[str, Any]:
    """Return what transformers has to be told to quantise a model while it is loaded."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"Expected bitsandbytes for the quantization {quantization}, but got none. Install it with: "
            "pip install 'stable-opd[bitsandbytes]'"
        )
    # It says at every product that it computes in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantization == "int8":
        options = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = _read("the config of a language model", path, AutoConfig)
        options = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype or config.dtype,
            llm_int8_skip_modules=_left_whole(config),
        )
    return {"quantization_config": options, "device_map": {"": "cpu"}}  # whoever asked moves it, as any other


def _left_whole(config: Any) -> list[str]:
    """Return the linear layers that cannot be stored in 4 bits: the head, and those whose rows end within a block.

    On a CPU, bitsandbytes 0.50.2 decodes rows that are no multiple of its blocks of 64 with the scales of others, and
    is wrong by a quarter of a weight and more.

    Raises:
        ValueError: If no layer is left.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    head = model.get_output_embeddings()
    left = [name for name, layer in linear.items() if layer is head or layer.in_features % 64]
    if len(left) == len(linear):
        raise ValueError(
            "Expected layers with multiples of 64 inputs for the quantization nf4, but got none in a model of width "
            f"{config.get_text_config().hidden_size}. Use int8."
        )
    return left


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that stands beside a model."""
    tokenizer: PreTrainedTokenizerBase = _read("a tokenizer", path, AutoTokenizer)
    return tokenizer


def digest(path: str) -> str:
    """Return what tells the files of a model and its tokenizer from any others: the commit of a hub, or a digest.

    Args:
        path: As for `load_model`. All bytes of a folder are read, which takes some seconds for a GB.
    """
    commit = getattr(_read("the config of a language model", path, AutoConfig), "_commit_hash", None)
    if commit is not None:
        return f"{path} {commit}"
    whole = hashlib.sha256()
    for file in sorted(Path(resolve(path)).iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja"):
            with file.open("rb") as opened:
                whole.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy without gradients, in evaluation mode."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    frozen.eval()
    return frozen


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that end an answer: those of the generation config and the tokenizer's own.

    Raises:
        ValueError: If there are none, so that no answer could ever end.
    """
    configured = model.generation_config.eos_token_id if model.generation_config else None
    several = configured if isinstance(configured, list) else [configured]
    found = sorted({int(token) for token in [*several, tokenizer.eos_token_id] if token is not None})
    if not found:
        raise ValueError(
            f"The model {model.config.name_or_path!r} has no stop token: neither its generation config nor its "
            "tokenizer names one, so every answer would run into the token budget. Set eos_token in its tokenizer."
        )
    return found


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model can read, or None if its config does not say."""
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


@dataclass(frozen=True, slots=True)
class Head:
    """The last layer of a language model: hidden states to logits, over the shared vocabulary.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        softcap: Bound of the logits as in Gemma 2, ``softcap * tanh(logits / softcap)``; None for no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def detached(self) -> "Head":
        """Return a head without gradients; it stays on its device when the model leaves."""
        return Head(self.weight.detach(), None if self.bias is None else self.bias.detach(), self.softcap)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return float32 logits of hidden states, (n, H) -> (n, V), in given memory or in new; no gradient flows."""
        with torch.no_grad():
            logits = product(hidden.to(self.weight.dtype), self.weight.T, out)
            if self.bias is not None:
                logits += self.bias
            return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the matrix product in float32, (n, k) and (k, m) -> (n, m), whatever precision the factors have.

    Logits that are rounded to bfloat16 first cost several per cent of error in the gradient of a divergence.
    """
    if a.dtype == torch.float32 or a.device.type != "cuda":
        return torch.matmul(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32)  # a GPU's allocator keeps the memory by itself


def output_head(model: PreTrainedModel, vocabulary: int | None = None) -> Head:
    """Return the head of a model, cut to the first ``vocabulary`` tokens.

    Model families pad their vocabulary to different sizes (151936 and 152064 within Qwen2.5); tokens beyond the
    tokenizer's own are never written, so both sides are cut to the part that they share.

    Raises:
        ValueError: If the model makes its logits in a way that this library does not follow.
    """
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = next(
        (name for name in ("logit_scale", "logits_scaling") if getattr(config, name, 1.0) not in (1.0, None)), None
    )
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point() or scale:
        what = f"its config sets {scale}" if scale else f"its output layer is {type(layer).__name__}"
        raise ValueError(
            f"Expected a causal language model whose logits are a linear layer of its last hidden states, but {what} "
            f"({type(model).__name__}). Choose a Llama, Qwen, Mistral or Gemma model."
        )
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    if vocabulary is not None and vocabulary < len(weight):  # a slice of all of it would cost a copy in the backward
        weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
    return Head(weight, bias, getattr(config, "final_logit_softcapping", None))


def added_ids(*tokenizers: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of tokens that were added to one of several vocabularies, special ones and others."""
    return {number for each in tokenizers for number in each.added_tokens_decoder}


def check_same_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, student_name: str, teacher_name: str
) -> None:
    """Make sure that a token id means the same to student and teacher.

    Tokens that were added to a vocabulary, such as those of a chat template, may differ: members of one family name the
    same ids otherwise. The doctor warns of them.

    Raises:
        ValueError: If it does not; the message says what differs.
    """
    added = added_ids(student, teacher)
    ours, theirs = (
        {token: number for token, number in each.get_vocab().items() if number not in added}
        for each in (student, teacher)
    )
    if ours == theirs:
        return
    only_ours, only_theirs = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    moved = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    differences = [
        f"{len(tokens)} {what} (such as {', '.join(map(repr, tokens[:3]))})"
        for tokens, what in (
            (only_ours, "tokens are known to the student only"),
            (only_theirs, "tokens are known to the teacher only"),
            (moved, "tokens have another id"),
        )
        if tokens
    ]
    raise ValueError(
        f"The teacher {teacher_name!r} must have the vocabulary of the student {student_name!r}, because it scores the "
        f"student's token ids. But {'; '.join(differences)}. Choose a student and a teacher of one model family."
    )
