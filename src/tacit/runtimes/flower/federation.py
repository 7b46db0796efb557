"""Federated rounds whose clients are sites on a Flower grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.data.heart_disease import Moments
from tacit.errors import InputError, PeerError
from tacit.federated.algorithm import Algorithm
from tacit.federated.devices_schedule import Schedule
from tacit.federated.evaluation import summarise
from tacit.federated.generators import generator_for
from tacit.federated.history import ClientAccuracies, RoundRecord
from tacit.federated.initial import Initial
from tacit.federated.local.work import Loss
from tacit.federated.privacy import PrivateTraining
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.selection import Selection
from tacit.federated.transcript import Transcript, model_digest
from tacit.runtimes.federation import Federation
from tacit.runtimes.flower.sites import Sites, remembered
from tacit.runtimes.flower.tallies import Tally

UNKNOWN = 1 << 20
"""What stands for a site's number of examples where nobody has been told a bound: sites weigh themselves."""


class SiteFederation(Federation):
    """Training of one global model over sites, round by round.

    Rounds are those of `Federation`, and equal settings give equal models, as far as the same sites take part. What a
    site keeps of an algorithm's memory stays there; the snapshot holds in which round its update last counted. Sites
    that are there when a round opens can be drawn; if fewer are than the round needs, it is waited for them.

    Args:
        model: the architecture; its initial weights are drawn according to ``initial``.
        sites: train, sum and count.
        most_examples: the most examples that a site may have, which all know; ``None`` without a secure sum.
        algorithm, selection, secure_mean, transcript, private, seed, initial, loss: see `Federation`; privacy of
            records is the sites' own matter, and not part of ``private``.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        most_examples: int | None,
        *,
        algorithm: Algorithm,
        selection: Selection,
        secure_mean: SecureMean | None = None,
        transcript: Transcript | None = None,
        private: PrivateTraining | None = None,
        seed: int = 0,
        initial: Initial = "he",
        loss: Loss = functional.cross_entropy,
    ) -> None:
        if (most_examples is None) != (sites.policy is None):
            raise InputError("secure_sum.most_examples, which all know, goes with a secure sum between sites")
        count = len(sites.terms.sites)
        super().__init__(
            model,
            sites,
            torch.full((count,), most_examples or UNKNOWN),
            algorithm=algorithm,
            selection=sites.rounds.invitation(selection, count),
            secure_mean=secure_mean,
            transcript=transcript,
            private=private,
            seed=seed,
            initial=initial,
            loss=loss,
        )
        self.sites = sites
        self._most_examples = most_examples
        self._joined = False

    def begin_from(self, model: nn.Module) -> None:
        """Take the weights of a model of this architecture, before the first round.

        Raises:
            InputError: rounds have been run.
        """
        if self.round:
            raise InputError(f"round {self.round} is over: a model to begin from comes before the first")
        self._model.load_state_dict(model.state_dict())
        self._snapshot = replace(self._snapshot, state=self._algorithm.init(self._model, len(self._sizes)))

    def advance(self) -> RoundRecord:
        """See `Federation.advance`; the record's ``lost`` says also what went wrong with whom."""
        asking = self.sites.asking
        asking.lost.clear()
        if self._transcript is not None:
            self.sites.previous = self._transcript.head
        record = super().advance()
        counted = dict.fromkeys(record.cohort, remembered(record.round))
        self._snapshot = replace(self._snapshot, memories={**self._snapshot.memories, **counted})
        lost = {site: reason for site, reason in asking.lost.items() if site not in record.cohort}
        spent = [told["epsilon"] for told in asking.disclosed.values() if "epsilon" in told]
        return replace(
            record,
            lost=dict(sorted({**record.lost, **lost}.items())),
            epsilon=record.epsilon if record.epsilon is not None else max(spent, default=None),
        )

    def evaluate(self, examples: Examples | None) -> tuple[float | None, float | None]:
        """Mean loss and accuracy of the global model on all that sites keep back; nothing if too few answer."""
        if examples is not None:
            return super().evaluate(examples)
        tally, state = Tally.of_evaluation(self._most_examples or UNKNOWN), self._snapshot.state
        try:
            tried, correct, loss = self.sites.tally(
                "evaluate", state, model_digest(state), tally, self._there(self.round)
            )
        except PeerError as error:
            self.sites.asking.board.say(f"the model was not tried: {error}")
            return None, None
        return (loss / tried, correct / tried) if tried else (None, None)

    def evaluate_clients(self, tests: Sequence[Examples]) -> ClientAccuracies | None:
        """How evenly the accuracies are spread that sites have told of themselves lately; ``None`` if none did."""
        told = [numbers["accuracy"] for numbers in self.sites.asking.disclosed.values() if "accuracy" in numbers]
        return summarise(told) if told else None

    def standardise(self, features: int) -> dict[str, Tensor]:
        """Have sites add up the moments of their features, and standardise their inputs from now on.

        Args:
            features: how many numbers an example has.

        Returns:
            Mean and standard deviation, by name, as they go with the model from now on.

        Raises:
            PeerError: too few sites answered.
        """
        tally = Tally.of_moments(self._most_examples or UNKNOWN, features)
        state, there = self._snapshot.state, self._there(0)
        self._expect(self.round + 1, there)
        count, *sums = self.sites.tally("moments", state, model_digest(state), tally, there)
        totals = torch.tensor(sums, dtype=torch.float64).view(2, features)
        moments = Moments(round(count), totals[0], totals[1])
        self.sites.inputs = {"mean": moments.mean, "std": moments.std}
        return self.sites.inputs

    def _plan(self, number: int) -> tuple[Schedule, str]:
        there = self._there(number)
        if len(there) < self._needed:
            reason = f"{self._needed} sites are needed, and {len(there)} are there"
            return Schedule((), {}, 0.0, 0.0), reason
        self._expect(number + 1, there)
        return Schedule(self._selected(number, there), {}, 0.0, 0.0), ""

    def _selected(self, number: int, there: Sequence[int]) -> tuple[int, ...]:
        """The sites that a round invites, of those that are there."""
        eligible = torch.zeros(len(self._sizes), dtype=torch.bool)
        eligible[list(there)] = True
        generator = generator_for(self._seed, "round", number, "cohort")
        return self._selection.select(number, self._sizes, eligible, generator)

    def _expect(self, number: int, there: Sequence[int]) -> None:
        """Say whom a round will invite if nobody comes or goes, so that its sum can be set up ahead."""
        self.sites.expected = tuple(sorted(self._selected(number, there)))

    @property
    def _needed(self) -> int:
        """How many sites must be there for a round to open."""
        policy, rounds = self.sites.policy, self.sites.rounds
        return max(rounds.needed, policy.minimum if policy is not None else 1)

    def _there(self, round: int) -> tuple[int, ...]:
        """The sites that are there, waited for if they are too few."""
        asking = self.sites.asking
        presence, board = asking.presence, asking.board
        there = presence.look()
        wanted, seconds = self._needed, asking.timing.gather
        if not self._joined:
            wanted, seconds, self._joined = len(self._sizes), asking.timing.join, True
        if len(there) < wanted:
            board.enter(round, "waiting for sites", set(range(len(self._sizes))) - there.keys())
            there = presence.await_some(wanted, seconds)
            board.leave()
        board.present(there)
        return tuple(there) if len(there) >= self._needed or seconds == asking.timing.gather else self._there(round)
