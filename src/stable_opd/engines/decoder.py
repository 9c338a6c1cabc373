"""The forward pass of Llama-type models, written for decoding: a few large matrix products, and a cache in place.

A module of transformers spends most of a decoding step outside of arithmetic: in hooks, masks, and a cache that is
copied for every token. Here a model is a list of matrices. Query, key and value are one product, gate and up are
another. The rotary embedding is one complex product: the channels of each head are reordered, in queries and keys
alike, such that the two that rotate together stand side by side, which no dot product notices.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from stable_opd.models import Head, output_head
from stable_opd.packing import Packing, attend_packed

#: Model types whose layers are those of this module.
DECODABLE = frozenset({"llama", "mistral", "qwen2", "qwen3"})

#: Rotary embeddings that are a fixed function of the position.
FIXED_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})


def obstacle(model: PreTrainedModel) -> str | None:
    """Return why a model cannot be decoded by this module, or None if it can."""
    config = model.config.get_text_config()
    if config.model_type not in DECODABLE:
        return f"its layers are of the type {config.model_type}"
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in FIXED_ROTARY:
        return f"its rotary embedding is of the type {rotary}"
    base: Any = model.base_model
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in base.layers]
    if config.model_type == "mistral":  # whose layers read it from the config
        windows.append(config.sliding_window)
    window = next((each for each in windows if each is not None), None)
    return None if window is None else f"it attends within a window of {window} tokens"


class _Layer(NamedTuple):
    """The matrices of one layer, for products x @ matrix; norms and the scale of the scores are in them."""

    qkv: Tensor  # (H, (heads + 2 key heads) d)
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # (heads + key heads, d): Qwen3 normalises queries and keys
    out: Tensor  # (heads d, H)
    out_bias: Tensor | None
    up: Tensor  # (H, 2 I): gate and up
    up_bias: Tensor | None
    down: Tensor  # (I, H)
    down_bias: Tensor | None


class Decoder:
    """An inference copy of a model.

    Args:
        model: A model without an `obstacle`.
        length: Tokens of the longest row, prompt included.
        vocabulary: Size of the tokenizer; logits beyond it are not computed.
        dtype: Precision to compute in.
    """

    def __init__(self, model: PreTrainedModel, length: int, vocabulary: int | None, dtype: torch.dtype) -> None:
        config = model.config.get_text_config()
        base: Any = model.base_model
        attention: Any = base.layers[0].self_attn
        self.precision = model.dtype
        self.width, self.heads = attention.head_dim, config.num_attention_heads
        self.key_heads = config.num_key_value_heads
        self.scaling, self.epsilon = attention.scaling, config.rms_norm_eps
        self.activation: Callable[[Tensor], Tensor] = (
            F.silu if config.hidden_act == "silu" else base.layers[0].mlp.act_fn
        )
        self.embedding: Tensor = _rows(base.embed_tokens).to(dtype)
        # RMSNorm is x / |x| times the root of the width, but for the epsilon; the root goes into what comes next.
        self.root = config.hidden_size**0.5
        self.least = self.embedding.new_tensor(self.root * self.epsilon**0.5, dtype=torch.float32)
        self.unit = torch.full_like(base.norm.weight, 1 / self.root, dtype=dtype)
        self.layers = [self._layer(layer, dtype) for layer in base.layers]
        self.norm: Tensor = (base.norm.weight * self.root).to(dtype)
        head = output_head(model, vocabulary)
        self.head = Head(head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype), head.softcap)
        cos, sin = base.rotary_emb(self.embedding.float(), torch.arange(length, device=self.embedding.device)[None])
        turn = torch.complex(cos[0, :, None, : self.width // 2].float(), sin[0, :, None, : self.width // 2].float())
        # Of each position and each head, (length, heads + 2 key heads, d / 2); values stay as they are.
        turns = turn.expand(-1, self.heads + self.key_heads, -1)
        self.rotation = torch.cat([turns, torch.ones_like(turn).expand(-1, self.key_heads, -1)], 1)

    def _layer(self, layer: Any, dtype: torch.dtype) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        pairs = _pairs(self.width, self.embedding.device)
        (q, q_bias), (k, k_bias), (v, v_bias), (out, out_bias), (gate, gate_bias), (up, up_bias), (down, down_bias) = (
            weight_and_bias(linear, self.precision)
            for linear in (
                *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
                *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
            )
        )
        qk_norm = None
        if hasattr(attention, "q_norm"):
            q_norm, k_norm = attention.q_norm.weight[pairs], attention.k_norm.weight[pairs]
            q_norm = q_norm * self.scaling
            qk_norm = torch.cat([q_norm.expand(self.heads, -1), k_norm.expand(self.key_heads, -1)]).to(dtype)
        else:
            q, q_bias = q * self.scaling, None if q_bias is None else q_bias * self.scaling
        joined = torch.cat([_reorder(q, pairs), _reorder(k, pairs), v]) * (layer.input_layernorm.weight * self.root)
        widened = torch.cat([gate, up]) * (layer.post_attention_layernorm.weight * self.root)
        qkv_bias = _join(*(None if each is None else _reorder(each, pairs) for each in (q_bias, k_bias)), v_bias)
        widened_bias = _join(gate_bias, up_bias)
        matrices = (joined, qkv_bias), (out, out_bias), (widened, widened_bias), (down, down_bias)
        (joined, qkv_bias), (out, out_bias), (widened, widened_bias), (down, down_bias) = (
            (weight.to(dtype).T.contiguous(), None if bias is None else bias.to(dtype)) for weight, bias in matrices
        )
        return _Layer(joined, qkv_bias, qk_norm, out, out_bias, widened, widened_bias, down, down_bias)

    def make_cache(self, rows: int, length: int) -> Tensor:
        """Return room for the keys and the values of some rows, (layers, 2, rows, key heads, length, d)."""
        shape = (len(self.layers), 2, rows, self.key_heads, length, self.width)
        # Zeros, because a masked cell still takes part in the product: 0 times nan would be nan.
        return torch.zeros(shape, dtype=self.embedding.dtype, device=self.embedding.device)

    def prefill(self, ids: Tensor, packing: Packing, cache: Tensor, starts: Tensor) -> Tensor:
        """Read packed prompts into the cache.

        Args:
            ids: Tokens of all prompts, (sum of lengths,).
            packing: Where each prompt starts and ends.
            cache: As `make_cache` makes it, one row for each prompt.
            starts: Column of the cache at which each prompt starts, (prompts,).

        Returns:
            Logits of the token after each prompt, (prompts, V) float32.
        """
        lengths = torch.tensor(packing.lengths, device=ids.device)
        row = torch.arange(len(starts), device=ids.device).repeat_interleave(lengths)
        column = starts[row] + packing.positions
        x, rotation = self.embedding[ids], self.rotation[packing.positions]
        for layer, cells in zip(self.layers, cache, strict=True):
            qkv = self._project(layer, x, rotation)
            q, k, v = qkv.split([self.heads, self.key_heads, self.key_heads], 1)
            cells[0, row, :, column], cells[1, row, :, column] = k, v
            x = self._finish(layer, x, attend_packed(q, k, v, packing, scaling=1.0).flatten(1))
        return self._logits(x[packing.starts + lengths - 1])

    def step(
        self,
        tokens: Tensor,
        rotation: Tensor,
        cache: Sequence[Tensor],
        bias: Tensor | None,
        column: Tensor | None = None,
    ) -> Tensor:
        """Read one more token of each row.

        Args:
            tokens: (rows,).
            rotation: Rows of `rotation` for their positions, (rows, heads + 2 key heads, d / 2).
            cache: Of each layer, the columns that are attended to, (2, rows, key heads, columns, d).
            bias: Added to the scores of the columns, (rows, 1, 1, columns), where some are not to be seen.
            column: Which column to write the token into, (1,); none is the last one.

        Returns:
            Logits of the next token, (rows, V) float32.
        """
        x = self.embedding[tokens]
        for layer, cells in zip(self.layers, cache, strict=True):
            qkv = self._project(layer, x, rotation)
            written = qkv[:, self.heads :].unflatten(1, (2, -1)).transpose(0, 1)
            if column is None:
                cells[:, :, :, -1] = written
            else:
                cells.index_copy_(3, column, written.unsqueeze(3))
            x = self._finish(layer, x, self._attend(qkv[:, : self.heads], cells, bias))
        return self._logits(x)

    def _attend(self, q: Tensor, cells: Tensor, bias: Tensor | None) -> Tensor:
        """Return what one query of each row gathers, (rows, heads, d) -> (rows, heads d)."""
        rows = len(q)
        keys, values = cells.unbind()
        # The queries of a group look at the same keys, so they stand where the positions of a longer text would.
        grouped = q.reshape(rows, self.key_heads, -1, self.width)
        if q.is_cuda:
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=1.0).flatten(1)
        # On a CPU two products are faster than the fused kernel, which is made for many queries.
        keys, values, grouped = keys.flatten(0, 1), values.flatten(0, 1), grouped.flatten(0, 1)
        scores = torch.bmm(grouped, keys.transpose(1, 2))
        if bias is not None:
            scores.view(rows, self.key_heads, *scores.shape[1:]).add_(bias)
        return torch.bmm(scores.softmax(-1), values).view(rows, -1)

    def _project(self, layer: _Layer, x: Tensor, rotation: Tensor) -> Tensor:
        """Return queries, keys and values, (n, heads + 2 key heads, d)."""
        qkv = _affine(self._normalised(x), layer.qkv, layer.qkv_bias).view(len(x), -1, self.width)
        if layer.qk_norm is not None:
            count = len(layer.qk_norm)
            qkv[:, :count] = F.rms_norm(qkv[:, :count], (self.width,), None, self.epsilon) * layer.qk_norm
        turned = torch.view_as_complex(qkv.float().unflatten(-1, (-1, 2))).mul_(rotation)
        rotated: Tensor = torch.view_as_real(turned).flatten(-2).to(x.dtype)
        return rotated

    def _finish(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        """Return what a layer makes of its input (n, H) and of what attention gathered (n, heads d)."""
        x = torch.addmm(x, attended, layer.out)
        if layer.out_bias is not None:
            x += layer.out_bias
        gate, up = _affine(self._normalised(x), layer.up, layer.up_bias).tensor_split(2, -1)
        x = x.addmm_(self.activation(gate).mul_(up), layer.down)
        return x if layer.down_bias is None else x.add_(layer.down_bias)

    def _normalised(self, x: Tensor) -> Tensor:
        """Return rows of length one, but for the epsilon, (n, H)."""
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], self.unit, self.epsilon)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        normalised: Tensor = (x / norm.hypot_(self.least)).to(x.dtype)
        return normalised

    def _logits(self, x: Tensor) -> Tensor:
        return self.head.logits(self._normalised(x) * self.norm)


def _affine(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return x @ matrix if bias is None else torch.addmm(bias, x, matrix)


def _join(*biases: Tensor | None) -> Tensor | None:
    """Join biases, all of which are there or none."""
    present = [each for each in biases if each is not None]
    return torch.cat(present) if present else None


def _pairs(width: int, device: torch.device) -> Tensor:
    """Return the order in which channels that rotate together are neighbours: 0, d/2, 1, d/2 + 1, ..."""
    return torch.arange(width, device=device).view(2, -1).T.flatten()


def _reorder(weight: Tensor, order: Tensor) -> Tensor:
    """Reorder the output channels within each head, (heads d, ...)."""
    reordered: Tensor = weight.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
    return reordered


def weight_and_bias(linear: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return what a linear layer computes with, adapters and quantisation included.

    Whatever stands in the place of a plain layer, it is known by what it makes of the unit vectors, in the precision in
    which the model reads.
    """
    if type(linear) is nn.Linear:
        return linear.weight, linear.bias
    some: Tensor = next(linear.parameters())
    units = torch.eye(linear.in_features, device=some.device, dtype=dtype)
    bias: Tensor = linear(torch.zeros_like(units[:1]))[0]
    return (linear(units) - bias).T, bias


def _rows(embedding: Any) -> Tensor:
    """Return the vector of each token, adapters included, (V, H)."""
    rows: Tensor = embedding.weight
    if type(embedding) is nn.Embedding:
        return rows
    adapted: Tensor = embedding(torch.arange(len(rows), device=rows.device))
    return adapted
