"""Every error that tacit raises on purpose.

::

    TacitError
    ├── InputError             the caller's mistake; also a ValueError
    │   ├── DataError          a data file is missing, truncated, corrupt or not the expected one
    │   ├── RangeError         a number does not fit the fixed-point range, or is not finite
    │   ├── UnsupportedOperator   a model uses an operator that has no encrypted form
    │   └── TooFewUpdates      a round of federated training has too few updates to be combined as was asked
    ├── CorrelationError       correlated randomness would be used twice, or out of order
    ├── StorageFull            the disk, or what may be used of it, is full; nothing was kept
    ├── BudgetExceeded         a release would cost more privacy than is allowed
    ├── TrainingError          round after round no client had anything usable to send
    ├── Refused                a party does not answer a request, and says why
    │   ├── Busy               too much is waiting, or this client asks too often; says when to ask again
    │   │   └── PoolEmpty      correlated randomness has run out; more is being dealt
    │   ├── DeadlineExceeded   there was no answer in the time that the caller gave
    │   └── NotPermitted       the cluster file does not let this identity do that
    └── PeerError              another party's process died, went silent or did not keep to the protocol
        └── CodecError         bytes from elsewhere do not parse

A message names the thing at fault, its value where that is public, what was expected and what to do. It never holds a
secret value: shares, masks, seeds, weights and inputs stay out of it.
"""


class TacitError(Exception):
    """The root of the tree; catching it catches everything that tacit raises on purpose."""


class InputError(TacitError, ValueError):
    """The caller asked for something that cannot be: wrong shape, dtype, option or setting."""


class DataError(InputError):
    """A data file is missing, truncated, corrupt, or not the file that was expected."""


class RangeError(InputError):
    """A number is not finite, or lies outside the range of the fixed-point encoding."""


class UnsupportedOperator(InputError):
    """A model uses an operator that has no encrypted form; nothing has been dealt or sent."""


class TooFewUpdates(InputError):
    """Too few clients had an update for the way in which they are to be combined."""


class CorrelationError(TacitError):
    """Correlated randomness was asked for twice, or in another order than it was dealt."""


class StorageFull(TacitError):
    """The disk, or the part of it that may be used, is full; nothing was kept of what was to be written."""


class BudgetExceeded(TacitError):
    """A release would cost more privacy than its budget allows; nothing was released, and nothing was spent."""


class TrainingError(TacitError):
    """Federated training cannot go on: round after round, no client had an update that could be used."""


class Refused(TacitError):
    """A party does not answer a request, and says why; nothing of it was computed, or nobody was told the result."""


class Busy(Refused):
    """A party has too much to do, or this client asks too often.

    Args:
        text: the message.
        retry_after: seconds after which it is worth asking again, where the party knows.
    """

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class PoolEmpty(Busy):
    """The correlated randomness that was dealt ahead for a model has run out."""


class DeadlineExceeded(Refused):
    """There was no answer in the time that the caller gave."""


class NotPermitted(Refused):
    """The cluster file does not let this identity do what it asks for."""


class PeerError(TacitError):
    """Another party's process died, went silent, reported a failure or did not keep to the protocol."""


class CodecError(PeerError):
    """Bytes that came from elsewhere are not what the format allows."""


def one_line(error: TacitError) -> str:
    """Its message on one line, as it is sent to others and written to logs."""
    return " ".join(str(error).split())
