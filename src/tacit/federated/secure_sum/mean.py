"""A federated round whose server sees the sum of the cohort's updates and no single one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from torch import Tensor

from tacit.errors import InputError, RangeError
from tacit.federated.algorithm import Algorithm, ServerState, Update
from tacit.federated.client_privacy import ClientPrivacy, wrapped
from tacit.federated.distributed_privacy import DistributedPrivacy
from tacit.federated.fedavg import Mean
from tacit.federated.mean import weighted_mean
from tacit.federated.robust import ClippedMean
from tacit.federated.secure_sum.bounded import BoundedEncoding
from tacit.federated.secure_sum.contents import BoundedContents, Contents, WeightedContents
from tacit.federated.secure_sum.encoding import Encoding
from tacit.federated.secure_sum.interface import ABOUT_NOTHING, Opening, SecureSum, Summed, unannounced
from tacit.federated.secure_sum.noise_shares import AddedBy
from tacit.federated.secure_sum.ring import Words
from tacit.federated.secure_sum.shared import SharedSum
from tacit.ring.prg import Prg

UpdateOf = Callable[[int], Update | None]
"""The update of one client of the cohort; ``None`` if the client is lost before it has one."""


@dataclass(frozen=True)
class SecureMean:
    """The weighted mean of a cohort by a secure sum of what each client encodes.

    Client k sends floor(s w_k Δ_k + u) for its weight w_k as a fraction of the largest one there can be, and with it
    w_k, its number of examples, its summed loss, its buffers and what else the algorithm sends; the mean is the
    quotient of the sums. Where norms are verified, or noise is in the sum, it sends its update alone, clipped and
    rounded so that the norm stays bounded (`BoundedEncoding`), and every client weighs the same.

    *Guarantees*: each entry of Σ w_k Δ_k is within n / s of that of the clamped updates and right in expectation, with
    s = (2^(bits−1) − 1) / clip; entries of w_k Δ_k beyond ``clip`` are clamped to it. Weights are exact to 2^-30,
    buffers to 2^-31. Under `CentralPrivacy` a client first shrinks its update by what rounding could add to the norm,
    √D / s, so that what it sends keeps the bound S that the noise was chosen for.

    Args:
        protocol: how the sum is taken, such as `tacit.federated.secure_sum.masked.MaskedSum`.
        clip: the largest magnitude of an entry of a weighted update; ``None`` is the norm that updates are clipped to,
            if they are, and else 1.
        bits: of one client's entry, from 2 to 24; fewer where distributed privacy's noise is far coarser than the grid.
        most_loss: the largest mean loss of a client; larger ones count as this.
        verified: have alice and bob verify, on shares, that no client's update is longer than the norm that all are
            clipped to, by `CentralPrivacy`, `DistributedPrivacy` or `ClippedMean`; a client that exceeds it is left
            out without being seen.

    Raises:
        InputError: a setting is out of range, or norms are to be verified by anybody but the two servers.
    """

    protocol: SecureSum = field(repr=False)
    clip: float | None = None
    bits: int = 16
    most_loss: float = 1e4
    verified: bool = False

    def __post_init__(self) -> None:
        Encoding(1, 1.0 if self.clip is None else self.clip, 1, self.bits)
        if self.verified and not isinstance(self.protocol, SharedSum):
            raise InputError(
                "verified norms take two servers that hold shares of every update: use the shared sum, or verify none"
            )

    @property
    def noised_by(self) -> AddedBy:
        """Who adds the noise of distributed privacy."""
        return "servers" if isinstance(self.protocol, SharedSum) else "clients"

    def check(self, algorithm: Algorithm, state: ServerState) -> None:
        """Refuse an algorithm whose round is not one weighted sum, or not one that can be verified as asked.

        Raises:
            InputError: it combines updates otherwise, or its clients' updates have no bound.
        """
        mean, guard = _mean_of(algorithm), _guard(algorithm)
        if mean is not weighted_mean and not isinstance(mean, ClippedMean):
            name = getattr(mean, "__name__", mean)
            raise InputError(
                f"a secure sum reveals no single update, which {name} needs: use the weighted mean, or ClippedMean"
            )
        buffers, extras = _sent_buffers(algorithm, state), algorithm.extras(state)
        if isinstance(mean, ClippedMean) and (buffers or extras):
            raise InputError(
                f"{mean} takes the median of buffers and nothing beside the model, and a secure sum reveals no median: "
                "use a model without buffers, or the weighted mean"
            )
        for name, buffer in buffers.items():
            if buffer.is_complex():
                raise InputError(f"buffer {name} is of {buffer.dtype}, which a secure sum does not carry")
        if self.verified and _norm_of(algorithm, state) is None:
            raise InputError(
                "verified norms need one that every client clips to: FedAvg(mean=ClippedMean(norm)), or privacy that "
                "clips whole updates"
            )
        bounded = self.verified or isinstance(guard, DistributedPrivacy)
        if bounded and extras:
            raise InputError(
                f"{algorithm} sends {', '.join(extras)} beside the update, which has no place where norms are "
                "verified or noise is in the sum: use a bound that does not adapt"
            )
        if bounded and self.clip is not None:
            raise InputError(
                f"clip={self.clip}: updates are clipped to a norm here, which bounds their entries: leave clip out"
            )
        if isinstance(guard, DistributedPrivacy):
            shares = guard.shares
            ours = (self.noised_by, self.verified)
            if shares.fewest > self.protocol.minimum or (shares.added_by, shares.verified) != ours:
                raise InputError("the noise of this run was provisioned for another secure sum than it is given")

    def combine(
        self,
        algorithm: Algorithm,
        state: ServerState,
        sizes: Tensor,
        cohort: Sequence[int],
        update_of: UpdateOf,
        rounding_of: Callable[[int], Prg] = lambda client: Prg.fresh(),
        application_of: Callable[[str], bytes] = lambda agreed: ABOUT_NOTHING,
        opening: Opening = unannounced,
    ) -> tuple[Update, Summed]:
        """Run one round of the protocol.

        Args:
            algorithm: whose updates are summed; as `check` allows.
            state: of this round.
            sizes: how many examples each client has, int64 of shape ``(N,)``; the largest is public.
            cohort: the clients, ascending.
            update_of: called at most once a client, in the order of the cohort.
            rounding_of: where a client's rounding comes from, which need not be secret: from a seed, the mean is the
                same each time, for the masks leave no trace in it. Not asked where noise is in the sum.
            application_of: what the sum is for, as `SecureSum.sum` is told, given `Contents.description`.
            opening: see `SecureSum.sum`.

        Returns:
            The mean as one update, its ``nbytes`` those of all frames to the server; and the sum's own account, which
            says of a client whose update cannot be summed why.

        Raises:
            InputError: the cohort is too small; nothing has been sent.
            PeerError: too many clients were lost; nothing is revealed.
        """
        contents, guard = self.contents(algorithm, state, sizes, len(cohort)), _guard(algorithm)
        noise_of = self.noise_of(algorithm, state)
        unfit: dict[int, str] = {}

        def vector_of(client: int) -> Words | None:
            update = update_of(client)
            if update is None:
                return None
            try:
                return contents.encode(update, (noise_of or rounding_of)(client))
            except RangeError as error:
                unfit[client] = f"has nothing that can be summed: {error}"
                return None

        encoding = contents.encoding
        protocol, application = self._protocol(contents, guard, state.round + 1), application_of(contents.description)
        summed = protocol.sum(encoding.ring, encoding.length, cohort, vector_of, application, opening)
        mean = contents.decode(summed.total, len(summed.survivors))
        noised: AddedBy | Literal[""] = self.noised_by if isinstance(guard, DistributedPrivacy) else ""
        safeguards = replace(summed.safeguards, noised_by=noised)
        summed = replace(summed, lost={**summed.lost, **unfit}, safeguards=safeguards)
        return replace(mean, nbytes=sum(summed.traffic.up.values())), summed

    def noise_of(self, algorithm: Algorithm, state: ServerState) -> Callable[[int], Prg] | None:
        """Where the rounding and the noise of each client's vector come from; ``None`` if there is no noise in it."""
        guard = _guard(algorithm)
        return partial(guard.randomness, state.round + 1) if isinstance(guard, DistributedPrivacy) else None

    def contents(self, algorithm: Algorithm, state: ServerState, sizes: Tensor, clients: int) -> Contents:
        """What the vectors of a round of so many clients hold; the other arguments are as for `combine`."""
        guard, norm, kept = _guard(algorithm), _norm_of(algorithm, state), 1.0
        if isinstance(guard, DistributedPrivacy):
            shares = guard.shares_among(clients)
            return BoundedContents(state, shares.bounded, shares)
        if self.verified and norm is not None:
            bounded = BoundedEncoding(state.layout.size, norm, clients, self.bits, verified=True)
            return BoundedContents(state, bounded if guard is None else bounded.within(norm))
        clip = self.clip or norm or 1.0
        if norm is not None and guard is not None:
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

    def _protocol(self, contents: Contents, guard: ClientPrivacy | None, round: int) -> SecureSum:
        """The protocol of a round, whose servers know what to verify and add their noise."""
        protocol = self.protocol
        if not isinstance(protocol, SharedSum) or not isinstance(contents, BoundedContents):
            return protocol
        if self.verified:
            protocol = replace(protocol, bound=contents.bounded.whole_bound)
        shares = contents.shares
        if isinstance(guard, DistributedPrivacy) and shares is not None:
            randomness = guard.randomness
            return replace(protocol, noise=lambda role, length: shares.server_noise(randomness(round, role.value)))
        return protocol


def _mean_of(algorithm: Algorithm) -> Mean:
    """How an algorithm combines updates."""
    return next((layer.mean for layer in wrapped(algorithm) if hasattr(layer, "mean")), weighted_mean)


def _guard(algorithm: Algorithm) -> ClientPrivacy | None:
    return next((layer for layer in wrapped(algorithm) if isinstance(layer, ClientPrivacy)), None)


def _norm_of(algorithm: Algorithm, state: ServerState) -> float | None:
    """What every client clips its update to, if it does."""
    guard, mean = _guard(algorithm), _mean_of(algorithm)
    if guard is not None:
        return guard.bound(state)
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
        if isinstance(layer, ClientPrivacy):
            return 1.0
        if hasattr(layer, "weighting"):
            return max(float(layer.weighting(size)) for size in set(sizes[sizes > 0].tolist()))
    return float(sizes.max())
