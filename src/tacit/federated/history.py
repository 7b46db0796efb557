"""What a federated run did, round by round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tacit.federated.secure_sum.interface import Safeguards


@dataclass(frozen=True)
class RoundRecord:
    """One communication round.

    Args:
        round: its number, from 1.
        cohort: indices of the clients whose updates were used, ascending; empty if the round failed.
        examples: how many examples they trained on in all; 0 if nobody was told.
        loss: mean loss of the new global model on the held-out examples; ``None`` if not evaluated.
        accuracy: fraction of held-out examples classified correctly, in [0, 1]; ``None`` if not evaluated.
        bytes_up: bytes of the updates sent to the server, all clients together.
        bytes_down: bytes of the global model sent to the clients invited, all together.
        seconds: wall-clock time of the round, evaluation included.
        train_loss: mean loss of the cohort's examples while training; ``None`` if the round failed, or nobody was told.
        lost: why each client that was invited, but is not of the cohort, took no part.
        simulated_seconds: the virtual clock at the end of the round; ``None`` without simulated devices.
        epsilon: the privacy spent up to here; ``None`` without differential privacy.
        clients: the model's accuracy at the clients; ``None`` if not evaluated there.
        secure_sum: how the updates were summed without anybody seeing one; ``None`` if they were not.
        note: why the round failed; empty if it did not.
    """

    round: int
    cohort: tuple[int, ...]
    examples: int
    loss: float | None
    accuracy: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    train_loss: float | None = None
    lost: Mapping[int, str] = field(default_factory=dict)
    simulated_seconds: float | None = None
    epsilon: float | None = None
    clients: ClientAccuracies | None = None
    secure_sum: Safeguards | None = None
    note: str = ""


@dataclass(frozen=True)
class ClientAccuracies:
    """How evenly a model serves the clients: fractions of correct answers, in [0, 1].

    Args:
        mean: over clients, each counting the same.
        worst_decile: the mean over the tenth of the clients (at least one) with the lowest.
        spread: standard deviation over clients.
        count: how many clients were evaluated.
    """

    mean: float
    worst_decile: float
    spread: float
    count: int
