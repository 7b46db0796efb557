"""A federated training and how it advances by one round, whatever trains the clients."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.errors import InputError, PeerError, TooFewUpdates, TrainingError
from tacit.federated.algorithm import Algorithm, Memory, ServerState, Update
from tacit.federated.central_privacy import CentralPrivacy
from tacit.federated.devices import Fleet
from tacit.federated.devices_schedule import DROPPED, FAILED, RoundPolicy, Schedule, open_round, schedule
from tacit.federated.evaluation import evaluate, evaluate_clients
from tacit.federated.generators import generator_for, seed_for
from tacit.federated.history import ClientAccuracies, RoundRecord
from tacit.federated.initial import Initial, initialise
from tacit.federated.local.work import Loss
from tacit.federated.privacy import PrivateTraining
from tacit.federated.secure_sum.interface import ABOUT_NOTHING, Summed
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.selection import Selection
from tacit.federated.transcript import Spent, Transcript
from tacit.ring.prg import Prg
from tacit.runtimes.executors import Executor, Job, Outcome

FAILURES = 3
"""After so many rounds in a row without a usable update, training stops."""


@dataclass(frozen=True)
class Devices:
    """The simulated devices that the clients run on, and how the server copes with them.

    Args:
        fleet: a device for each client.
        policy: whom the server invites and waits for.
    """

    fleet: Fleet
    policy: RoundPolicy = field(default_factory=RoundPolicy)


@dataclass(frozen=True)
class Snapshot:
    """Everything that changes from round to round; training restored from it goes on bit by bit the same.

    Args:
        state: of the server.
        memories: of the clients that have any, by client.
        failures: rounds without a usable update, in a row, up to here.
        clock: the virtual clock, in seconds; 0 without simulated devices.
    """

    state: ServerState
    memories: Mapping[int, Memory]
    failures: int = 0
    clock: float = 0.0


class Federation:
    """Training of one global model over clients, round by round.

    Every random choice depends on ``seed``, the round and the client alone, so equal arguments give bit-equal
    models on the same machine with the same number of torch threads.

    Args:
        model: the architecture; copied. Its initial weights are drawn according to ``initial``.
        executor: trains the clients; the caller closes it.
        sizes: how many examples each client has, int64 of shape ``(N,)``.
        algorithm: how clients train and how the server combines.
        selection: which clients are invited to a round.
        devices: simulated devices; ``None``: every client is always there, and takes no time.
        secure_mean: sums the updates without showing the server any of them; ``None``: the server sees each.
        transcript: where each round is written down, and signed; ``None``: nowhere.
        private: the training under differential privacy, whose algorithm takes the place of ``algorithm`` and whose
            solver, if it has one, the executor uses.
        seed: of the initial weights, the selection and the clients' shuffling.
        initial: see `tacit.federated.initial.initialise`.
        loss: mean loss of a batch, for evaluating.

    Raises:
        InputError: a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        executor: Executor,
        sizes: Tensor,
        *,
        algorithm: Algorithm,
        selection: Selection,
        devices: Devices | None = None,
        secure_mean: SecureMean | None = None,
        transcript: Transcript | None = None,
        private: PrivateTraining | None = None,
        seed: int = 0,
        initial: Initial = "he",
        loss: Loss = functional.cross_entropy,
    ) -> None:
        if devices is not None and devices.fleet.clients != len(sizes):
            raise InputError(f"a fleet of {devices.fleet.clients} devices for {len(sizes)} clients: one a client")
        self._model = copy.deepcopy(model)
        initialise(self._model, initial, generator_for(seed, "initial"))
        self._executor = executor
        self._sizes = sizes
        self._algorithm = private.algorithm if private else algorithm
        self._private = private
        self._secure_mean = secure_mean
        self._transcript = transcript
        self._selection = selection if devices is None else devices.policy.invitation(selection, len(sizes))
        self._devices = devices
        self._seed = seed
        self._loss = loss
        self._snapshot = Snapshot(self._algorithm.init(self._model, len(sizes)), {})
        if secure_mean is not None:
            secure_mean.check(self._algorithm, self._snapshot.state)

    @property
    def snapshot(self) -> Snapshot:
        """Where training is."""
        return self._snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from where a federation with the same arguments was."""
        self._snapshot = snapshot

    @property
    def round(self) -> int:
        """How many rounds have been completed."""
        return self._snapshot.state.round

    def model(self, state: ServerState | None = None) -> nn.Module:
        """A new copy of the global model as it is now, or as it was in a state."""
        model = copy.deepcopy(self._model)
        (state or self._snapshot.state).load_into(model)
        return model

    def evaluate(self, examples: Examples | None) -> tuple[float | None, float | None]:
        """Mean loss and accuracy of the global model.

        Args:
            examples: to try it on; ``None`` for those that clients elsewhere keep back, of which there are none here.
        """
        return (None, None) if examples is None else evaluate(self.model(), examples, loss=self._loss)

    def evaluate_clients(self, tests: Sequence[Examples]) -> ClientAccuracies | None:
        """The accuracy at every client, each with the model that it would use, on its own held-out examples."""
        snapshot = self._snapshot
        return evaluate_clients(self._model, self._algorithm, snapshot.state, snapshot.memories, tests)

    def advance(self) -> RoundRecord:
        """Run one communication round; the record is not yet evaluated.

        A client whose training diverged is left out, and so is one that did not finish: the record's ``lost``
        says why. If nobody is left, the round fails: it counts, and the model stays as it was.

        Raises:
            TrainingError: this is the third round in a row that failed.
            BudgetExceeded: the round would take someone over the privacy budget; it was not begun.
        """
        started = time.perf_counter()
        snapshot, state, number = self._snapshot, self._snapshot.state, self.round + 1
        plan, note = self._plan(number)
        downloads = len(plan.finished) + len(plan.lost)
        if self._private is not None:
            refused = self._private.spend(number, plan.finished)
            plan, downloads = _without(plan, refused), downloads - len(refused)
        jobs = [Job(client, snapshot.memories.get(client, {})) for client in plan.finished]
        cohort = _Cohort(self._executor.run(self._algorithm, state, jobs, self._seed))
        mean, summed = None, None
        try:
            if self._secure_mean is not None:
                mean, summed = self._summed(self._secure_mean, plan, cohort)
            # The noise that hides who took part is due also when nobody did.
            elif cohort or isinstance(self._algorithm, CentralPrivacy):
                mean = self._algorithm.combine(cohort)
        except (TooFewUpdates, PeerError) as error:
            note = str(error)
        unused = {} if mean else dict.fromkeys(cohort.clients, "not used: the round failed")
        lost = dict(sorted({**cohort.lost, **plan.lost, **unused}.items()))
        if mean is None:
            note = note or ("no client was drawn" if not (plan.finished or plan.lost) else "no update could be used")
            self._fail(number, plan, lost, note)
        else:
            memories = {**snapshot.memories, **cohort.memories}
            self._snapshot = Snapshot(self._algorithm.server_update(state, mean), memories, clock=plan.end)
        spent = self._private.spent() if self._private else None
        if self._transcript is not None:
            reported = None if spent is None else Spent(spent.epsilon, spent.delta, spent.unit)
            self._transcript.close(state, self._snapshot.state, summed, reported, note)
        return RoundRecord(
            round=number,
            cohort=tuple(cohort.clients) if mean else (),
            examples=mean.examples if mean else 0,
            loss=None,
            accuracy=None,
            bytes_up=mean.nbytes if mean else 0,
            bytes_down=downloads * state.nbytes + (sum(summed.traffic.down.values()) if summed else 0),
            seconds=time.perf_counter() - started,
            train_loss=mean.loss if mean and cohort.clients and not math.isnan(mean.loss) else None,
            lost=lost,
            simulated_seconds=plan.end if self._devices else None,
            epsilon=spent.epsilon if spent else None,
            secure_sum=summed.safeguards if summed else None,
            note=note,
        )

    def _summed(self, secure_mean: SecureMean, plan: Schedule, cohort: _Cohort) -> tuple[Update | None, Summed | None]:
        """The cohort's mean by a secure sum, in which those who drop out of the round drop out of the protocol."""
        dropped = [client for client, reason in plan.lost.items() if reason in (DROPPED, FAILED)]
        clients = sorted([*plan.finished, *dropped])
        if not clients:
            noised = isinstance(self._algorithm, CentralPrivacy)
            return self._algorithm.combine([]) if noised else None, None
        state, transcript = self._snapshot.state, self._transcript
        mean, summed = secure_mean.combine(
            self._algorithm,
            state,
            self._sizes,
            clients,
            cohort.update_of,
            lambda client: Prg(seed_for(self._seed, "round", state.round + 1, "client", client, "rounding")),
            lambda agreed: ABOUT_NOTHING if transcript is None else transcript.open(state, agreed),
            self._opening,
        )
        cohort.keep(summed)
        return self._algorithm.combine([mean]), summed

    def _opening(self, survivors: tuple[int, ...]) -> None:
        """Write down what the sum of these clients costs, before anybody can see it."""
        if self._private is not None:
            self._private.opening(self.round + 1, len(survivors))

    def _plan(self, number: int) -> tuple[Schedule, str]:
        """Who is invited, who of them finishes, and when the round is over; and why it could not begin, if so."""
        generator = generator_for(self._seed, "round", number, "cohort")
        if self._devices is None:
            invited = self._selection.select(number, self._sizes, self._sizes > 0, generator)
            return Schedule(invited, {}, 0.0, 0.0), ""
        fleet, policy = self._devices.fleet, self._devices.policy
        opening = open_round(fleet, policy, self._sizes, self._snapshot.clock)
        if opening.reason:
            return Schedule((), {}, self._snapshot.clock, opening.time), opening.reason
        invited = self._selection.select(number, self._sizes, opening.eligible, generator)
        state = self._snapshot.state
        effort = self._algorithm.effort(state, self._sizes[torch.tensor(invited, dtype=torch.int64)])
        plan = schedule(
            fleet,
            policy,
            invited,
            opening.time,
            examples=effort.examples,
            bytes_down=state.nbytes,
            bytes_up=effort.bytes_up,
            round=number,
        )
        return plan, ""

    def _fail(self, number: int, plan: Schedule, lost: Mapping[int, str], note: str) -> None:
        """Count the round and leave the model; a Poisson draw of nobody is no failure, only bad luck."""
        someone = self._devices is not None or plan.finished or plan.lost
        failures = self._snapshot.failures + bool(someone)
        if failures == FAILURES:
            reasons = "; ".join(f"client {client} {reason}" for client, reason in list(lost.items())[:3])
            raise TrainingError(
                f"{FAILURES} rounds in a row, up to round {number}, had no update that could be used under "
                f"{self._algorithm}: {note}{reasons and f' ({reasons})'}. The model is as it was before them. "
                "If clients diverge, lower lr or look for inputs that are not finite or far outside [0, 1]; if they "
                "are not there, relax what is asked of devices"
            )
        state = replace(self._snapshot.state, round=number)
        self._snapshot = replace(self._snapshot, state=state, failures=failures, clock=plan.end)


