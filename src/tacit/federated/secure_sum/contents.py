"""What the clients' vectors hold in a round whose result is a weighted mean, and what their sum says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tacit.dp.clipping import clip
from tacit.errors import InputError
from tacit.federated.algorithm import Extra, ServerState, Update
from tacit.federated.secure_sum.bounded import BoundedEncoding
from tacit.federated.secure_sum.encoding import Encoding, Scalar
from tacit.federated.secure_sum.noise_shares import NoiseShares
from tacit.federated.secure_sum.ring import Words
from tacit.ring.prg import Prg

_WEIGHT_STEP = 2.0**-29
_LOSS_STEP = 2.0**-16
_NUMBER = (2.0**29, 2.0**-30)
_COUNTER = 2.0**40


class Contents(Protocol):
    """What a client's vector holds in one round."""

    @property
    def encoding(self) -> Encoding:
        """How it becomes residues."""
        ...

    @property
    def description(self) -> str:
        """All of it in a line, equal for equal contents: what clients and server agree on before a round."""
        ...

    def encode(self, update: Update, prg: Prg) -> Words:
        """A client's residues.

        Args:
            update: of the client.
            prg: where the rounding comes from, and noise if there is any: then it is fresh, or derived for this alone.

        Raises:
            InputError: the update carries something else than the round sums.
            RangeError: something in it is not finite, or too large to be summed.
        """
        ...

    def decode(self, total: Words, survivors: int) -> Update:
        """The mean of the updates of those whose vectors were summed; its ``nbytes`` are 0.

        Raises:
            InputError: the weights add up to 0.
        """
        ...


@dataclass(frozen=True)
class BoundedContents:
    """A plain mean of updates whose norm is bounded, and nothing else: what can be verified, or noised.

    Nobody is told numbers of examples or losses: of a decoded mean they are 0 and NaN.

    Args:
        state: of the round.
        bounded: how an update becomes integers.
        shares: the noise; ``None`` for none.
    """

    state: ServerState
    bounded: BoundedEncoding
    shares: NoiseShares | None = None

    @property
    def encoding(self) -> Encoding:
        """See `Contents`."""
        return self.bounded.encoding if self.shares is None else self.shares.encoding

    @property
    def description(self) -> str:
        """See `Contents`."""
        noise = "" if self.shares is None else f"; {self.shares.share!r} added by {self.shares.added_by}"
        return f"{self.encoding.description}; each of norm {self.bounded.bound!r} at most{noise}"

    def encode(self, update: Update, prg: Prg) -> Words:
        """See `Contents`."""
        if update.extra:
            raise InputError(f"an update carries {sorted(update.extra)}, and the round sums updates alone")
        encoder = self.bounded if self.shares is None else self.shares
        return self.encoding.ring.residues(encoder.integers(update.delta, prg))

    def decode(self, total: Words, survivors: int) -> Update:
        """See `Contents`."""
        vector, _ = self.encoding.decode(total)
        delta = vector.div(survivors).to(self.state.parameters.dtype)
        return Update(delta, self.state.buffers, 0, math.nan, 0, float(survivors))


