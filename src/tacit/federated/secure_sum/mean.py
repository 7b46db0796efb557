"""A federated round whose server sees the sum of the cohort's updates and no single one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm, ServerState, Update
from tacit.federated.central_privacy import CentralPrivacy, bound_of, wrapped
from tacit.federated.mean import weighted_mean
from tacit.federated.secure_sum.encoding import Encoding, Scalar
from tacit.federated.secure_sum.interface import ABOUT_NOTHING, SecureSum, Summed
from tacit.federated.secure_sum.ring import Words
from tacit.ring.prg import Prg

UpdateOf = Callable[[int], Update | None]
"""The update of one client of the cohort; ``None`` if the client is lost before it has one."""

_WEIGHT_STEP = 2.0**-20
_LOSS_STEP = 2.0**-16


@dataclass(frozen=True)
class SecureMean:
    """The weighted mean of a cohort by a secure sum of what each client encodes.

    Client k sends floor(s w_k Δ_k + u) for its weight w_k as a fraction of the largest one there can be, and with it
    w_k, its number of examples and its summed loss; the mean is the quotient of the sums.

    *Guarantees*: each entry of Σ w_k Δ_k is within n / s of that of the clamped updates and right in expectation, with
    s = (2^(bits−1) − 1) / clip; entries of w_k Δ_k beyond ``clip`` are clamped to it. Under `CentralPrivacy` a client
    first shrinks its update by what rounding could add to the norm, √D / s, so that what it sends keeps the bound S
    that the noise was chosen for.

    Args:
        protocol: how the sum is taken, such as `tacit.federated.secure_sum.masked.MaskedSum`.
        clip: the largest magnitude of an entry of a weighted update.
        bits: of one client's entry, from 2 to 24.
        most_loss: the largest mean loss of a client.

    Raises:
        InputError: a setting is out of range.
    """

    protocol: SecureSum = field(repr=False)
    clip: float = 1.0
    bits: int = 16
    most_loss: float = 1e4

    def __post_init__(self) -> None:
        Encoding(1, self.clip, 1, self.bits)

    def check(self, algorithm: Algorithm, state: ServerState) -> None:
        """Refuse an algorithm whose round is not one weighted sum of model updates.

        Raises:
            InputError: it combines updates otherwise, sends more, or the model has floating-point buffers.
        """
        mean = next((layer.mean for layer in wrapped(algorithm) if hasattr(layer, "mean")), weighted_mean)
        if mean is not weighted_mean:
            raise InputError(f"a secure sum reveals no single update, which {mean} needs: use the weighted mean")
        guard = _guard(algorithm)
        private = guard is not None
        if guard is not None and guard.adaptive is not None:
            raise InputError("a clipping bound that adapts needs a count beside the update, which a secure sum lacks")
        if state.shared and not private:
            raise InputError(
                f"{algorithm} sends {', '.join(state.shared)} beside the model's update, which the secure sum does not "
                "carry: use FedAvg, FedProx or another that sends the update alone"
            )
        floats = [name for name, buffer in state.buffers.items() if buffer.is_floating_point()]
        if floats and not private:
            raise InputError(
                f"the model has buffers that clients would have to send ({', '.join(floats)}), which the secure sum "
                "does not carry: use GroupNorm in place of batch normalisation, or keep it at the clients (FedBN)"
            )

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
            application_of: what the sum is for, as `SecureSum.sum` is told, given `Encoding.description`.

        Returns:
            The mean as one update, its ``nbytes`` those of all frames to the server; and the sum's own account.

        Raises:
            InputError: the cohort is too small; nothing has been sent.
            PeerError: too many clients were lost; nothing is revealed.
        """
        most_examples, most_weight = int(sizes.max()), _most_weight(algorithm, int(sizes.max()))
        scalars = (
            Scalar("weight", 1.0, _WEIGHT_STEP),
            Scalar("examples", float(most_examples)),
            Scalar("summed loss", self.most_loss * most_examples, _LOSS_STEP),
        )
        encoding = Encoding(state.layout.size, self.clip, len(cohort), self.bits, scalars)
        kept = 1.0 if _guard(algorithm) is None else _room_for_rounding(encoding, bound_of(state))

        def vector_of(client: int) -> Words | None:
            update = update_of(client)
            if update is None:
                return None
            if update.extra:
                raise InputError(f"{algorithm} sends {', '.join(update.extra)}, which the secure sum does not carry")
            weight = update.weight / most_weight
            loss = min(update.loss, self.most_loss) * update.examples
            return encoding.encode(
                update.delta * (kept * weight), (weight, update.examples, loss), rounding_of(client)
            ).words

        application = application_of(encoding.description)
        summed = self.protocol.sum(encoding.ring, encoding.length, cohort, vector_of, application)
        total, (weight, examples, loss) = encoding.decode(summed.total)
        mean = Update(
            delta=total.div_(weight),
            buffers=state.buffers,
            examples=round(examples),
            loss=loss / examples,
            nbytes=sum(summed.traffic.up.values()),
            weight=weight * most_weight,
        )
        return mean, summed


def _guard(algorithm: Algorithm) -> CentralPrivacy | None:
    return next((layer for layer in wrapped(algorithm) if isinstance(layer, CentralPrivacy)), None)


def _room_for_rounding(encoding: Encoding, bound: float) -> float:
    """By how much to shrink a vector of norm ``bound`` so that it is no longer after rounding."""
    most = math.sqrt(encoding.size) / encoding.scale
    if most >= bound:
        raise InputError(
            f"rounding to {encoding.bits} bits of a clip of {encoding.clip:g} may add {most:.3g} to the norm of an "
            f"update that is clipped to {bound:g}: choose more bits, or a smaller clip of entries"
        )
    return 1 - most / bound


def _most_weight(algorithm: Algorithm, most_examples: int) -> float:
    """The largest weight that a client can have, which all can know."""
    for layer in wrapped(algorithm):
        if isinstance(layer, CentralPrivacy):
            return 1.0
        if hasattr(layer, "weighting"):
            return float(layer.weighting(most_examples))
    return float(most_examples)
