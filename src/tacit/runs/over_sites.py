"""From a config with ``runtime = "flower"`` to a federation over sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tacit import atomic
from tacit.data.digits import load_digits
from tacit.data.examples import Examples
from tacit.data.mnist import load_mnist
from tacit.dp.ledger import Ledger
from tacit.errors import DataError, InputError, PeerError
from tacit.federated.devices_schedule import RoundPolicy
from tacit.federated.evaluation import EarlyStop
from tacit.federated.fedbuff import FedBuff
from tacit.federated.history import RoundRecord
from tacit.federated.privacy import Plan, RecordDP
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.mean import SecureMean
from tacit.identity import Identity, key_text
from tacit.runs import build, config
from tacit.runs.data import Signature, signature
from tacit.runs.experiment import LOSS, Experiment
from tacit.runs.folder import RunFolder
from tacit.runs.progress import ProgressFile
from tacit.runs.seat import Seat
from tacit.runtimes.federation import Federation
from tacit.runtimes.flower.asking import Timing
from tacit.runtimes.flower.board import Board
from tacit.runtimes.flower.federation import SiteFederation
from tacit.runtimes.flower.federation_file import FederationFile
from tacit.runtimes.flower.messages import Terms
from tacit.runtimes.flower.sites import Sites
from tacit.runtimes.flower.strategy import Rounds, reached
from tacit.runtimes.flower.superlink import SuperLink
from tacit.runtimes.simulation import Evaluation

OnBoard = Callable[[Board], None]


@dataclass(frozen=True)
class SiteExperiment(Experiment):
    """A run over sites that can begin.

    Args:
        seat: the coordinator's files.
        watch: told of what happens as it happens.
    """

    seat: Seat
    watch: OnBoard

    @property
    def checkpoint_every(self) -> int:
        """Always 1: what sites keep of earlier rounds goes when the coordinator says that a later one counted."""
        return 1

    @contextmanager
    def running(self, folder: RunFolder) -> Iterator[Federation]:
        """See `Experiment.running`: the federation while this process is the ServerApp of a run on the SuperLink."""
        seat, settings = self.seat, self.config
        federation, coordinator = FederationFile.read(seat.federation), Identity.load(seat.identity)
        if coordinator.public != federation.coordinator:
            raise InputError(
                f"{seat.identity} holds {key_text(coordinator.public)}, and {seat.federation} names "
                f"{key_text(federation.coordinator)} as the coordinator"
            )
        seat.write(folder.path / "coordinator.toml")
        link = SuperLink(federation.superlink, _secret(seat.secret))
        for site in federation.sites:
            link.register(site.node)
        own = folder.evidence.coordinator(federation.keys)
        progress = ProgressFile(folder.path, settings.rounds.number, [site.name for site in federation.sites])
        board = Board(lambda changed: self._show(changed, progress))
        ended = "the coordinator stopped"
        try:
            with ExitStack() as held:
                _stop_before(folder, link)
                number, grid = held.enter_context(link.run())
                (folder.path / "flower-run").write_text(str(number))
                terms = Terms(own.public, folder.config.read_text(encoding="utf-8"), federation.keys)
                sites = reached(
                    grid, coordinator, terms, self._policy(len(terms.sites)), self._rounds, self._timing, board
                )
                made = self._federation(folder, sites, own, held)
                self._standardise(folder, made)
                yield made
            ended = "finished"
        finally:
            progress.show(board, ended)

    def train(self, federation: Federation, history: list[RoundRecord], keep: Callable[[RoundRecord], None]) -> None:
        """See `Experiment.train`: by Flower's ``Strategy``."""
        if not isinstance(federation, SiteFederation):
            raise InputError("a run over sites trains a federation over sites")
        rounds = Rounds(federation, self.evaluation, self.stop, history, keep)
        rounds.start(federation.sites.asking.courier.grid, num_rounds=self.config.rounds.number)

    def _federation(self, folder: RunFolder, sites: Sites, own: Identity, held: ExitStack) -> SiteFederation:
        settings, count = self.config, len(sites.terms.sites)
        algorithm, selection = build.algorithm(settings, self.model), build.selection(settings, None)
        secure, mean, transcript, private, ledger = settings.secure_sum, None, None, None, None
        if secure is not None:
            mean = SecureMean(sites, secure.clip, secure.bits, verified=secure.verified)
        privacy = build.privacy(settings)
        # The sites themselves protect their records, each with a ledger of its own.
        if privacy is not None and not isinstance(privacy, RecordDP):
            ledger = held.enter_context(closing(Ledger(folder.path / "ledger.sqlite")))
            everybody = torch.ones(count, dtype=torch.int64)
            expected = min(selection.expected(everybody), self._rounds.close_at or count)
            name = folder.path.name
            plan = Plan(self.model, LOSS, everybody, settings.rounds.number, expected, None, name, mean)
            private = privacy.start(algorithm, plan, ledger)
        if secure is not None:
            transcript = folder.evidence.writer(folder.config.read_bytes(), own, ledger)
        return SiteFederation(
            self.model,
            sites,
            None if secure is None else secure.most_examples,
            algorithm=algorithm,
            selection=selection,
            secure_mean=mean,
            transcript=transcript,
            private=private,
            seed=settings.seed,
            initial=settings.model.initial,
        )

    def _standardise(self, folder: RunFolder, federation: SiteFederation) -> None:
        """Have features standardised by all sites' moments, summed once a run."""
        kind = signature(self.config)
        if not kind.standardised:
            return
        path = folder.path / "standardisation.safetensors"
        if path.exists():
            try:
                federation.sites.inputs = load_file(path)
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} is damaged: {error}") from error
            return
        inputs = federation.standardise(kind.shape[0])
        partial = path.with_suffix(atomic.PARTIAL)
        save_file(inputs, partial)
        atomic.sync(partial)
        partial.replace(path)

    def _policy(self, count: int) -> Policy | None:
        """What sites insist on in a secure sum, as each of them finds from the same settings."""
        return None if self.config.secure_sum is None else Policy(build.least_vectors(self.config, count))

    @property
    def _rounds(self) -> RoundPolicy:
        section = self.config.devices
        if section is None:
            return RoundPolicy()
        return RoundPolicy(section.over_selection, section.deadline, section.close_at, section.minimum)

    @property
    def _timing(self) -> Timing:
        wait, deadline = self.seat.wait, self._rounds.deadline
        work = wait.work if deadline is None else min(wait.work, deadline)
        return Timing(work, wait.stage, wait.linger, wait.gather, wait.join)

    def _show(self, board: Board, progress: ProgressFile) -> None:
        progress.show(board)
        self.watch(board)


