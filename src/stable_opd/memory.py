"""What a training step needs of a GPU's memory, phase by phase, reckoned before the first step is taken."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from stable_opd.models import trained
from stable_opd.offload import module_bytes
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.readers import Readers
from stable_opd.streaming import tile_size

GIB = 2**30

#: Tiles of float32 logits that live at the same time while a loss is computed: the scores of three models, the
#: probabilities of two of them, and the gradient.
LIVE_TILES = 6

#: What to do where a step does not fit.
MAKE_ROOM = (
    "Lower data.batch_size, model.rollout.samples_per_prompt or model.rollout.max_new_tokens (cache), or "
    "model.update.micro_batch_tokens (activations), let the teacher, the reference or the optimizer rest in the host's "
    "memory (offload), or use a smaller dtype."
)


@dataclass
class MemoryPlan:
    """Bytes by phase and by what needs them.

    Attributes:
        always: What stays on the device.
        rollout: What is needed besides while answers are written.
        scoring: What is needed besides while the models that do not learn read them.
        update: What is needed besides while the student learns.
    """

    always: dict[str, int] = field(default_factory=dict)
    rollout: dict[str, int] = field(default_factory=dict)
    scoring: dict[str, int] = field(default_factory=dict)
    update: dict[str, int] = field(default_factory=dict)

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes of each phase, what always stays included."""
        phases = {"rollout": self.rollout, "scoring": self.scoring, "update": self.update}
        return {name: sum(self.always.values()) + sum(phase.values()) for name, phase in phases.items()}

    def __str__(self) -> str:
        """Return a table."""
        lines = ["Memory plan (estimates, in GiB)"]
        for name, items in (
            ("always", self.always),
            ("rollout", self.rollout),
            ("scoring", self.scoring),
            ("update", self.update),
        ):
            lines += [f"  {name:<8}  {what:<28}{size / GIB:8.2f}" for what, size in items.items() if size]
        lines += [f"  peak of {name:<30}{size / GIB:8.2f}" for name, size in self.peaks.items()]
        return "\n".join(lines)

    def shortage(self, capacity: int) -> str | None:
        """Return which phase does not fit and what needs most there, in a sentence or two; None if all fit.

        Args:
            capacity: Bytes of the device.
        """
        phase, peak = max(self.peaks.items(), key=lambda item: item[1])
        if peak <= capacity:
            return None
        needs = sorted({**self.always, **getattr(self, phase)}.items(), key=lambda item: -item[1])[:3]
        return (
            f"The {phase} phase needs about {peak / GIB:.1f} GiB, but the device has {capacity / GIB:.1f} GiB. Most of "
            f"it goes to {', '.join(f'{what} ({size / GIB:.1f} GiB)' for what, size in needs)}."
        )

    def check(self, capacity: int) -> None:
        """Make sure that every phase fits.

        Args:
            capacity: Bytes of the device.

        Raises:
            ValueError: If one does not; the message says which, what needs most there, and what to do.
        """
        shortage = self.shortage(capacity)
        if shortage:
            raise ValueError(f"{shortage} {MAKE_ROOM}")


def cache_bytes(model: PreTrainedModel, rows: int, length: int, width: int) -> int:
    """Return the bytes of the keys and values of some rows.

    Args:
        model: Whose layers they are of.
        rows: Rows that are written at once.
        length: Tokens of a row, prompt included.
        width: Bytes of a number.
    """
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * length * rows * width)


def activation_bytes(model: PreTrainedModel, tokens: int, width: int) -> int:
    """Return about how many bytes the body of a Llama-type model keeps for its backward pass.

    Per layer and token: the inputs of both norms and their float32 copies, queries, keys and values before and after
    the rotation, what attention gathered, and four times the width of the MLP.

    Args:
        model: Whose layers they are of.
        tokens: Tokens of a micro-batch.
        width: Bytes of a number.
    """
    config: Any = model.config.get_text_config()
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or hidden // heads
    attention = (3 * heads + 4 * key_heads) * size * width
    norms = 2 * hidden * (2 * 4 + 2 * width)
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        return int(tokens * (config.num_hidden_layers * hidden * width + attention + norms + 4 * inner * width))
    return int(tokens * config.num_hidden_layers * (attention + norms + 4 * inner * width))


def optimizer_bytes(make: Callable[[list[nn.Parameter]], Optimizer], dtype: torch.dtype) -> float:
    """Return how many bytes an optimizer keeps for each number that it trains, by letting it train a matrix.

    Args:
        make: Makes it from parameters.
        dtype: Precision of the parameters.
    """
    matrix = nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    matrix.grad = torch.zeros_like(matrix)
    optimizer = make([matrix])
    optimizer.step()
    kept = [each for each in optimizer.state[matrix].values() if isinstance(each, Tensor)]
    return sum(each.nbytes for each in kept if each.dim() > 0) / matrix.numel()


def plan_memory(
    student: PreTrainedModel,
    readers: Readers,
    rollout: RolloutOptions,
    update: UpdateOptions,
    prompts: int,
    eval_answers: int,
    longest_prompt: int,
    vocabulary: int,
    compute: torch.dtype,
    kept: float,
) -> MemoryPlan:
    """Reckon the memory of a step.

    Args:
        student: The model that learns, in the precision of its parameters.
        readers: The models that do not.
        rollout: How answers are written.
        update: How the student learns.
        prompts: Prompts of a training batch.
        eval_answers: Answers of an evaluation batch.
        longest_prompt: Tokens of the longest.
        vocabulary: Size of the tokenizer.
        compute: Precision of the student's forward passes.
        kept: Bytes that the optimizer keeps for each number that learns (`optimizer_bytes`).
    """
    learning = trained(student)
    # What is quantised is cast matrix by matrix.
    plain = sum(each.numel() for each in student.parameters() if each.is_floating_point())
    head = student.get_output_embeddings().weight
    plan = MemoryPlan(always={"student": module_bytes(student)})
    (plan.scoring if readers.teacher.offload else plan.always)["teacher"] = readers.teacher.footprint
    if readers.reference is not None:
        (plan.scoring if readers.offload_reference else plan.always)["reference"] = module_bytes(readers.reference)
    state = int(kept * sum(each.numel() for each in learning))
    (plan.update if "optimizer" in update.offload else plan.always)["optimizer"] = state
    rows = max(prompts * max(1, rollout.samples_per_prompt), eval_answers)
    length = longest_prompt + rollout.max_new_tokens
    plan.rollout["inference copy"] = student.num_parameters() * compute.itemsize
    plan.rollout["cache"] = cache_bytes(student, rows, length, compute.itemsize)
    plan.update["gradients"] = sum(each.numel() * each.element_size() for each in learning)
    if compute != student.dtype:  # mixed precision keeps what it casts for the backward pass
        plan.update["weights in lower precision"] = plain * compute.itemsize
    plan.update["activations"] = activation_bytes(student, update.micro_batch_tokens, compute.itemsize)
    plan.update["tiles of logits"] = LIVE_TILES * 4 * vocabulary * tile_size(vocabulary, student.device)
    plan.update["gradient of the head"] = 4 * head.numel() if head.requires_grad else 0
    return plan
