"""Flower's ``Strategy`` around tacit's rounds.

Flower's own loop sends each node one message a round and aggregates the replies. A round with a secure sum takes three
exchanges, the first one five, each made of the answers to the one before, so `Rounds` has a loop of its own: it is
`Federation.advance`, as in the simulator, over sites that a `Grid` reaches. In a ServerApp::

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        federation = reached(grid, setting, terms)
        strategy = Rounds(SiteFederation(model, federation, None, algorithm=FedAvg(lr=0.1), selection=Uniform(4)))
        result = strategy.start(grid, num_rounds=30)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from tacit.errors import InputError
from tacit.federated.devices_schedule import RoundPolicy
from tacit.federated.evaluation import EarlyStop
from tacit.federated.history import RoundRecord
from tacit.federated.secure_sum.client import Policy
from tacit.identity import Identity
from tacit.runtimes.flower.asking import Asking, Timing
from tacit.runtimes.flower.board import Board
from tacit.runtimes.flower.courier import Courier
from tacit.runtimes.flower.federation import SiteFederation
from tacit.runtimes.flower.messages import Terms
from tacit.runtimes.flower.presence import Presence
from tacit.runtimes.flower.sites import Sites
from tacit.runtimes.simulation import Evaluation, train

_LOG = logging.getLogger(__name__)


def reached(
    grid: Grid,
    coordinator: Identity,
    terms: Terms,
    policy: Policy | None,
    rounds: RoundPolicy | None = None,
    timing: Timing | None = None,
    board: Board | None = None,
) -> Sites:
    """The sites of a run, reached through a grid.

    Args:
        grid: of the run.
        coordinator: whose letters sites accept.
        terms: of the run.
        policy: what sites insist on in a secure sum; ``None`` for none.
        rounds: whom to wait for; ``None`` for everybody.
        timing: how long to wait.
        board: told of what happens.
    """
    board = board or Board()
    courier = Courier(grid)
    presence = Presence(courier, coordinator, terms.sites, board.say)
    asking = Asking(courier, presence, coordinator, timing or Timing(), board)
    return Sites(asking, terms, policy, rounds or RoundPolicy())


@dataclass
class Rounds(Strategy):
    """Trains a federation over sites.

    Args:
        federation: over the grid that `start` is given.
        evaluation: when the model is tried.
        stop: when training ends early.
        history: what earlier rounds did, if the federation was restored; added to.
        keep: called with each record before the next round.
    """

    federation: SiteFederation
    evaluation: Evaluation = field(default_factory=Evaluation)
    stop: EarlyStop = field(default_factory=EarlyStop)
    history: list[RoundRecord] = field(default_factory=list)
    keep: Callable[[RoundRecord], None] = field(default=lambda record: None, repr=False)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Train up to round ``num_rounds``.

        Args:
            grid: the one that the federation was made for.
            initial_arrays: the model's parameters and buffers to begin from, by name; ``None``: as the federation has
                them.
            num_rounds: the last round.
            timeout: see `Timing`, which the federation has; ``None``.
            train_config, evaluate_config: what a run is, its terms say; ``None``.
            evaluate_fn: tries the model after each round, as Flower's strategies do.

        Returns:
            The trained model, and each round's figures.

        Raises:
            InputError: an argument is given that has no use here.
            TrainingError: round after round no update could be used.
            BudgetExceeded: the next round would exceed the privacy budget.
            PeerError: the SuperLink failed.
        """
        for name, value in (("timeout", timeout), ("train_config", train_config), ("evaluate_config", evaluate_config)):
            if value:
                raise InputError(f"{name} has no use here: sites are told the run's terms, and waited for by Timing")
        if self.federation.sites.asking.courier.grid is not grid:
            raise InputError("the federation was made for another grid")
        if initial_arrays is not None:
            self._begin_from(initial_arrays)
        self.summary()
        result = Result()
        for record in train(self.federation, num_rounds, self.evaluation, self.stop, self.history):
            self.keep(record)
            self._note(record, result, evaluate_fn)
        result.arrays = self._arrays()
        return result

    def summary(self) -> None:
        """Log what is trained."""
        sites = self.federation.sites
        kind = "in the clear" if sites.policy is None else f"by a secure sum of {sites.policy.minimum} or more"
        _LOG.info("tacit: %d sites, %s; from round %d on", len(sites.terms.sites), kind, self.federation.round + 1)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not this way: see the module."""
        _no_single_exchange()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not this way: see the module."""
        _no_single_exchange()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not this way: see the module."""
        _no_single_exchange()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Not this way: see the module."""
        _no_single_exchange()

    def _begin_from(self, arrays: ArrayRecord) -> None:
        model = self.federation.model()
        tensors = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
        expected: dict[str, Any] = model.state_dict()
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in expected.items()}:
            raise InputError("the initial arrays are not the parameters and buffers of this federation's model")
        model.load_state_dict(tensors)
        self.federation.begin_from(model)

    def _arrays(self) -> ArrayRecord:
        return ArrayRecord(self.federation.model().state_dict())

    def _note(
        self,
        record: RoundRecord,
        result: Result,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> None:
        figures = {
            "loss": record.train_loss,
            "examples": record.examples,
            "sites": len(record.cohort),
            "bytes-up": record.bytes_up,
            "bytes-down": record.bytes_down,
            "epsilon": record.epsilon,
        }
        known: dict[str, Any] = {name: value for name, value in figures.items() if value is not None}
        result.train_metrics_clientapp[record.round] = MetricRecord(known)
        if record.loss is not None and record.accuracy is not None:
            metrics = MetricRecord({"loss": record.loss, "accuracy": record.accuracy})
            result.evaluate_metrics_clientapp[record.round] = metrics
        if evaluate_fn is not None and (found := evaluate_fn(record.round, self._arrays())) is not None:
            result.evaluate_metrics_serverapp[record.round] = found


def _no_single_exchange() -> NoReturn:
    raise InputError("a round takes more than one exchange of messages: call start, and not the parts of Flower's loop")
