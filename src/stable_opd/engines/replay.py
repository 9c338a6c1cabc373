"""Decoding steps of fixed shape, recorded once and replayed on a GPU.

A decoding step starts hundreds of small kernels, and a GPU waits for each to be started. A recorded step (a CUDA
graph) starts them all at once, but its shapes and addresses are fixed: so the column to write is a tensor, and all
columns of a fixed width are attended to, those that are still empty being hidden by the bias.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stable_opd.engines.decoder import Decoder

#: Columns by which the width of recorded steps grows: wider steps read more that is hidden, narrower ones are recorded
#: more often.
STRIDE = 512


def recordable(device: torch.device) -> bool:
    """Return whether steps are recorded on a device."""
    return device.type == "cuda"


class ReplayedStep:
    """A decoding step of some rows over some columns.

    On a device that cannot record, the same step is taken afresh each time, so the path can be tested anywhere.

    Args:
        decoder: The model.
        cells: Of each layer, the cache of the rows, (2, rows, key heads, columns, d).
        starts: First column that each row may see, (rows,).
        column: The next column to write; those before it are filled.
    """

    def __init__(self, decoder: Decoder, cells: Sequence[Tensor], starts: Tensor, column: int) -> None:
        self.width = min(cells[0].shape[3], -(-(column + 1) // STRIDE) * STRIDE)
        self.decoder, self.starts = decoder, starts
        self.cells = [layer[..., : self.width, :] for layer in cells]
        places = torch.arange(self.width, device=starts.device)
        hidden = (places < starts[:, None]) | (places >= column)
        bias = torch.zeros(hidden.shape, dtype=cells[0].dtype, device=hidden.device)
        self.bias = bias.masked_fill_(hidden, -float("inf"))[:, None, None]
        self.tokens = torch.zeros_like(starts)
        self.column = torch.full((1,), column, device=starts.device)
        self.recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def __call__(self, tokens: Tensor, column: int) -> Tensor:
        """Read one more token of each row into a column; return the logits, which the next call overwrites."""
        self.tokens.copy_(tokens)
        self.column.fill_(column)
        if not recordable(tokens.device):
            return self._step()
        if self.recorded is None:
            self.recorded = self._record()
        graph, logits = self.recorded
        graph.replay()
        return logits

    def _step(self) -> Tensor:
        self.bias.index_fill_(3, self.column, 0)
        rotation = self.decoder.rotation[self.column - self.starts]
        return self.decoder.step(self.tokens, rotation, self.cells, self.bias, self.column)

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Once outside of the recording, where libraries may set themselves up; a step that is repeated changes nothing.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step()
        return graph, logits
