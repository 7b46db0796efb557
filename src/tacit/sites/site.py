"""A site: answers a coordinator's questions as far as it agrees to them, and writes down what it was asked and did."""

from __future__ import annotations

import hashlib
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
from torch import Tensor

import tacit
from tacit.dp.ledger import Ledger
from tacit.errors import BudgetExceeded, InputError, PeerError, TacitError, TrainingError
from tacit.federated.algorithm import ServerState
from tacit.federated.secure_sum.client import MaskedClient, Policy, State, Task
from tacit.federated.secure_sum.ring import Words
from tacit.federated.transcript import Purpose, model_digest, run_digest, tensors_digest
from tacit.identity import Identity, key_text
from tacit.runs import config
from tacit.runtimes.flower.federation_file import FederationFile
from tacit.runtimes.flower.messages import (
    ANYBODY,
    PROTOCOL,
    Answer,
    Begin,
    Go,
    Hello,
    Here,
    Refusal,
    Reply,
    frame_digest,
    pack,
    seal,
    unpack,
    unseal,
)
from tacit.sites import policy
from tacit.sites.config import SiteFile
from tacit.sites.journal import Journal
from tacit.sites.memory import SiteMemory
from tacit.sites.setups import Setups
from tacit.sites.work import Holding, Study, in_the_clear

_TORCH = threading.Lock()
"""Held while something is built, traced or trained: PyTorch's tracer changes modules for the whole process."""

OPEN_ROUNDS = 4
"""So many questions, of different runs, are kept open; the oldest is given up for a new one."""


@dataclass(frozen=True)
class _Computed:
    """What came of a question: the vector for a secure sum, or the answer itself; and what is told beside it."""

    words: Words | None
    numbers: Mapping[str, float]
    tensors: Mapping[str, Tensor]
    disclosed: Mapping[str, float]
    says: str


@dataclass(frozen=True)
class _Open:
    """A question that is being answered in a secure sum."""

    begin: Begin
    study: Study
    client: MaskedClient
    computed: Future[_Computed]


