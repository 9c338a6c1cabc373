"""Language models as this library uses them: where they are loaded from, their head, and whether two of them fit."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.testbed import resolve


def load_model(path: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        path: A folder, a hub name, or one of the testbed's (``testbed:student``).
        dtype: Precision of the weights; none takes that in which they were saved.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(resolve(path), dtype=dtype or "auto")
    output_head(model)  # a model whose head we cannot follow is refused here and not an hour later
    return model


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that stands beside a model."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve(path))
    return tokenizer


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy without gradients, in evaluation mode."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    frozen.eval()
    return frozen


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
        ValueError: If the model scales its logits in a way that this library does not follow.
    """
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = next(
        (name for name in ("logit_scale", "logits_scaling") if getattr(config, name, 1.0) not in (1.0, None)), None
    )
    if not isinstance(layer, nn.Linear) or scale:
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


def check_same_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, student_name: str, teacher_name: str
) -> None:
    """Make sure that a token id means the same to student and teacher.

    Raises:
        ValueError: If it does not; the message says what differs.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
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
