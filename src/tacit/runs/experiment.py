"""From a config to everything that a run needs."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacit.data.examples import Dataset, Examples
from tacit.data.partition import label_counts
from tacit.dp.ledger import Ledger
from tacit.errors import InputError
from tacit.federated.evaluation import EarlyStop
from tacit.federated.fedbuff import FedBuff
from tacit.federated.history import RoundRecord
from tacit.federated.parties import Parties
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.selection import Selection
from tacit.report.data import TrainingReport
from tacit.runs import build, config, tensorboard
from tacit.runs.data import holdings
from tacit.runs.folder import RunFolder
from tacit.runs.listing import flat
from tacit.runtimes.asynchronous import AsynchronousFederation
from tacit.runtimes.executors import Executor
from tacit.runtimes.federation import Devices, Federation
from tacit.runtimes.simulation import Evaluation, example_counts, executor_for, privacy_plan, sum_protocol
from tacit.runtimes.simulation import train as rounds_of

LOSS = functional.cross_entropy
"""All data sets of a config are classified."""


@dataclass(frozen=True)
class Experiment:
    """A run that can begin.

    Args:
        config: its settings.
        origin: the folder that its paths are relative to.
        model: with its initial weights, or what they are drawn for.
        data: the data set.
        clients: the training examples of each client.
        evaluation: when the model is tried, and on what.
        stop: when training ends early.
        notes: what the user should know.
    """

    config: config.Config
    origin: Path
    model: nn.Module
    data: Dataset
    clients: Sequence[Examples]
    evaluation: Evaluation
    stop: EarlyStop
    notes: list[str]

    @contextmanager
    def running(self, folder: RunFolder) -> Iterator[Federation]:
        """The federation, with whatever processes and files it needs while it runs.

        Args:
            folder: of the run; the privacy ledger and the transcript of secure sums are written there.
        """
        settings, sizes = self.config, example_counts(self.clients)
        devices = build.devices(settings, len(self.clients), self.origin)
        selection = build.selection(settings, devices)
        algorithm = build.algorithm(settings, self.model)
        parties, evidence = None, folder.evidence
        if settings.secure_sum is not None:
            parties = evidence.parties(len(sizes))
        secure_mean = self._secure_mean(sizes, selection, parties)
        privacy, private, ledger = build.privacy(settings), None, None
        with ExitStack() as held:
            if privacy is not None:
                ledger = held.enter_context(closing(Ledger(folder.path / "ledger.sqlite")))
                rounds, name = settings.rounds.number, folder.path.name
                plan = privacy_plan(self.model, LOSS, sizes, rounds, selection, devices, secure_mean, name)
                private = privacy.start(algorithm, plan, ledger)
            execution = settings.execution
            executor, notes = executor_for(
                self.model, LOSS, self.clients, execution.processes, execution.solver, private
            )
            held.enter_context(closing(executor))
            self.notes.extend(notes)
            if isinstance(algorithm, FedBuff):
                yield self._asynchronous(algorithm, executor, sizes, devices)
            else:
                transcript = None
                if parties is not None:
                    transcript = evidence.writer(folder.config.read_bytes(), parties.coordinator, ledger)
                yield Federation(
                    self.model,
                    executor,
                    sizes,
                    algorithm=algorithm,
                    selection=selection,
                    devices=devices,
                    secure_mean=secure_mean,
                    transcript=transcript,
                    private=private,
                    seed=settings.seed,
                    initial=settings.model.initial,
                )

    @property
    def checkpoint_every(self) -> int:
        """Rounds between snapshots."""
        return self.config.rounds.checkpoint_every

    def train(self, federation: Federation, history: list[RoundRecord], keep: Callable[[RoundRecord], None]) -> None:
        """Train to the last round, or as far as training goes.

        Args:
            federation: from `running`.
            history: of the rounds before; added to.
            keep: called with each record before the next round.
        """
        for record in rounds_of(federation, self.config.rounds.number, self.evaluation, self.stop, history):
            keep(record)

    def _secure_mean(self, sizes: Tensor, selection: Selection, parties: Parties | None) -> SecureMean | None:
        section = self.config.secure_sum
        if section is None:
            return None
        protocol = sum_protocol(section.protocol, sizes, selection, section.minimum, parties)
        return SecureMean(protocol, section.clip, section.bits, verified=section.verified)

    def _asynchronous(
        self, algorithm: FedBuff, executor: Executor, sizes: Tensor, devices: Devices | None
    ) -> AsynchronousFederation:
        chosen = self.config.algorithm
        guarded = self.config.privacy is not None or self.config.secure_sum is not None
        if devices is None or guarded or not isinstance(chosen, config.FedBuff):
            raise InputError(
                "algorithm.name='fedbuff' needs simulated devices, and has no form under differential privacy or "
                "secure sum: add [devices], leave out [privacy] and [secure_sum]"
            )
        return AsynchronousFederation(
            self.model,
            executor,
            sizes,
            algorithm=algorithm,
            concurrency=chosen.concurrency,
            devices=devices,
            seed=self.config.seed,
            initial=self.config.model.initial,
        )

    def report(self, history: Sequence[RoundRecord]) -> TrainingReport:
        """What the HTML report shows."""
        packages = {name: version(name) for name in ("tacit", "torch", "numpy")}
        return TrainingReport(
            dataset=self.data.name,
            model=self.config.model.name,
            algorithm=type(self.config.algorithm).__name__,
            secure_sum=self.config.secure_sum is not None,
            history=history,
            label_counts=self._label_counts(),
            seconds=sum(record.seconds for record in history),
            settings={name: str(value) for name, value in flat(self.config).items() if value is not None},
            versions={**packages, "python": platform.python_version(), "machine": platform.machine()},
        )

    def _label_counts(self) -> Tensor | None:
        """Examples of each class at each client; ``None`` where they are elsewhere."""
        if not self.clients:
            return None
        targets: list[Tensor] = [examples.targets for examples in self.clients]
        ends = torch.tensor([len(part) for part in targets]).cumsum(0).tolist()
        parts = [torch.arange(end - len(part), end) for end, part in zip(ends, targets, strict=True)]
        return label_counts(torch.cat(targets), parts, self.data.classes)


def prepare(settings: config.Config, origin: Path) -> Experiment:
    """Load the data, split it, make the model; nothing is trained or written.

    Args:
        settings: what the config says.
        origin: the folder that its paths are relative to.

    Raises:
        InputError: a value is out of range, or two do not go together.
        DataError: the data set is missing or damaged.
    """
    rounds = settings.rounds
    if rounds.number < 1 or rounds.checkpoint_every < 1:
        raise InputError(
            f"rounds.number={rounds.number}, rounds.checkpoint_every={rounds.checkpoint_every}: give 1 or more"
        )
    if settings.execution.tensorboard:
        tensorboard.writer()
    held = holdings(settings, origin)
    tests = held.tests if rounds.evaluate_clients_every else None
    if rounds.evaluate_clients_every and tests is None:
        raise InputError(
            f"rounds.evaluate_clients_every={rounds.evaluate_clients_every} needs examples that clients keep back: "
            "set data.held_out, such as 0.2"
        )
    evaluation = Evaluation(held.data.test, rounds.evaluate_every, tests, rounds.evaluate_clients_every or 1)
    stop = EarlyStop(rounds.target_accuracy, rounds.patience)
    model = build.model(settings, held.data, origin)
    experiment = Experiment(settings, origin, model, held.data, held.clients, evaluation, stop, [])
    example_counts(held.clients)
    build.algorithm(settings, model)
    build.privacy(settings)
    return experiment
