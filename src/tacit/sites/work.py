"""What a site computes in a run: by the run's configuration and the site's own code, never by code that was sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.data.heart_disease import Moments, standardised
from tacit.data.tables import check_examples
from tacit.dp.ledger import Ledger
from tacit.errors import CodecError, InputError
from tacit.federated.algorithm import Algorithm, Memory, ServerState, Update
from tacit.federated.evaluation import evaluate, ranking_quality
from tacit.federated.generators import generator_for, seed_for
from tacit.federated.initial import initialise
from tacit.federated.local.traced import solver_for
from tacit.federated.local.work import LocalSolver
from tacit.federated.privacy import Plan, Privacy, PrivateTraining, RecordDP
from tacit.federated.secure_sum.contents import Contents
from tacit.federated.secure_sum.interface import PlainSum
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.secure_sum.ring import Words
from tacit.ring.prg import Prg
from tacit.runs import build, config
from tacit.runs.data import Signature, signature
from tacit.runtimes.executors import Job, Outcome, one_thread, train_client
from tacit.runtimes.flower.messages import Terms
from tacit.runtimes.flower.tallies import Tally

LOSS = functional.cross_entropy
"""All that a config trains are classifiers."""
_SAMPLE = 10


@dataclass(frozen=True)
class Holding:
    """A site's examples.

    Args:
        train: to train on.
        kept: to try models on.
    """

    train: Examples
    kept: Examples


@dataclass
class Study:
    """A run as one site takes part in it.

    Args:
        terms: of the run.
        settings: its configuration.
        index: the site's place among the sites.
        signature: of the examples that the run is for.
        model: its architecture.
        fresh: the server's state before the first round.
        algorithm: of the clients.
        private: what protects the site's records, by noise of its own; ``None`` for nothing.
        secure_mean: how an update becomes a vector; ``None`` without a secure sum.
        minimum: the fewest vectors in a sum: what the site asks for, and what the run's noise is provisioned for.
        holding: the site's examples.
    """

    terms: Terms
    settings: config.Config
    index: int
    signature: Signature
    model: nn.Module
    fresh: ServerState
    algorithm: Algorithm
    private: PrivateTraining | None
    secure_mean: SecureMean | None
    minimum: int
    holding: Holding
    _solver: LocalSolver | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(
        cls,
        terms: Terms,
        settings: config.Config,
        index: int,
        holding: Holding,
        folder: Path,
        ledger: Ledger,
        minimum: int = 3,
        epsilon: float | None = None,
    ) -> Study:
        """Prepare to take part.

        Args:
            terms, settings, index, holding: see the class.
            folder: where the code of models lies that come as ``FILE.py:FACTORY``.
            ledger: the site's own.
            minimum: the fewest vectors in a sum that the site agrees to.
            epsilon: the site's own privacy budget; ``None`` for none beside the run's.

        Raises:
            InputError: the configuration cannot be trained here.
            DataError: the site's examples are not such as the run is for.
        """
        kind = signature(settings)
        for examples in (holding.train, holding.kept):
            check_examples(examples, kind.shape, kind.classes)
        # Weights come from the coordinator, as tensors, and not from a file that the configuration names.
        unweighted = msgspec.structs.replace(settings, model=msgspec.structs.replace(settings.model, weights=None))
        model = build.model(unweighted, kind.blank(), folder)
        initialise(model, settings.model.initial, generator_for(settings.seed, "initial"))
        algorithm = build.algorithm(settings, model)
        everybody = torch.ones(len(terms.sites), dtype=torch.int64)
        selection, secure = build.selection(settings, None), settings.secure_sum
        private, mean, least = None, None, minimum
        if secure is not None:
            least = build.least_vectors(settings, len(terms.sites))
            mean = SecureMean(PlainSum(least), secure.clip, secure.bits, verified=secure.verified)
        if (privacy := build.privacy(settings)) is not None:
            sizes, expected = torch.tensor([len(holding.train)]), selection.expected(everybody)
            name = f"run {terms.run.hex()[:16]}"
            plan = Plan(model, LOSS, sizes, settings.rounds.number, expected, None, name, mean)
            started = _limited(privacy, epsilon).start(algorithm, plan, ledger)
            algorithm = started.algorithm
            private = started if isinstance(privacy, RecordDP) else None
        fresh = algorithm.init(model, len(terms.sites))
        return cls(terms, settings, index, kind, model, fresh, algorithm, private, mean, max(least, minimum), holding)

    def state(self, round: int, tensors: Mapping[str, Tensor]) -> ServerState:
        """The server's state of a round, from what came with the question.

        Raises:
            CodecError: it is not that of this model and algorithm.
        """
        fresh = self.fresh
        buffers = _below("buffer/", tensors)
        shared = _below("shared/", tensors)
        parameters = tensors.get("parameters", torch.empty(0))
        for what, found, expected in (
            ("parameters", {"": parameters}, {"": fresh.parameters}),
            ("buffers", buffers, fresh.buffers),
            ("what is sent beside the model", shared, fresh.shared),
        ):
            if _form(found) != _form(expected):
                raise CodecError(f"{what}: other tensors came than those of {self.settings.model.name} in this run")
        return replace(fresh, parameters=parameters, buffers=buffers, shared=shared, round=round)

    def examples(self, examples: Examples, tensors: Mapping[str, Tensor]) -> Examples:
        """Examples as the model takes them: standardised by what came with the question, if the run asks for it.

        Raises:
            CodecError: nothing came to standardise by.
        """
        if not self.signature.standardised:
            return examples
        inputs = _below("input/", tensors)
        if inputs.keys() != {"mean", "std"}:
            raise CodecError("nothing came to standardise features by, which this run does")
        return standardised(examples, inputs["mean"], inputs["std"])

    def train(self, state: ServerState, memory: Memory, examples: Examples) -> Outcome:
        """Train; differential privacy has been paid for."""
        if self._solver is None:
            sample = examples.subset(torch.arange(min(_SAMPLE, len(examples))))
            own = None if self.private is None else self.private.solver
            self._solver = own or solver_for(self.model, LOSS, sample)[0]
        with one_thread():
            return train_client(
                self.algorithm, state, Job(self.index, memory), self._solver, examples, self.settings.seed
            )

    def contents(self, state: ServerState, clients: int) -> Contents:
        """What a vector of this round's secure sum holds.

        Raises:
            InputError: there is no secure sum, or its settings do not fit the round.
        """
        if self.secure_mean is None:
            raise InputError("this run has no secure sum")
        return self.secure_mean.contents(self.algorithm, state, torch.tensor([self.most_examples]), clients)

    def vector(self, state: ServerState, clients: int, update: Update) -> Words:
        """An update as the vector of a secure sum, with the noise that is to be in it.

        Raises:
            RangeError: something in it is not finite, or too large to be summed.
        """
        seed = self.settings.seed
        rounding = Prg(seed_for(seed, "round", state.round + 1, "client", self.index, "rounding"))
        noise_of = None if self.secure_mean is None else self.secure_mean.noise_of(self.algorithm, state)
        return self.contents(state, clients).encode(update, noise_of(self.index) if noise_of else rounding)

    @property
    def most_examples(self) -> int:
        """The most examples that a site may have, which all know.

        Raises:
            InputError: the run does not say, or this site has more.
        """
        section = self.settings.secure_sum
        most = None if section is None else section.most_examples
        if most is None:
            raise InputError("a secure sum between sites needs secure_sum.most_examples, the most that a site may have")
        if max(len(self.holding.train), len(self.holding.kept)) > most:
            raise InputError(f"this site has more than {most} examples, the most that the run allows for")
        return most

    def tried(self, state: ServerState, tensors: Mapping[str, Tensor]) -> tuple[list[float], dict[str, float]]:
        """How good the global model is on the examples kept back: what is added up, and what may be disclosed."""
        examples = self.examples(self.holding.kept, tensors)
        if not len(examples):
            return [0.0, 0.0, 0.0], {}
        state.load_into(self.model)
        with one_thread():
            loss, accuracy = evaluate(self.model, examples, loss=LOSS)
            auc = ranking_quality(self.model, examples) if self.signature.classes == 2 else None
        metrics = {"accuracy": accuracy, "loss": loss} | ({} if auc is None else {"auc": auc})
        return [float(len(examples)), float(round(accuracy * len(examples))), loss * len(examples)], metrics

    def moments(self) -> list[float]:
        """Of the features of the examples to train on: how many, sums, sums of squares."""
        moments = Moments.of(self.holding.train.inputs)
        return [float(moments.count), *moments.total.tolist(), *moments.squares.tolist()]

    def tally(self, work: str) -> Tally:
        """What is added up, for ``"evaluate"`` and ``"moments"``."""
        if work == "evaluate":
            return Tally.of_evaluation(self.most_examples)
        return Tally.of_moments(self.most_examples, self.signature.shape[0])


def in_the_clear(update: Update) -> tuple[dict[str, float], dict[str, Tensor]]:
    """An update as it is sent where there is no secure sum: its numbers and its tensors."""
    tensors = {"delta": update.delta}
    tensors |= {f"buffer/{name}": buffer for name, buffer in update.buffers.items()}
    tensors |= {f"extra/{name}": tensor for name, tensor in update.extra.items()}
    return {"examples": float(update.examples), "loss": update.loss, "weight": update.weight}, tensors


def _limited(privacy: Privacy, epsilon: float | None) -> Privacy:
    """The run's privacy of records within the site's own budget as well."""
    if epsilon is None or not isinstance(privacy, RecordDP):
        return privacy
    within = [limit for limit in (privacy.budget, privacy.target_epsilon, epsilon) if limit is not None]
    return replace(privacy, budget=min(within))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _form(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