def prepare(settings: config.Config, origin: Path, seat: Seat, watch: OnBoard) -> SiteExperiment:
    """Make the model, and what there is to try it on; nobody is asked anything.

    Args:
        settings: what the config says.
        origin: the folder that its paths are relative to.
        seat: the coordinator's files.
        watch: told of what happens as it happens.

    Raises:
        InputError: a value is out of range, or has no meaning for sites.
    """
    _check(settings)
    kind, rounds = signature(settings), settings.rounds
    test = _public_test(kind, settings, origin)
    evaluation = Evaluation(
        test,
        rounds.evaluate_every or 1,
        () if rounds.evaluate_clients_every else None,
        rounds.evaluate_clients_every or 1,
        test is None and rounds.evaluate_every > 0,
    )
    data = kind.blank()
    model = build.model(settings, data, origin)
    if isinstance(build.algorithm(settings, model), FedBuff):
        raise InputError("algorithm.name='fedbuff' has no form over sites: choose another")
    stop = EarlyStop(rounds.target_accuracy, rounds.patience)
    return SiteExperiment(settings, origin, model, data, (), evaluation, stop, [], seat, watch)


def _check(settings: config.Config) -> None:
    secure, devices = settings.secure_sum, settings.devices
    if secure is not None and secure.protocol != "masked":
        raise InputError(f"secure_sum.protocol={secure.protocol!r}: between sites it is 'masked'")
    if secure is not None and secure.most_examples is None:
        raise InputError(
            "secure_sum.most_examples is missing: over sites it says how many examples a site may have at most, which "
            "everybody knows, since nobody is told how many each has"
        )
    if devices is not None and devices.trace is not None:
        raise InputError("devices.trace is of simulated devices: leave it out where clients are sites")
    if isinstance(settings.selection, config.ByExamples):
        raise InputError("selection.name='examples' needs everybody's number of examples, which sites do not tell")
    if settings.rounds.number < 1:
        raise InputError(f"rounds.number={settings.rounds.number}: give 1 or more")


def _public_test(kind: Signature, settings: config.Config, origin: Path) -> Examples | None:
    """The test set of a data set that is everybody's, if the coordinator has it."""
    if not kind.public:
        return None
    folder = None if settings.data.dir is None else origin / settings.data.dir
    with suppress(DataError):
        return (load_mnist(folder) if kind.name == "mnist" else load_digits()).test
    return None


def _secret(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the SuperLink's secret {path} cannot be read ({error.strerror}): it is the file that the SuperLink was "
            "started with, --superexec-auth-secret-file"
        ) from error


def _stop_before(folder: RunFolder, link: SuperLink) -> None:
    """End what a coordinator that died has left on the SuperLink, so that no site works for it."""
    left = folder.path / "flower-run"
    with suppress(OSError, ValueError, PeerError):
        link.stop(int(left.read_text()))
