"""What zeroth-order steps are measured against: MeZO and FedKSeed, as their authors wrote them.

Weights are moved in place along a direction that is drawn anew, from its seed, for each of the
four passes of a step: to +epsilon, to -epsilon, back, and down the gradient.  It shares nothing
with meadow's own path, so that learning and speed can be compared with something independent.

MeZO: Malladi et al. 2023 (arXiv 2305.17333), princeton-nlp/MeZO.  FedKSeed: Qin et al. 2024
(arXiv 2312.06353), zhenqincn/FedKSeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Draw = Callable[[torch.Generator, Tensor], Tensor]
"""A direction's part for one parameter, from a generator that stands where the last one left it."""

_UNDECAYED = ("bias", "layer_norm", "layernorm")


def gaussian(generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers."""
    return torch.normal(
        0.0, 1.0, size=like.shape, generator=generator, device=like.device, dtype=like.dtype
    )


def signs(generator: torch.Generator, like: Tensor) -> Tensor:
    """+1 or -1 with equal probability."""
    drawn = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * drawn - 1).to(like.dtype)


def rank_one_signs(generator: torch.Generator, like: Tensor) -> Tensor:
    """u v^T of two vectors of signs, for a matrix (m, n)."""
    u, v = like.new_empty(like.shape[0], 1), like.new_empty(1, like.shape[1])
    return signs(generator, u) * signs(generator, v)


class Mezo:
    """MeZO's step over some parameters, by name."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        lr: float,
        epsilon: float,
        weight_decay: float = 0.0,
        draw: Draw = gaussian,
    ) -> None:
        self.parameters, self.lr, self.epsilon = parameters, lr, epsilon
        self.weight_decay, self.draw = weight_decay, draw
        self._generator = torch.Generator(next(iter(parameters.values())).device)

    def step(self, seed: int, loss: Callable[[], float]) -> float:
        """One step along the direction of `seed`; the projected gradient.

        Raises ValueError for a seed of more than 32 bits.
        """
        self.perturb(seed, 1)
        plus = loss()
        self.perturb(seed, -2)
        minus = loss()
        self.perturb(seed, 1)
        gradient = (plus - minus) / (2 * self.epsilon)
        if math.isfinite(gradient):
            self.update(seed, gradient)
        return gradient

    def perturb(self, seed: int, factor: float) -> None:
        """w += factor * z * epsilon."""
        for _, parameter, z in self._drawn(seed):
            parameter.data = parameter.data + factor * z * self.epsilon

    def update(self, seed: int, gradient: float) -> None:
        """w -= lr (g z + decay w); biases and norms do not decay."""
        for name, parameter, z in self._drawn(seed):
            if any(part in name for part in _UNDECAYED):
                parameter.data = parameter.data - self.lr * (gradient * z)
            else:
                parameter.data = parameter.data - self.lr * (
                    gradient * z + self.weight_decay * parameter.data
                )

    def _drawn(self, seed: int) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        if not 0 <= seed < 2**32:  # more bits are lost: torch's generator on a CPU reads no others
            raise ValueError(f"the seed {seed} has more than 32 bits")
        self._generator.manual_seed(seed)
        for name, parameter in self.parameters.items():
            yield name, parameter, self.draw(self._generator, parameter.data)


class FedKSeed(Mezo):
    """FedKSeed's step, and its rebuild from the seeds of the pool."""

    def perturb(self, seed: int, factor: float) -> None:
        for _, parameter, z in self._drawn(seed):
            parameter.data = parameter.data + factor * self.epsilon * z

    def update(self, seed: int, gradient: float) -> None:
        for _, parameter, z in self._drawn(seed):
            parameter.data = parameter.data - self.lr * (gradient * z)

    def rebuild(self, gradients: Sequence[tuple[int, float]]) -> None:
        """One pass over all parameters for each (seed, accumulated gradient)."""
        for seed, gradient in gradients:
            self.update(seed, gradient)


@contextmanager
def borrowed(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Give the parameters their own tensors back afterwards: a step puts others in their place."""
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]
