"""Differentially private training at one client: what leaves it hides any one of its examples.

Abadi et al. 2016, *Deep Learning with Differential Privacy*, algorithm 1, with Poisson batches of expected size B.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from tacit.dp.accounting import SampledGaussian
from tacit.dp.mechanisms import add_gaussian_
from tacit.dp.models import refuse_batch_statistics
from tacit.errors import InputError
from tacit.federated.layout import Layout
from tacit.federated.local.ghost import GhostGradients
from tacit.federated.local.per_example import PerExampleGradients
from tacit.federated.local.work import LocalResult, LocalWork, Loss
from tacit.ring.prg import Prg


class ClippedGradients(Protocol):
    """Computes sums of clipped per-example gradients of one model and one loss."""

    def load(self, trained: Tensor) -> None:
        """Compute from now on with the parameters in ``trained``, shape ``(D,)``, by reference."""
        ...

    def clipped_sum(self, inputs: Tensor, targets: Tensor, bound: float, out: Tensor) -> None:
        """Write Σ_i clip(∇ℓ_i, bound) over n ≥ 1 examples to ``out``, shape ``(D,)``, every entry of it."""
        ...


class DpSgdSolver:
    """A `LocalSolver` whose result is (ε, δ)-differentially private for every single example of the client.

    With n examples, B the batch size and T = E ⌈n / B⌉ steps, each step takes every example independently with
    probability q = B / n, and::

        g ← (Σ_{i in batch} clip(∇ℓ_i(w), S) + N(0, (zS)²)) / B
        w ← w − lr (g + proximal (w − anchor) + correction)

    *Guarantees*: the trained parameters are the only thing that depends on the examples, and cost what `local_event`
    says. Their number n is not hidden. Buffers leave as they came, and the loss is reported as 0: the true one would
    leak.

    *Cost*: for chains of linear and convolution layers about the time of plain training and the noise (2–3 ns an entry
    and step); for other models several times that.

    Args:
        model: the architecture; copied. Layers that draw random numbers take them as in `PlainSolver`.
        loss: mean loss of a batch; each example is given to it alone.
        clip: S, the greatest norm of one example's gradient over all parameters together.
        noise_multiplier: z; 0 is clipping without privacy.
        noise_seed: in [0, 2^128), for experiments that are to be repeated only: sampling and noise then follow from it
            and the work's generator. ``None`` takes them from the operating system, as privacy demands.

    Raises:
        InputError: a setting is out of range, or the model has batch normalisation.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, *, clip: float, noise_multiplier: float, noise_seed: int | None = None
    ) -> None:
        if not (clip > 0 and math.isfinite(clip)):
            raise InputError(f"clip={clip}: the bound on one example's gradient is a number above 0, such as 1.0")
        SampledGaussian(noise_multiplier)
        refuse_batch_statistics(model)
        self.layout = Layout.of(model)
        self._clip = clip
        self._noise_multiplier = noise_multiplier
        self._root = None if noise_seed is None else seeded(noise_seed)
        self._gradients: ClippedGradients = GhostGradients.of(model, loss) or PerExampleGradients(model, loss)

    def __call__(self, work: LocalWork) -> LocalResult:
        """See `LocalSolver`."""
        examples = work.examples
        event = local_event(len(examples), work.batch_size, work.epochs, self._noise_multiplier)
        expected = event.sampling_rate * len(examples)
        number = int(torch.randint(2**62, (), generator=work.generator))
        prg = Prg.fresh() if self._root is None else self._root.derive("dp-sgd", number)
        trained = work.parameters.clone()
        self._gradients.load(trained)
        gradient = torch.empty_like(trained)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(work.layer_seed())
            for _ in range(event.times):
                batch = examples.subset(poisson_batch(len(examples), event.sampling_rate, prg))
                if len(batch):
                    self._gradients.clipped_sum(batch.inputs, batch.targets, self._clip, gradient)
                else:
                    gradient.zero_()
                add_gaussian_(gradient, self._noise_multiplier * self._clip, prg)
                drift = work.drift(trained)
                trained.add_(gradient, alpha=-work.lr / expected)
                if drift is not None:
                    trained.add_(drift, alpha=-work.lr)
        buffers = {name: buffer.clone() for name, buffer in work.buffers.items()}
        return LocalResult(trained, buffers, 0.0, event.times)


def local_event(examples: int, batch_size: int | None, epochs: int, noise_multiplier: float) -> SampledGaussian:
    """What `DpSgdSolver` does to one client's examples in one piece of work.

    Args:
        examples: n, at least 1.
        batch_size: B; ``None`` or more than n is every example in each step.
        epochs: E.
        noise_multiplier: z.
    """
    size = min(batch_size or examples, examples)
    return SampledGaussian(noise_multiplier, size / examples, epochs * -(-examples // size))


def poisson_batch(examples: int, rate: float, prg: Prg) -> Tensor:
    """The indices of a Poisson sample, int64, ascending, possibly none; secret, as amplification assumes."""
    if rate == 1:
        return torch.arange(examples)
    return (prg.words((examples,)) < int(rate * 2**64) - 2**63).nonzero()[:, 0]


def seeded(noise_seed: int) -> Prg:
    """The root of all noise of an experiment that is to be repeated.

    Raises:
        InputError: the seed is not in [0, 2^128).
    """
    if not 0 <= noise_seed < 1 << 128:
        raise InputError(f"noise_seed={noise_seed}: give a whole number from 0 to 2^128 − 1, or None for real privacy")
    return Prg(noise_seed.to_bytes(16, "big"))