class Site:
    """A site that answers.

    Args:
        file: what it has and allows.
        federation: who coordinates, and who else takes part.
        identity: the site's.

    Raises:
        InputError: federation.toml names another key for this site.
        DataError: its data cannot be read, or its files are damaged.
    """

    def __init__(self, file: SiteFile, federation: FederationFile, identity: Identity) -> None:
        named = next((site for site in federation.sites if site.name == file.name), None)
        if named is None or named.key != identity.public:
            found = "it is not there" if named is None else f"there it is {key_text(named.key)}"
            raise InputError(
                f"{file.federation} does not name site {file.name!r} with the key of {file.identity}, "
                f"{key_text(identity.public)}: {found}"
            )
        self._file, self._federation, self._identity = file, federation, identity
        self._memory = SiteMemory(file.state)
        self._journal = Journal(self._memory.journal)
        try:
            self._holding = Holding(*file.examples())
        except TacitError as error:
            self._journal.note("lost", f"the site's data cannot be used: {error}")
            raise
        self._ledger = Ledger(self._memory.ledger)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="work")
        self._studies: dict[bytes, Study] = {}
        self._rounds: dict[bytes, _Open] = {}
        self._setups = Setups(identity, frozenset(federation.keys), self._memory, OPEN_ROUNDS)
        self._journal.note(
            "started",
            f"site {file.name}, tacit {tacit.__version__}, {len(self._holding.train)} examples to train on and "
            f"{len(self._holding.kept)} kept back",
        )

    @property
    def journal(self) -> Journal:
        """What happened."""
        return self._journal

    def close(self) -> None:
        """Stop; what is being computed is waited for."""
        self._worker.shutdown(cancel_futures=True)
        self._ledger.close()
        self._journal.note("stopped", f"site {self._file.name}")

    def answer(self, frame: bytes) -> bytes:
        """See `tacit.runtimes.flower.client_app.Participant`."""
        about, asked = frame_digest(frame), None
        tensors: tuple[Tensor, ...] = ()
        try:
            readers = frozenset({self._identity.public, ANYBODY})
            opened = unseal(frame, readers, frozenset({self._federation.coordinator}))
            request = opened.request()
            if isinstance(request, Hello):
                reply: Reply = Here(request.nonce, PROTOCOL, tacit.__version__, policy.waiting(self._file.allow))
            elif opened.letter.reader == ANYBODY:
                raise PeerError("a question to nobody in particular may only be who is there")
            elif isinstance(request, Begin):
                asked = request
                reply, tensors = self._begin(request, opened.tensors)
            elif request.attempt in self._rounds:
                asked = self._rounds[request.attempt].begin
                reply = self._go(request)
            else:
                raise PeerError("this site has no part in that round: it was restarted meanwhile, or the round is over")
        except TacitError as error:
            reply = self._refused(str(error), asked)
        except Exception as error:  # its text could hold anything of the site's
            traceback.print_exception(error)
            reply = self._refused(f"an error of type {type(error).__name__}, see the site's own log", asked)
        return seal(self._identity, self._federation.coordinator, reply, tensors, about)

    def _refused(self, reason: str, begin: Begin | None) -> Refusal:
        if begin is None:
            self._journal.note("refused", reason)
        else:
            self._journal.note("refused", reason, begin.terms.run, begin.round, begin.work)
        return Refusal(reason)

    def _begin(self, begin: Begin, wired: tuple[Tensor, ...]) -> tuple[Answer, tuple[Tensor, ...]]:
        """Agree to a question, and begin to answer it."""
        study, tensors = self._study(begin), unpack(begin.tensors, wired)
        if begin.work == "moments" and not study.signature.standardised:
            raise InputError("moments of features are asked for, which this run has no use for")
        state = study.fresh if begin.work == "moments" else study.state(_model_round(begin), tensors)
        client, frame, clients = None, b"", 0
        if begin.frame:
            client = self._setups.client(begin, Policy(study.minimum))
            new = client.state is State.NEW
            frame = client.receive(begin.frame) or b"" if new else b""
            clients = client.invited
            client.expect(self._task(study, begin, state, clients))
            if not new:
                client.receive(begin.frame)
        self._memory.take(begin.attempt, begin.terms.run, begin.round)
        work = self._work(study, begin, state, tensors, clients)
        self._journal.note("agreed", self._in_words(study, clients), begin.terms.run, begin.round, begin.work)
        computed = self._worker.submit(work)
        if client is not None:
            opened = self._rounds[begin.attempt] = _Open(begin, study, client, computed)
            while len(self._rounds) > OPEN_ROUNDS:
                self._rounds.pop(next(iter(self._rounds)))
            return self._answer(opened, frame), ()
        result = computed.result()
        named, sent = pack(result.tensors)
        self._journal.note("sent", result.says, begin.terms.run, begin.round, begin.work)
        return Answer(numbers=result.numbers, disclosed=result.disclosed, tensors=named), sent

    def _go(self, go: Go) -> Answer:
        """The next step of a secure sum, and of setting up the one after it."""
        opened = self._rounds[go.attempt]
        begin, client = opened.begin, opened.client
        try:
            answer = self._answer(opened, client.receive(go.frame) or b"")
        finally:
            if client.state in (State.DONE, State.FAILED):
                self._rounds.pop(go.attempt, None)
        if not go.ahead:
            return answer
        try:
            ahead = self._setups.ahead(begin.terms.run, begin.round, Policy(opened.study.minimum), go.ahead)
        except TacitError as error:
            self._journal.note("refused", f"the next sum: {error}", begin.terms.run, begin.round, begin.work)
            return answer
        return msgspec.structs.replace(answer, ahead=ahead)

    def _answer(self, opened: _Open, frame: bytes) -> Answer:
        """What the client of a secure sum says: its frame, or its vector if that is due."""
        begin, client = opened.begin, opened.client
        if client.state is not State.READY:
            return Answer(frame=frame)
        try:
            result = opened.computed.result()
            if result.words is None:
                raise TrainingError(result.says)
            masked = client.mask(result.words)
        except BaseException:
            self._rounds.pop(begin.attempt, None)
            raise
        self._journal.note("sent", result.says, begin.terms.run, begin.round, begin.work)
        return Answer(frame=masked, disclosed=dict(result.disclosed))

    def _study(self, begin: Begin) -> Study:
        """The run that a question belongs to, if this site takes part in it."""
        terms, allow = begin.terms, self._file.allow
        if not set(terms.sites) <= set(self._federation.keys):
            raise PeerError("the run's sites are not all in this site's own federation.toml")
        if self._identity.public not in terms.sites:
            raise PeerError("this site is not among the run's sites")
        settings = config.parse(terms.config, "the run's configuration")
        if reasons := policy.objections(allow, settings, begin):
            raise InputError("; ".join(reasons))
        key = hashlib.sha256(msgspec.msgpack.encode(terms)).digest()
        if key not in self._studies:
            index = terms.sites.index(self._identity.public)
            folder, ledger = self._file.folder, self._ledger
            with _TORCH:
                study = Study.of(terms, settings, index, self._holding, folder, ledger, allow.minimum, allow.epsilon)
            self._studies[key] = study
            while len(self._studies) > OPEN_ROUNDS:
                self._studies.pop(next(iter(self._studies)))
        return self._studies[key]

    def _task(self, study: Study, begin: Begin, state: ServerState, clients: int) -> Task:
        """What this site expects a secure sum to be of, and for."""
        model = model_digest(state)
        if begin.work != "train":
            tally = study.tally(begin.work)
            encoding = tally.encoding(clients)
            application = tally.application(begin.terms.run, begin.work, begin.round, model)
            return Task(encoding.ring, encoding.length, application)
        contents = study.contents(state, clients)
        run = run_digest(begin.terms.config.encode(), begin.terms.run)
        beside, agreed = tensors_digest(state.shared), contents.description
        purpose = Purpose(run, begin.round, begin.previous, model, beside, agreed)
        return Task(contents.encoding.ring, contents.encoding.length, purpose.application)

    def _work(
        self, study: Study, begin: Begin, state: ServerState, tensors: Mapping[str, Tensor], clients: int
    ) -> Callable[[], _Computed]:
        """What to compute, once privacy has been paid for."""
        if begin.work != "train":

            def count() -> _Computed:
                with _TORCH:
                    return self._counted(study, begin, state, tensors, clients)

            return count
        examples, epsilon = study.examples(self._holding.train, tensors), self._pay(study, begin)
        memory, run = self._memory.recall(begin.terms.run, begin.counted), begin.terms.run

        def train() -> _Computed:
            with _TORCH:
                outcome = study.train(state, memory, examples)
            update = outcome.update
            if update is None:
                return _Computed(None, {}, {}, {}, outcome.reason)
            self._memory.keep(run, begin.round, outcome.memory)
            told = self._disclosed({"examples": float(len(examples))}, epsilon)
            if not clients:
                numbers, sent = in_the_clear(update)
                return _Computed(None, numbers, sent, told, f"the update of {len(update.delta)} numbers, in the clear")
            words = study.vector(state, clients, update)
            return _Computed(words, {}, {}, told, f"a masked vector of {len(words)} numbers{epsilon_text(epsilon)}")

        return train

    def _counted(
        self, study: Study, begin: Begin, state: ServerState, tensors: Mapping[str, Tensor], clients: int
    ) -> _Computed:
        """Counts and sums."""
        numbers, metrics = (study.moments(), {}) if begin.work == "moments" else study.tried(state, tensors)
        told = self._disclosed({"examples": numbers[0]}, None, metrics)
        if clients:
            words = study.tally(begin.work).encode(numbers, clients)
            return _Computed(words, {}, {}, told, f"a masked vector of {len(numbers)} sums")
        named = {f"{at}": number for at, number in enumerate(numbers)}
        return _Computed(None, named, {}, told, f"{len(numbers)} sums, in the clear")

    def _pay(self, study: Study, begin: Begin) -> float | None:
        """Charge the site's own ledger for a training, before any noise is drawn; the ε spent so far."""
        if study.private is None:
            return None
        try:
            refused = study.private.spend(begin.round, [0])
        except BudgetExceeded:
            refused = {0: ""}
        if refused:
            raise BudgetExceeded("its privacy budget is spent")
        return study.private.spent().epsilon

    def _disclosed(
        self, counts: Mapping[str, float], epsilon: float | None, metrics: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """As much of it as this site tells the coordinator."""
        allowed = self._file.allow.disclose
        told = dict(counts) if "examples" in allowed else {}
        told |= {"epsilon": epsilon} if "epsilon" in allowed and epsilon is not None else {}
        return told | dict(metrics or {}) if "metrics" in allowed else told

    def _in_words(self, study: Study, clients: int) -> str:
        """What a question asks for."""
        settings, examples = study.settings, len(self._holding.train)
        how = f"in a secure sum of {clients} sites" if clients else "in the clear"
        return f"{settings.model.name} by {type(settings.algorithm).__name__} on {examples} examples, {how}"


def epsilon_text(epsilon: float | None) -> str:
    """What the journal adds of the privacy spent."""
    return "" if epsilon is None else f"; ε = {epsilon:.3g} of its records' privacy is spent"


def _model_round(begin: Begin) -> int:
    """How many rounds the model has been through that comes with a question."""
    return begin.round - 1 if begin.work == "train" else begin.round