def _without(plan: Schedule, refused: Mapping[int, str]) -> Schedule:
    """The plan without the clients that must not take part."""
    finished = tuple(client for client in plan.finished if client not in refused)
    return replace(plan, finished=finished, lost={**plan.lost, **refused})


class _Cohort:
    """The updates of a round, one after another, and what became of each client meanwhile."""

    def __init__(self, outcomes: Iterator[Outcome]) -> None:
        self.clients: list[int] = []
        self.lost: dict[int, str] = {}
        self.memories: dict[int, Memory] = {}
        self._outcomes = self._usable(outcomes)
        self._first = next(self._outcomes, None)

    def __bool__(self) -> bool:
        """Whether there is an update at all."""
        return bool(self.clients)

    def __iter__(self) -> Iterator[Update]:
        while (outcome := self._next()) is not None:
            update, outcome = outcome.update, None
            if update is not None:
                yield update

    def update_of(self, client: int) -> Update | None:
        """The update of one client, if it has one; clients are asked in ascending order."""
        while self._first is not None and self._first.client <= client:
            outcome = self._next()
            if outcome is not None and outcome.client == client:
                return outcome.update
        return None

    def keep(self, summed: Summed) -> None:
        """Only those count whose updates are in the sum; what is known of the others, it says of who was seen here."""
        self.lost = {**summed.lost, **self.lost}
        self.clients = list(summed.survivors)
        self.memories = {client: memory for client, memory in self.memories.items() if client in summed.survivors}

    def _next(self) -> Outcome | None:
        outcome, self._first = self._first, None
        if outcome is not None:
            self._first = next(self._outcomes, None)
        return outcome

    def _usable(self, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
        for outcome in outcomes:
            if outcome.update is None:
                self.lost[outcome.client] = outcome.reason
                continue
            self.clients.append(outcome.client)
            if outcome.memory:
                self.memories[outcome.client] = outcome.memory
            yield outcome
