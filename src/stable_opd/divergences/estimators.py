"""Losses whose gradient, back-propagated as they are, is that of a KL divergence; each from the written token alone.

With r = q / p of a token that the student drew, and rho its importance ratio, for tokens that somebody else drew. The
names are those of the literature. What is right as the value of a divergence need not be right as a loss: the gradient
of the mean is not the mean of the gradients, because the student also decides what is drawn.

Source: Tang & Munos 2025 (arXiv 2506.09477) on the gradients; k4, k5 and k3++ as in EMA-PG, whose log-ratios are
clamped to +-20 too.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from stable_opd.divergences.base import LARGEST_LOG_RATIO, LEAST_LOGPROB

#: Largest logarithm of r, on both sides.
LIMIT = 20.0

#: Log-probs of the written tokens under the student, under the other model and under whoever drew them, (n,) each, to
#: the loss of each token and, without gradient, the estimated divergence.
Estimator = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
EstimatorName = Literal["k2", "k3pp", "k4", "k5", "k1", "k3", "stop_gradient"]


def k2(student_sampled: Tensor, other_sampled: Tensor, behaviour: Tensor) -> tuple[Tensor, Tensor]:
    """Half the squared log-ratio: the gradient of the reverse KL, and a value that is biased and never negative.

    rho * 1/2 (log r)^2,  rho without gradient
    """
    log_r = _log_ratio(student_sampled, other_sampled)
    half_square = log_r.square() / 2
    return _ratio(student_sampled, behaviour).detach() * half_square, half_square.detach()


def k4(student_sampled: Tensor, other_sampled: Tensor, behaviour: Tensor) -> tuple[Tensor, Tensor]:
    """The log-ratio as a reward: the gradient of the reverse KL, and its unbiased value, which may be negative.

    -rho * log r,  log r without gradient
    """
    log_r = _log_ratio(student_sampled, other_sampled).detach()
    return -_ratio(student_sampled, behaviour) * log_r, -log_r


def k3pp(student_sampled: Tensor, other_sampled: Tensor, behaviour: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `k4` with the value of k3, which is unbiased, never negative and of low variance.

        rho * (r - 1 - log r)

    Its two gradients, (1 - r) of the bracket and r - 1 - log r of the ratio, add up to -log r. The sum is taken here on
    paper, because in float32 the ratios would leave little of it.
    """
    log_r = _log_ratio(student_sampled, other_sampled).detach()
    value = log_r.expm1() - log_r
    rho = _ratio(student_sampled, behaviour)
    return rho.detach() * value - log_r * (rho - rho.detach()), value


def k5(student_sampled: Tensor, other_sampled: Tensor, behaviour: Tensor) -> tuple[Tensor, Tensor]:
    """The forward KL by importance sampling, with a baseline: the gradient (1 - r) grad log p.

    rho * (r log r + log p - sg(log p)),  rho and the factor r without gradient
    """
    log_r = _log_ratio(student_sampled, other_sampled)
    r = log_r.detach().exp()
    loss = r * log_r + student_sampled - student_sampled.detach()
    return _ratio(student_sampled, behaviour).detach() * loss, r * log_r.detach()


_ESTIMATORS: dict[str, Estimator] = {"k2": k2, "k3pp": k3pp, "k4": k4, "k5": k5}

_REFUSED = {
    "k1": (
        "As a loss, log p - log q has the gradient of log p, whose mean is zero and in which the teacher does not "
        "occur. Use k4, or k2."
    ),
    "k3": (
        "As a loss, r - 1 - log r has the gradient of the forward KL, although its value is that of the reverse KL. "
        "Use k3pp for the reverse KL with the same value, and k5 or ForwardKL for the forward KL."
    ),
    "stop_gradient": (
        "The advantage -u log u, which is the forward KL's integrand without its gradient, descends no divergence that "
        "has been stated, and training by it collapses. Use SampledForwardKL."
    ),
}


def estimator(name: str) -> Estimator:
    """Return a loss by its name.

    Raises:
        ValueError: If its gradient is not that of the divergence that it is the value of, or nobody knows it.
    """
    if name in _REFUSED:
        raise ValueError(f"Expected an estimator that is right as a loss, but got {name!r}. {_REFUSED[name]}")
    if name not in _ESTIMATORS:
        raise ValueError(f"Expected an estimator out of {', '.join(_ESTIMATORS)}, but got {name!r}. Use k2 or k4.")
    return _ESTIMATORS[name]


def _log_ratio(student_sampled: Tensor, other_sampled: Tensor) -> Tensor:
    log_r = other_sampled.clamp(min=LEAST_LOGPROB) - student_sampled
    # The gradient goes on at its clamped size: a token that is far off is not to be left there.
    return log_r + (log_r.clamp(-LIMIT, LIMIT) - log_r).detach()


def _ratio(student_sampled: Tensor, behaviour: Tensor) -> Tensor:
    return torch.exp((student_sampled - behaviour).clamp(max=LARGEST_LOG_RATIO))
