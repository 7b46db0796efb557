"""A federated round whose server sees the sum of the cohort's updates and no single one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from tacit.errors import InputError, RangeError
from tacit.federated.algorithm import Algorithm, ServerState, Update
from tacit.federated.central_privacy import CentralPrivacy, bound_of, wrapped
from tacit.federated.fedavg import Mean
from tacit.federated.mean import weighted_mean
from tacit.federated.robust import ClippedMean
from tacit.federated.secure_sum.contents import WeightedContents
from tacit.federated.secure_sum.encoding import Encoding
from tacit.federated.secure_sum.interface import ABOUT_NOTHING, SecureSum, Summed
from tacit.federated.secure_sum.ring import Words
from tacit.ring.prg import Prg

UpdateOf = Callable[[int], Update | None]
"""The update of one client of the cohort; ``None`` if the client is lost before it has one."""


@dataclass(frozen=True)
class SecureMean:
    """The weighted mean of a cohort by a secure sum of what each client encodes.

    Client k sends floor(s w_k Δ_k + u) for its weight w_k as a fraction of the largest one there can be, and with it
    w_k, its number of examples, its summed loss, its buffers and what else the algorithm sends; the mean is the
    quotient of the sums.

    *Guarantees*: each entry of Σ w_k Δ_k is within n / s of that of the clamped updates and right in expectation, with
    s = (2^(bits−1) − 1) / clip; entries of w_k Δ_k beyond ``clip`` are clamped to it. Weights are exact to 2^-30,
    buffers to 2^-31. Under `CentralPrivacy` a client first shrinks its update by what rounding could add to the norm,
    √D / s, so that what it sends keeps the bound S that the noise was chosen for.

    Args:
        protocol: how the sum is taken, such as `tacit.federated.secure_sum.masked.MaskedSum`.
        clip: the largest magnitude of an entry of a weighted update; ``None`` is the norm that updates are clipped to,
            if they are, and else 1.
        bits: of one client's entry, from 2 to 24.
        most_loss: the largest mean loss of a client; larger ones count as this.

    Raises:
        InputError: a setting is out of range.
    """

    protocol: SecureSum = field(repr=False)
    clip: float | None = None
    bits: int = 16
    most_loss: float = 1e4

    def __post_init__(self) -> None:
        Encoding(1, 1.0 if self.clip is None else self.clip, 1, self.bits)

    def check(self, algorithm: Algorithm, state: ServerState) -> None:
        """Refuse an algorithm whose round is not one weighted sum.

        Raises:
            InputError: it combines updates otherwise.
        """
        mean = _mean_of(algorithm)
        if mean is not weighted_mean and not isinstance(mean, ClippedMean):
            name = getattr(mean, "__name__", mean)
            raise InputError(
                f"a secure sum reveals no single update, which {name} needs: use the weighted mean, or ClippedMean"
            )
        buffers = _sent_buffers(algorithm, state)
        if isinstance(mean, ClippedMean) and (buffers or algorithm.extras(state)):
            raise InputError(
                f"{mean} takes the median of buffers and nothing beside the model, and a secure sum reveals no median: "
                "use a model without buffers, or the weighted mean"
            )
        for name, buffer in buffers.items():
            if buffer.is_complex():
                raise InputError(f"buffer {name} is of {buffer.dtype}, which a secure sum does not carry")

    def combine(
        self,
        algorithm: Algorithm,
        state: ServerState,
        sizes: Tensor,
        cohort: Sequence[int],
        update_of: UpdateOf,
        rounding_of: Callable[[int], Prg] = lambda client: Prg.fresh(),
        application_of: Callable[[str], bytes] = lambda agreed: ABOUT_NOTHING,
    ) -> tuple[Update, Summed]:
        """Run one round of the protocol.

        Args:
            algorithm: whose updates are summed; as `check` allows.
            state: of this round.
            sizes: how many examples each client has, int64 of shape ``(N,)``; the largest is public.
            cohort: the clients, ascending.
            update_of: called at most once a client, in the order of the cohort.
            rounding_of: where a client's rounding comes from, which need not be secret: from a seed, the mean is the
                same each time, for the masks leave no trace in it.
            application_of: what the sum is for, as `SecureSum.sum` is told, given `WeightedContents.description`.

        Returns:
            The mean as one update, its ``nbytes`` those of all frames to the server; and the sum's own account, which
            says of a client whose update cannot be summed why.

        Raises:
            InputError: the cohort is too small; nothing has been sent.
            PeerError: too many clients were lost; nothing is revealed.
        """
        contents = self._contents(algorithm, state, sizes, len(cohort))
        unfit: dict[int, str] = {}

        def vector_of(client: int) -> Words | None:
            update = update_of(client)
            if update is None:
                return None
            try:
                return contents.encode(update, rounding_of(client))
            except RangeError as error:
                unfit[client] = f"has nothing that can be summed: {error}"
                return None

        encoding = contents.encoding
        application = application_of(contents.description)
        summed = self.protocol.sum(encoding.ring, encoding.length, cohort, vector_of, application)
        mean = contents.decode(summed.total, len(summed.survivors))
        summed = replace(summed, lost={**summed.lost, **unfit})
        return replace(mean, nbytes=sum(summed.traffic.up.values())), summed

    def _contents(self, algorithm: Algorithm, state: ServerState, sizes: Tensor, clients: int) -> WeightedContents:
        """What the vectors of a round hold."""
        norm, kept = _norm_of(algorithm, state), 1.0
        clip = self.clip or norm or 1.0
        if norm is not None and _guard(algorithm) is not None:
            kept = _room_for_rounding(Encoding(state.layout.size, clip, clients, self.bits), norm)
        return WeightedContents.of(
            state,
            _sent_buffers(algorithm, state),
            algorithm.extras(state),
            entry_clip=clip,
            clients=clients,
            bits=self.bits,
            most_weight=_most_weight(algorithm, sizes),
            most_examples=int(sizes.max()),
            most_loss=self.most_loss,
            norm=norm,
            kept=kept,
        )


def _mean_of(algorithm: Algorithm) -> Mean:
    """How an algorithm combines updates."""
    return next((layer.mean for layer in wrapped(algorithm) if hasattr(layer, "mean")), weighted_mean)


def _guard(algorithm: Algorithm) -> CentralPrivacy | None:
    return next((layer for layer in wrapped(algorithm) if isinstance(layer, CentralPrivacy)), None)


def _norm_of(algorithm: Algorithm, state: ServerState) -> float | None:
    """What every client clips its update to, if it does."""
    if _guard(algorithm) is not None:
        return bound_of(state)
    mean = _mean_of(algorithm)
    return mean.norm if isinstance(mean, ClippedMean) else None


def _sent_buffers(algorithm: Algorithm, state: ServerState) -> Mapping[str, Tensor]:
    return state.buffers if _guard(algorithm) is None else {}


def _room_for_rounding(encoding: Encoding, bound: float) -> float:
    """By how much to shrink a vector of norm ``bound`` so that it is no longer after rounding."""
    most = math.sqrt(encoding.size) / encoding.scale
    if most >= bound:
        raise InputError(
            f"rounding to {encoding.bits} bits of a clip of {encoding.clip:g} may add {most:.3g} to the norm of an "
            f"update that is clipped to {bound:g}: choose more bits, or a smaller clip of entries"
        )
    return 1 - most / bound


def _most_weight(algorithm: Algorithm, sizes: Tensor) -> float:
    """The largest weight that a client can have, which all can know."""
    for layer in wrapped(algorithm):
        if isinstance(layer, CentralPrivacy):
            return 1.0
        if hasattr(layer, "weighting"):
            return max(float(layer.weighting(size)) for size in set(sizes[sizes > 0].tolist()))
    return float(sizes.max())
