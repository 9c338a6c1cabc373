"""What both sides work on: two untrained models, a tokenizer, prompts, and how long the answers get.

Untrained models are enough, since time depends on shapes and lengths alone, and they let us choose the lengths:

- *fixed*: the stop token has a logit that cannot win, so every answer has exactly ``limit`` tokens;
- *ragged*: the student is nearly uniform over V tokens and k of them are stop tokens, so lengths are geometric with a
  mean of V / k, cut at ``limit``.

Both follow from the checkpoint and its generation config, which both sides read; neither side is told to behave.
"""

import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = 0, 1
PROMPTS = 4096  # more than a cell has steps, so that hardly any epoch ends within the timing
PROMPT_TOKENS = (16, 32)
GOLDEN_TOKENS = (32, 64)


@dataclass(frozen=True)
class Shape:
    """The size of a model.

    Attributes:
        layers: Number of blocks.
        width: Hidden width.
        inner: Width of the feed-forward part.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Size of a head.
        tied: Whether the head is the transposed embedding.
    """

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = True

    @property
    def body_parameters(self) -> int:
        """Weights of the matrices between embedding and head."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.inner)

    @property
    def cache_entries(self) -> int:
        """Numbers that one token adds to the key-value cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Pair:
    """A student and a teacher, Llamas both.

    Attributes:
        student: Size of the student.
        teacher: Size of the teacher.
        vocabulary: Tokens, those of the tokenizer too.
        context: Longest sequence.
        dtype: Precision in which the weights are saved.
    """

    student: Shape
    teacher: Shape
    vocabulary: int
    context: int
    dtype: str


PAIRS = {
    "tiny": Pair(
        Shape(4, 128, 344, 4, 4, 32),
        Shape(6, 192, 512, 6, 6, 32),
        vocabulary=4096,
        context=1024,
        dtype="float32",
    ),
    # The sizes of the testbed, where starting an operation costs more than its arithmetic.
    "testbed": Pair(
        Shape(2, 48, 96, 2, 2, 32),
        Shape(3, 96, 192, 3, 3, 32),
        vocabulary=64,
        context=1024,
        dtype="float32",
    ),
    # The sizes of Qwen2.5-1.5B and -7B, with two departures. TRL takes only pairs of one vocabulary size, which 151936
    # and 152064 are not. And they are Llamas, which lack the biases of three projections, because transformers gives a
    # checkpoint of type qwen2 a tokenizer of its own choice, whatever stands beside it.
    "qwen": Pair(
        Shape(28, 1536, 8960, 12, 2, 128),
        Shape(28, 3584, 18944, 28, 4, 128, tied=False),
        vocabulary=151_936,
        context=4096,
        dtype="bfloat16",
    ),
}


@dataclass(frozen=True)
class Cell:
    """One workload.

    Attributes:
        rows: Answers per step.
        limit: Token budget of an answer.
        mean: Mean of the geometric law of the lengths before the cut; None gives every answer ``limit`` tokens.
    """

    rows: int
    limit: int
    mean: int | None = None

    @cached_property
    def law(self) -> str:
        """Name of the distribution of lengths."""
        return "fixed" if self.mean is None else f"mean{self.mean}"

    @property
    def name(self) -> str:
        """How the cell is called on the command line and in the results."""
        return f"{'fixed' if self.mean is None else 'ragged'}{self.limit}-b{self.rows}"


@dataclass(frozen=True)
class Grid:
    """Everything that is measured of a pair.

    Attributes:
        steps: Whole steps of both sides.
        objective: Our step with plain distillation and with the whole objective.
        linearity: Our step over two decades of tokens, by the number of rows and by their length.
        positions: Sizes N of the loss alone.
        vocabularies: Its sizes V.
    """

    steps: tuple[Cell, ...]
    objective: tuple[Cell, ...]
    linearity: tuple[Cell, ...]
    positions: tuple[int, ...]
    vocabularies: tuple[int, ...]


def _cells(rows: tuple[int, ...], *laws: tuple[int, int | None]) -> tuple[Cell, ...]:
    return tuple(Cell(count, *law) for law in laws for count in rows)


GRIDS = {
    "tiny": Grid(
        steps=_cells((4, 16, 64), (64, None), (128, 48), (256, 48)),
        objective=_cells((16, 64), (128, 48)),
        linearity=(*_cells((4, 16, 64), (32, 8), (256, 48)), Cell(128, 512, 96)),
        positions=(512, 2048),
        vocabularies=(4096, 32_768),
    ),
    "testbed": Grid(
        steps=_cells((4, 16, 64), (64, None), (128, 32)),
        objective=_cells((16, 64), (128, 32)),
        linearity=(*_cells((4, 16, 64), (32, 8), (256, 32)), Cell(128, 512, 64)),
        positions=(2048,),
        vocabularies=(64,),
    ),
    "qwen": Grid(
        steps=_cells((16, 64), (512, None), (2048, 512)),
        objective=_cells((16,), (2048, 512)),
        linearity=(*_cells((4, 16, 64), (128, 32), (1024, 256)), Cell(64, 2048, 512)),
        positions=(2048, 8192, 32_768),
        vocabularies=(151_936,),
    ),
}


