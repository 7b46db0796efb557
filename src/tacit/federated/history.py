"""What a federated run did, round by round."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RoundRecord:
    """One communication round.

    Args:
        round: its number, from 1.
        cohort: indices of the clients that took part, ascending.
        examples: how many examples they trained on in all.
        loss: mean cross-entropy of the new global model on the held-out examples; ``None`` if not evaluated.
        accuracy: fraction of held-out examples classified correctly, in [0, 1]; ``None`` if not evaluated.
        bytes_up: bytes of the updates sent to the server, all clients together.
        bytes_down: bytes of the global model sent to the cohort, all clients together.
        seconds: wall-clock time of the round, evaluation included.
    """

    round: int
    cohort: tuple[int, ...]
    examples: int
    loss: float | None
    accuracy: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
