"""The model that learns: all its weights, or low-rank adapters beside them."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stable_opd.models import Quantization, load_model, trained
from stable_opd.randomness import global_seed, key

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters, which learn in the place of the student's weights.

        W x + alpha / rank * B A x, with B at 0 in the beginning

    The weights W stay in the precision in which they were saved, and the adapters are in float32. Without its adapters
    the student is the initial one, so a reference costs no memory. Checkpoints hold the adapters alone.

    Source: Hu et al. 2021 (arXiv 2106.09685); with a quantization, QLoRA (arXiv 2305.14314).

    Args:
        rank: Rows of A, and columns of B.
        alpha: Scale of the adapters, before it is divided by the rank.
        dropout: Share of the inputs of A that are dropped while the student learns.
        target_modules: Linear layers that get an adapter: ends of their names, a regular expression, or ``all-linear``
            for all but the head.
        quantization: Store the weights W in 4 bits (``nf4``) or in 8 (``int8``), by bitsandbytes; none leaves them.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "Expected a rank of at least 1, an alpha above 0 and a dropout from 0 to below 1, but got "
                f"{self.rank}, {self.alpha} and {self.dropout}."
            )

    def config(self) -> "LoraConfig":
        """Return the same for peft.

        Raises:
            ValueError: If it is not installed.
        """
        if find_spec("peft") is None:
            raise ValueError(
                "Expected peft for model.adapter, but got none. Install it with: pip install 'stable-opd[lora]'"
            )
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )


def load_student(path: str, adapter: LoRA | None = None, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """Load a student in training mode.

    Args:
        path: A folder, a hub name, or one of the testbed's.
        adapter: What learns in the place of its weights; none lets them learn.
        gradient_checkpointing: Whether its layers keep their inputs only.
    """
    if adapter is None:
        # In float32 whatever it was saved in: at the learning rates of distillation, an update of a bfloat16 weight
        # rounds to nothing. A precision of "bf16-true" casts it all the same.
        model = load_model(path, torch.float32)
    else:
        model = load_model(path, quantization=adapter.quantization)
        add_adapters(model, adapter)
    if gradient_checkpointing:
        # The older name is deprecated since transformers 5.23.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        model.disable_input_require_grads()  # which the reentrant kind would need beside frozen weights
    model.train()
    return model


def add_adapters(model: PreTrainedModel, adapter: LoRA) -> None:
    """Freeze a model and put adapters into it, the same ones for one seed.

    Raises:
        ValueError: If no layer is meant, or one that is not linear or the head.
    """
    with torch.random.fork_rng():
        torch.manual_seed(key(global_seed(), "adapters"))
        model.add_adapter(adapter.config())
    for parameter in trained(model):
        parameter.data = parameter.data.float()
    _check_targets(model, adapter)


def _check_targets(model: PreTrainedModel, adapter: LoRA) -> None:
    """Make sure that the adapters are where the rest of the library expects them: in linear layers of the body."""
    head = model.get_output_embeddings()
    odd = [name for name, _ in model.named_parameters() if "lora_embedding" in name]
    if odd or not isinstance(head, nn.Linear):
        raise ValueError(
            f"Expected linear layers of the body as model.adapter.target_modules, but got {adapter.target_modules!r}, "
            "which names the head or the embeddings. Leave them out, or use all-linear."
        )


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """Have a model as it was before it got adapters, in evaluation mode, for the time of a context."""
    learning = model.training
    model.eval()
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
        model.train(learning)


def describe_adapter(model: PreTrainedModel, adapter: LoRA) -> dict[str, Any]:
    """Return what adapters belong to: how they were made, and a digest of the weights beside which they stand."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and ".lora_" not in name:  # a device may quantise in its own way
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // 1024)]
            digest.update(some.float().cpu().numpy().tobytes())
    return asdict(adapter) | {"base": digest.hexdigest()}


def without_base(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's state without the student's weights, which are frozen beside the adapters."""
    return {name: value for name, value in state.items() if not name.startswith("student.") or ".lora_" in name}


def check_adapter(found: Mapping[str, Any] | None, expected: Mapping[str, Any] | None) -> None:
    """Make sure that the adapters of a checkpoint belong to a student.

    Args:
        found: What the checkpoint says (`describe_adapter`); None if it holds all weights.
        expected: What the student has; None if it has no adapters.

    Raises:
        ValueError: If they do not.
    """
    if found is None and expected is None:
        return
    if found is None:
        raise ValueError(
            "Expected a checkpoint with adapters, because model.adapter is set, but got one with all weights. Export "
            "it by stable-opd export and name its folder as model.student, or leave model.adapter out."
        )
    if expected is None:
        raise ValueError(
            "Expected a checkpoint with all weights, but got one with adapters. Set model.adapter as in the config of "
            "that run, or export it by stable-opd export and name its folder as model.student."
        )
    differ = [name for name in expected if found.get(name) != expected[name]]
    if differ == ["base"]:
        raise ValueError(
            "Expected a checkpoint with adapters of this student, but got one whose adapters were trained beside other "
            "weights. Name the student of that run as model.student."
        )
    if differ:
        names = [name for name in differ if name != "base"]
        raise ValueError(
            f"Expected a checkpoint with adapters of {_settings(expected, names)}, but got {_settings(found, names)}. "
            "Set model.adapter as in the config of that run."
        )


def _settings(adapter: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {adapter.get(name)}" for name in names)