@dataclass(frozen=True)
class WeightedContents:
    """A weighted mean of updates, and whatever else their algorithm sends.

    In the entries stands w_k Δ_k, w_k being the client's weight as a fraction of the largest one there can be, and
    after it every extra that is shaped like the model, in units of its range. In the numbers stand w_k, its examples,
    its summed loss, its buffers (times w_k, but for counters) and other extras.

    Args:
        state: of the round.
        buffers: those that clients send.
        extras: what else they send.
        encoding: made by `of`.
        most_weight: the largest weight there can be.
        most_loss: the largest mean loss of a client.
        norm: the bound that every client clips its update to, all of them weighing the same; ``None`` for none.
        kept: what an update is multiplied by after that.
    """

    state: ServerState
    buffers: Mapping[str, Tensor]
    extras: Mapping[str, Extra]
    encoding: Encoding
    most_weight: float
    most_loss: float
    norm: float | None
    kept: float

    @classmethod
    def of(
        cls,
        state: ServerState,
        buffers: Mapping[str, Tensor],
        extras: Mapping[str, Extra],
        *,
        entry_clip: float,
        clients: int,
        bits: int,
        most_weight: float,
        most_examples: int,
        most_loss: float,
        norm: float | None = None,
        kept: float = 1.0,
    ) -> WeightedContents:
        """The contents of a round in which ``clients`` take part; the other arguments are as for the class.

        Raises:
            InputError: the sum could overflow, or a setting is out of range.
        """
        wide = {name: extra for name, extra in extras.items() if extra.shape == state.parameters.shape}
        scalars = [
            Scalar("weight", 1.0, _WEIGHT_STEP),
            Scalar("examples", float(most_examples)),
            Scalar("summed loss", most_loss * most_examples, _LOSS_STEP),
        ]
        for name, buffer in buffers.items():
            kind = _NUMBER if buffer.is_floating_point() else (_COUNTER, 1.0)
            if buffer.numel():
                scalars.append(Scalar(f"buffer {name}", *kind, count=buffer.numel()))
        for name, extra in extras.items():
            if name not in wide:
                scalars.append(Scalar(name, *_NUMBER, count=extra.shape.numel()))
        size = state.layout.size * (1 + len(wide))
        encoding = Encoding(size, entry_clip, clients, bits, tuple(scalars))
        return cls(state, buffers, extras, encoding, most_weight, most_loss, norm, kept)

    @property
    def description(self) -> str:
        """See `Contents`."""
        norm = "" if self.norm is None else f"; each of norm {self.norm!r} times {self.kept!r} at most"
        return f"{self.encoding.description}; weights up to {self.most_weight!r}{norm}"

    def encode(self, update: Update, prg: Prg) -> Words:
        """See `Contents`; where the rounding comes from need not be secret."""
        if update.extra.keys() != self.extras.keys():
            raise InputError(f"an update carries {sorted(update.extra)}, and the round sums {sorted(self.extras)}")
        weight, delta = update.weight / self.most_weight, update.delta
        if self.norm is not None:
            weight, delta = 1.0, clip(delta, self.norm)
        loss = max(-self.most_loss, min(update.loss, self.most_loss))
        entries, numbers = [delta * (self.kept * weight)], [weight, update.examples, loss * update.examples]
        for name in self.buffers:
            buffer = update.buffers[name]
            values = buffer.double() * weight if buffer.is_floating_point() else buffer
            numbers += values.reshape(-1).tolist()
        for name, extra in self.extras.items():
            if self._is_wide(extra):
                entries.append(update.extra[name] / extra.times)
            else:
                numbers += update.extra[name].reshape(-1).tolist()
        vector = torch.cat(entries) if len(entries) > 1 else entries[0]
        return self.encoding.encode(vector, numbers, prg).words

    def decode(self, total: Words, survivors: int) -> Update:
        """See `Contents`.

        Floating-point buffers become the weighted mean; of other buffers (counters), the plain mean rounded up.
        """
        vector, (weight, examples, loss, *numbers) = self.encoding.decode(total)
        if not weight > 0:
            raise InputError(f"the weights of the updates add up to {weight:g}: give at least one client some")
        parts = torch.split(vector, self.state.layout.size)
        wide, rest = iter(parts[1:]), iter(numbers)
        buffers = {name: _mean_of(buffer, rest, weight, survivors) for name, buffer in self.buffers.items()}
        extra = {
            name: next(wide) * extra.times if self._is_wide(extra) else _taken(rest, extra.shape)
            for name, extra in self.extras.items()
        }
        return Update(
            delta=parts[0].div(weight).to(self.state.parameters.dtype),
            buffers={**self.state.buffers, **buffers},
            examples=round(examples),
            loss=loss / examples,
            nbytes=0,
            weight=weight * self.most_weight,
            extra=extra,
        )

    def _is_wide(self, extra: Extra) -> bool:
        return extra.shape == self.state.parameters.shape


def _taken(numbers: Iterator[float], shape: torch.Size) -> Tensor:
    return torch.tensor([next(numbers) for _ in range(shape.numel())], dtype=torch.float64).reshape(shape)


def _mean_of(buffer: Tensor, numbers: Iterator[float], weight: float, clients: int) -> Tensor:
    summed = _taken(numbers, buffer.shape)
    if buffer.is_floating_point():
        return (summed / weight).to(buffer.dtype)
    return summed.div(clients).ceil().to(buffer.dtype)