def stop_tokens(cell: Cell, vocabulary: int) -> list[int]:
    """Return the tokens that end an answer."""
    count = 1 if cell.mean is None else max(1, round(vocabulary / cell.mean))
    return [EOS, *range(vocabulary - count + 1, vocabulary)]


def expected_length(cell: Cell, vocabulary: int) -> float:
    """Return the mean length of answers whose every token stops with probability k / V, cut at the limit."""
    if cell.mean is None:
        return float(cell.limit)
    stop = len(stop_tokens(cell, vocabulary)) / vocabulary
    return (1 - (1 - stop) ** cell.limit) / stop


def expected_longest(cell: Cell, vocabulary: int) -> float:
    """Return the mean length of the longest answer of a step, which is how many times the decoding steps."""
    if cell.mean is None:
        return float(cell.limit)
    going_on = 1 - len(stop_tokens(cell, vocabulary)) / vocabulary
    return sum(1 - (1 - going_on**length) ** cell.rows for length in range(cell.limit))


def make_tokenizer(vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows a word for each token."""
    words = {"<eos>": EOS, "<pad>": PAD} | {f"w{index}": index for index in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", model_max_length=context
    )


def make_model(pair: Pair, shape: Shape, seed: int, spread: float = 0.02, device: str = "cpu") -> LlamaForCausalLM:
    """Return an untrained model; the larger the ``spread`` of its weights, the farther it is from uniform."""
    config = LlamaConfig(
        vocab_size=pair.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=pair.context,
        initializer_range=spread,
        dtype=pair.dtype,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model: LlamaForCausalLM = LlamaForCausalLM._from_config(config)
    return model


@torch.no_grad()
def silence(model: Any, token: int) -> None:
    """Give a token a logit that cannot win.

    One hidden coordinate is set to a constant by the embedding and touched by no layer. After the norm it is positive
    everywhere; the head multiplies it by a large negative number for this token.
    """
    model.get_input_embeddings().weight[:, 0] = 1.0
    for layer in model.base_model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    model.get_output_embeddings().weight[token, 0] = -1000.0


class Workshop:
    """A folder in which models and prompts are made when they are first asked for.

    Args:
        folder: Where they are kept.
        pair: The models.
        device: Where the models are initialised; large ones take minutes on a CPU.
    """

    def __init__(self, folder: Path, pair: Pair, device: str = "cpu") -> None:
        self.folder, self.pair, self.device = folder, pair, device
        self.tokenizer = make_tokenizer(pair.vocabulary, pair.context)

    def student(self, cell: Cell) -> Path:
        """Return the student whose answers have the cell's lengths."""
        place = self.folder / f"student-{cell.law}"
        if not place.exists():
            model: Any = make_model(self.pair, self.pair.student, seed=1, device=self.device)
            if cell.mean is None:
                silence(model, EOS)
            model.generation_config.eos_token_id = stop_tokens(cell, self.pair.vocabulary)
            self._save(model, place)
        return place

    def teacher(self) -> Path:
        """Return the teacher."""
        place = self.folder / "teacher"
        if not place.exists():
            self._save(make_model(self.pair, self.pair.teacher, seed=2, device=self.device), place)
        return place

    def peaked(self, role: str) -> Path:
        """Return a model that is far from uniform, so that a wrong position or token shows."""
        place = self.folder / f"peaked-{role}"
        if not place.exists():
            shape, seed = (self.pair.student, 3) if role == "student" else (self.pair.teacher, 4)
            self._save(make_model(self.pair, shape, seed, spread=0.1, device=self.device), place)
        return place

    def prompts(self, cell: Cell) -> Path:
        """Return the prompts; with fixed lengths they are of one length too, so that nothing at all is ragged."""
        place = self.folder / f"prompts-{'fixed' if cell.mean is None else 'ragged'}.jsonl"
        if not place.exists():
            shortest = PROMPT_TOKENS[1] if cell.mean is None else PROMPT_TOKENS[0]
            records = make_prompts(PROMPTS, (shortest, PROMPT_TOKENS[1]), self.pair.vocabulary)
            place.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return place

    def _save(self, model: Any, place: Path) -> None:
        model.save_pretrained(place)
        self.tokenizer.save_pretrained(place)


def make_prompts(count: int, lengths: tuple[int, int], vocabulary: int, seed: int = 0) -> list[dict[str, str]]:
    """Return prompts and golden solutions of random words, none of which is a stop token of any cell."""
    rng = random.Random(seed)

    def words(shortest: int, longest: int) -> str:
        return " ".join(f"w{rng.randrange(2, vocabulary // 2)}" for _ in range(rng.randint(shortest, longest)))

    return [{"prompt": words(*lengths), "golden": words(*GOLDEN_TOKENS)} for _ in range(count)]
