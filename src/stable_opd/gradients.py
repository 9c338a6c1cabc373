"""How the gradients of the terms compare: who is the strongest, and who pulls against whom."""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from stable_opd.sharding import whole


def compare_gradients(
    names: Sequence[str], backward: Callable[[str], None], parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """Return the norm of each term's gradient, and the cosine between each pair of them.

    Every term meets the same random numbers, which are those that the step itself will meet; so dropout is no
    difference between the terms, and the step does not depend on whether they were compared. The gradients of all terms
    are in memory at once. What a constraint pulls on the weights themselves is not part of them.

    Args:
        names: The terms.
        backward: Adds the gradient of one term to that of the parameters.
        parameters: What is trained; their gradients are those of nobody, before and after.

    Returns:
        ``gradient_norm/<term>`` and ``gradient_cosine/<term>/<term>``, scalars; a cosine with a term that has no
        gradient is nan.
    """
    found: dict[str, list[Tensor]] = {}
    devices = {each.device for each in parameters if each.device.type == "cuda"}
    for name in names:
        with torch.random.fork_rng(devices):
            backward(name)
        found[name] = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        for each in parameters:
            each.grad = None
    norms = {name: _dot(each, each).sqrt() for name, each in found.items()}
    logged = {f"gradient_norm/{name}": norm for name, norm in norms.items()}
    for one, other in combinations(names, 2):
        cosine = _dot(found[one], found[other]) / (norms[one] * norms[other])
        logged[f"gradient_cosine/{one}/{other}"] = cosine
    return logged


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return whole(torch.stack([(a.float() * b.float()).sum() for a, b in zip(one, other, strict=True)]).sum())
