"""Why a request got no answer: what a party says, and what its client raises."""

from __future__ import annotations

from enum import Enum

import msgspec

from tacit.errors import Busy, DeadlineExceeded, InputError, NotPermitted, PeerError, PoolEmpty, Refused, TacitError


class Reason(Enum):
    """The kinds of reasons."""

    BUSY = "busy"
    STOPPING = "stopping"
    EMPTY = "empty"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    FORBIDDEN = "forbidden"
    INVALID = "invalid"
    GONE = "gone"
    MISSING = "missing"
    FAILED = "failed"


class Refusal(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A request gets no answer.

    Args:
        reason: the kind.
        text: one line, which says what to do; no secrets.
        retry_after_s: when it is worth asking again, where that is known.
    """

    reason: Reason
    text: str
    retry_after_s: float | None = None

    def error(self) -> TacitError:
        """What the client raises."""
        match self.reason:
            case Reason.BUSY | Reason.STOPPING | Reason.MISSING:
                return Busy(self.text, self.retry_after_s)
            case Reason.EMPTY:
                return PoolEmpty(self.text, self.retry_after_s)
            case Reason.DEADLINE:
                return DeadlineExceeded(self.text)
            case Reason.FORBIDDEN:
                return NotPermitted(self.text)
            case Reason.FAILED:
                return PeerError(self.text)
            case Reason.INVALID:
                return InputError(self.text)
            case Reason.CANCELLED | Reason.GONE:
                return Refused(self.text)
