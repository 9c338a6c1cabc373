"""Attention over packed rows: the tokens of all rows stand one after the other, and nothing is padded.

Everything in a language model but its attention treats tokens one by one, so a batch of ragged rows can go through it
as one long row if attention knows where each row starts. Transformers hands its attention to a registered function, and
carries keyword arguments to it; so this works for unmodified models.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: The name under which transformers knows the attention of this module.
PACKED = "stable_opd_packed"

#: Model types whose attention is told everything by the arguments that are looked at here.
PACKABLE = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2", "phi3", "smollm3"})

#: Rows whose lengths differ by less than this factor are attended together, where attention needs equal lengths.
SPREAD = 1.3


def ragged_arange(lengths: Tensor) -> Tensor:
    """Count from 0 within each of several runs: [2, 3] -> [0, 1, 0, 1, 2]."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=lengths.device) - starts.repeat_interleave(lengths)


class Packing:
    """Where rows start and end in a packed batch.

    Args:
        lengths: Tokens of each row, each at least 1, (rows,).
    """

    def __init__(self, lengths: Tensor) -> None:
        self.device = lengths.device
        self.positions = ragged_arange(lengths)  # of each token in its row, (sum of lengths,)
        self.starts = lengths.cumsum(0) - lengths  # of each row, (rows,)
        self.lengths: list[int] = lengths.tolist()

    @cached_property
    def borders(self) -> Tensor:
        """Where each row starts, and where the last one ends, (rows + 1,) int32."""
        return F.pad(self.starts, (0, 1), value=len(self.positions)).int()

    @cached_property
    def groups(self) -> list["_Group"]:
        """The rows in groups of similar length."""
        order = sorted(range(len(self.lengths)), key=lambda row: -self.lengths[row])
        starts = self.starts.tolist()
        groups: list[list[int]] = []
        for row in order:
            if not groups or self.lengths[groups[-1][0]] > SPREAD * self.lengths[row] + 8:
                groups.append([])
            groups[-1].append(row)
        return [
            _Group([starts[row] for row in rows], [self.lengths[row] for row in rows], self.device) for rows in groups
        ]

    @cached_property
    def order(self) -> Tensor:
        """Where each token stands among those of the groups, (sum of lengths,)."""
        return torch.cat([group.tokens for group in self.groups]).argsort()


class _Group:
    """Some rows of a packed batch, and how to pad them to a rectangle."""

    def __init__(self, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        self.rows, self.width = len(starts), max(lengths)
        column = torch.arange(self.width)
        inside = column < torch.tensor(lengths)[:, None]
        places = torch.tensor(starts)[:, None] + column
        self.tokens = places[inside].to(device)  # which tokens of the batch, (n,)
        self.cells = inside.flatten().nonzero().squeeze(1).to(device)  # where they stand in the rectangle, (n,)
        # A cell without a token repeats one: no real token sees it, because attention is causal.
        self.source = places.where(inside, torch.tensor(starts)[:, None]).flatten().to(device)


class _Pad(torch.autograd.Function):
    """Packed tokens to the cells of a rectangle; each token is in one cell, so backward only looks them up."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, group: _Group) -> Tensor:
        ctx.group, ctx.count = group, len(packed)
        return packed[group.source]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        packed = upstream[0].new_zeros((ctx.count, *upstream[0].shape[1:]))
        return packed.index_copy_(0, ctx.group.tokens, upstream[0][ctx.group.cells]), None


class _Unpad(torch.autograd.Function):
    """The cells that hold a token, in packed order."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, group: _Group) -> Tensor:
        ctx.group, ctx.count = group, len(cells)
        return cells[group.cells]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        cells = upstream[0].new_zeros((ctx.count, *upstream[0].shape[1:]))
        return cells.index_copy_(0, ctx.group.cells, upstream[0]), None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a packed batch; without a packing, the usual one.

    Args:
        module: The attention layer.
        query: (1, heads, N, d).
        key: (1, key heads, N, d).
        value: (1, key heads, N, d).
        attention_mask: The usual one; it is not looked at in a packed batch.
        scaling: Factor of the scores; none is one over the root of d.
        sliding_window: How many tokens back a token sees, itself included; none sees all.
        packing: Where the rows are.
        kwargs: What transformers passes on besides.

    Returns:
        What each token gathered, (1, N, heads, d), and no attention weights.
    """
    if packing is None:
        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
        return usual
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    return attend_packed(q, k, v, packing, scaling, sliding_window)[None], None


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None = None, sliding_window: int | None = None
) -> Tensor:
    """Causal attention within each row of a packed batch.

    Args:
        q: Queries, (N, heads, d).
        k: Keys, (N, key heads, d).
        v: Values, (N, key heads, d).
        packing: Where the rows are.
        scaling: Factor of the scores; none is one over the root of d.
        sliding_window: How many tokens back a token sees, itself included; none sees all.

    Returns:
        What each token gathered, (N, heads, d).
    """
    if q.is_cuda and torch.is_autocast_enabled("cuda"):
        q, k, v = (each.to(torch.get_autocast_dtype("cuda")) for each in (q, k, v))
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return _attend_groups(q, k, v, packing, scaling, sliding_window)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    longest, gqa = max(packing.lengths), q.shape[1] != k.shape[1]
    borders = packing.borders
    gathered: Tensor = varlen_attn(  # type: ignore[assignment]
        q, k, v, borders, borders, longest, longest, scale=scaling, window_size=window, enable_gqa=gqa
    )
    return gathered


def _attend_groups(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """Attend group by group, each padded to a rectangle."""
    parts = []
    for group in packing.groups:
        queries, keys, values = (
            _Pad.apply(each, group).view(group.rows, group.width, *each.shape[1:]).transpose(1, 2)  # type: ignore[no-untyped-call]
            for each in (q, k, v)
        )
        band = None
        if sliding_window is not None and sliding_window < group.width:
            ones = torch.ones(group.width, group.width, dtype=torch.bool, device=q.device)
            band = ones.tril().triu(1 - sliding_window)
        out = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=band,
            is_causal=band is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(_Unpad.apply(out.transpose(1, 2).flatten(0, 1), group))  # type: ignore[no-untyped-call]
    return parts[0] if len(parts) == 1 and len(packing.lengths) == 1 else torch.cat(parts)[packing.order]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def packs(model: PreTrainedModel) -> bool:
    """Return whether rows can be packed for a model, and have its attention look at the packing if so."""
    config: Any = model.config.get_text_config()
    dropout: float = getattr(config, "attention_dropout", 0.0)
    if config.model_type not in PACKABLE or dropout:
        return False
    if model.config._attn_implementation != PACKED:
        model.set_attn_implementation(PACKED)
    return True
