"""Random choices that follow from what they are for, not from how often somebody drew before.

Every choice is keyed by (seed, global step, prompt, sample). So a resumed run equals an uninterrupted one, and the text
of a row does not depend on how the batch was spread over processes.
"""

import hashlib
import os
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def global_seed() -> int:
    """Return the seed that ``seed_everything`` set, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def key(*parts: int | str) -> int:
    """Return a 63-bit number that follows from the parts and from nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniforms(keys: Sequence[int], count: int) -> Tensor:
    """Return ``count`` uniform numbers in [0, 1) for each key, (len(keys), count) float32, on the CPU."""
    generator = torch.Generator()
    return torch.stack([torch.rand(count, generator=generator.manual_seed(each), dtype=torch.float32) for each in keys])


def seed_step(step: int, rank: int) -> None:
    """Let what draws from the global generators in a step, such as dropout, draw the same whenever the step is taken.

    Args:
        step: Optimizer steps taken so far.
        rank: Number of this process.
    """
    seed = key(global_seed(), "step", step, rank)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
