"""One round on simulated devices by the virtual clock: who is waited for, who finishes, who is too late."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.federated.devices import Fleet
from tacit.federated.selection import Selection

DROPPED = "dropped out: no longer eligible"
FAILED = "dropped out: failed"
LATE = "late: past the deadline"
NOT_NEEDED = "late: enough others had finished"


@dataclass(frozen=True)
class RoundPolicy:
    """How long the server waits, and for whom.

    Production servers invite 130 % of the devices that they need, since 6 to 10 % drop out and others are slow, and
    close the round when enough have reported (Bonawitz et al. 2019, section 9 and appendix A): that is
    ``over_selection=1.3`` with ``close_at`` the number needed.

    Args:
        over_selection: how many times the selection's own number to invite.
        deadline: seconds after which who has not finished is late; ``None`` waits for everyone.
        close_at: close the round as soon as so many have finished (k of n); ``None`` waits for the rest.
        minimum: a round that fewer finish is abandoned: nobody's update counts.
        wait: seconds between two looks at who is eligible, while too few are.
        max_waits: how many times to wait; after that the round is abandoned.

    Raises:
        InputError: a setting is out of range, or ``close_at`` is below ``minimum``.
    """

    over_selection: float = 1.0
    deadline: float | None = None
    close_at: int | None = None
    minimum: int = 1
    wait: float = 600.0
    max_waits: int = 144

    def __post_init__(self) -> None:
        if not (self.over_selection > 0 and math.isfinite(self.over_selection)):
            raise InputError(f"over_selection={self.over_selection}: give a factor above 0, such as 1.3")
        if self.deadline is not None and not (self.deadline > 0 and math.isfinite(self.deadline)):
            raise InputError(f"deadline={self.deadline}: give seconds above 0, or None to wait for everyone")
        if self.minimum < 1:
            raise InputError(f"minimum={self.minimum}: a round needs 1 client or more")
        if self.close_at is not None and self.close_at < self.minimum:
            raise InputError(f"close_at={self.close_at}: a round cannot close before its minimum, {self.minimum}")
        if not (self.wait > 0 and math.isfinite(self.wait)):
            raise InputError(f"wait={self.wait}: give seconds above 0")
        if self.max_waits < 0:
            raise InputError(f"max_waits={self.max_waits}: give 0 or more")

    @property
    def needed(self) -> int:
        """How many clients must be eligible for a round to open."""
        return max(self.minimum, self.close_at or 1)

    def invitation(self, selection: Selection, clients: int) -> Selection:
        """The selection with over-selection, of ``clients`` at most."""
        return selection if self.over_selection == 1.0 else selection.scaled(self.over_selection, clients)


@dataclass(frozen=True, eq=False)
class Opening:
    """The moment a round can begin.

    Args:
        time: the virtual clock, in seconds.
        eligible: who may train then, bool of shape ``(N,)``.
        reason: why the round cannot begin even now; empty if it can.
    """

    time: float
    eligible: Tensor
    reason: str = ""


@dataclass(frozen=True)
class Schedule:
    """What the devices make of a round.

    Args:
        finished: the clients whose updates count, ascending; empty if the round was abandoned.
        lost: why each of the others that were invited does not count, by client, ascending.
        start: the virtual clock when the round began, in seconds.
        end: and when it was over.
    """

    finished: tuple[int, ...]
    lost: Mapping[int, str]
    start: float
    end: float


def open_round(fleet: Fleet, policy: RoundPolicy, sizes: Tensor, time: float) -> Opening:
    """Wait from ``time`` on until at least ``policy.needed`` clients with examples are eligible.

    Args:
        fleet: the devices.
        policy: how many are needed, how often and how many times to look.
        sizes: how many examples each client has, shape ``(N,)``.
        time: the virtual clock, in seconds.

    Raises:
        InputError: there are not as many clients with examples as are needed, or as devices.
    """
    if len(sizes) != fleet.clients:
        raise InputError(f"a fleet of {fleet.clients} devices for {len(sizes)} clients: give each client a device")
    have_examples = sizes > 0
    if int(have_examples.sum()) < policy.needed:
        found = int(have_examples.sum())
        raise InputError(f"a round needs {policy.needed} clients, but only {found} have examples: lower the minimum")
    most, eligible = 0, have_examples
    for waits in range(policy.max_waits + 1):
        now = time + waits * policy.wait
        eligible = fleet.eligible(now) & have_examples
        if int(eligible.sum()) >= policy.needed:
            return Opening(now, eligible)
        most = max(most, int(eligible.sum()))
    patience = policy.max_waits * policy.wait
    reason = f"the cohort did not fill: {policy.needed} needed, at most {most} were eligible within {patience:g} s"
    return Opening(time + patience, eligible, reason)


def schedule(
    fleet: Fleet,
    policy: RoundPolicy,
    invited: Sequence[int],
    start: float,
    *,
    examples: Tensor,
    bytes_down: int,
    bytes_up: int,
    round: int,
) -> Schedule:
    """Run a round by the virtual clock: who finishes of those invited, and when the round is over.

    It is over when everyone has finished or dropped out, at the deadline, or when ``policy.close_at`` clients have
    finished, whichever comes first. Ties go to the lower index.

    Args:
        fleet: the devices.
        policy: when to close the round.
        invited: the clients, ascending.
        start: the virtual clock, in seconds.
        examples: how many examples each of those invited trains on, epochs counted, shape ``(M,)``.
        bytes_down: what each receives.
        bytes_up: what each sends.
        round: the round's number.
    """
    if not invited:
        return Schedule((), {}, start, start)
    clients = torch.tensor(invited)
    durations = fleet.durations(clients, examples, bytes_down, bytes_up, round)
    attempts = fleet.attempt(clients, start, durations, round)
    deadline = math.inf if policy.deadline is None else start + policy.deadline
    ends, finished, failed = attempts.end.tolist(), attempts.finished.tolist(), attempts.failed.tolist()
    in_time = sorted(
        (end, client) for end, client, done in zip(ends, invited, finished, strict=True) if done and end <= deadline
    )
    closed = policy.close_at is not None and len(in_time) >= policy.close_at
    used = in_time[: policy.close_at] if closed else in_time
    end = used[-1][0] if closed else min(max(ends), deadline)
    counted = {client for _, client in used}
    lost = {}
    for client, stopped, done, broke in zip(invited, ends, finished, failed, strict=True):
        if client in counted:
            continue
        if stopped > end:
            # Whatever would have become of it later, the server has closed the round.
            lost[client] = NOT_NEEDED if closed else LATE
        elif done:
            lost[client] = NOT_NEEDED
        else:
            lost[client] = FAILED if broke else DROPPED
    if len(counted) < policy.minimum:
        abandoned = f"round abandoned: {len(counted)} finished, at least {policy.minimum} needed"
        lost |= dict.fromkeys(counted, abandoned)
        counted = set()
    return Schedule(tuple(sorted(counted)), dict(sorted(lost.items())), start, end)
