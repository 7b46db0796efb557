"""The sites of a run as what a federation needs: where clients train, and how their vectors are summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tacit.errors import CodecError, InputError, PeerError
from tacit.federated.algorithm import Algorithm, Extra, Memory, ServerState, Update
from tacit.federated.devices_schedule import RoundPolicy
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.interface import ABOUT_NOTHING, Opening, Summed, VectorOf, unannounced
from tacit.federated.secure_sum.masked import invitation
from tacit.federated.secure_sum.messages import Invite, Subject
from tacit.federated.secure_sum.parameters import choose
from tacit.federated.secure_sum.ring import Ring
from tacit.federated.secure_sum.server import MaskedServer
from tacit.federated.transcript import BEGINNING
from tacit.ring.prg import Prg
from tacit.runtimes.executors import Job, Outcome
from tacit.runtimes.flower.ahead import Ahead
from tacit.runtimes.flower.asking import Asking, Heard
from tacit.runtimes.flower.client_app import BEGIN
from tacit.runtimes.flower.messages import NONCE_BYTES, Begin, Terms, Work, pack
from tacit.runtimes.flower.sums import SiteSum
from tacit.runtimes.flower.tallies import Tally

COUNTED = "sites/counted"
"""The name under which the coordinator remembers of a client in which round its update was last used."""


def remembered(round: int) -> Memory:
    """What the coordinator remembers of a client whose update was used in a round; the rest the site keeps."""
    return {COUNTED: torch.tensor(round)}


def counted(memory: Memory) -> int:
    """The round in which a client's update was last used; 0 for none."""
    return int(memory[COUNTED]) if COUNTED in memory else 0


@dataclass
class Sites:
    """An `Executor` whose clients are sites, and the `SecureSum` over them.

    Under a secure sum the executor has no outcome to give, for no single update ever comes here: sites begin to train
    when `sum` asks them for keys, and their vectors arrive masked.

    Args:
        asking: reaches them.
        terms: of the run.
        policy: what sites insist on in a secure sum; ``None`` if the coordinator is to see every update.
        rounds: whom to wait for.
        inputs: what goes with the model, such as what to standardise features with, by name.
    """

    asking: Asking
    terms: Terms
    policy: Policy | None
    rounds: RoundPolicy
    inputs: dict[str, Tensor] = field(default_factory=dict)
    previous: bytes = field(default=BEGINNING, init=False)
    """The digest of the transcript's last entry, which the sites' signatures are to cover."""
    expected: tuple[int, ...] = field(default=(), init=False)
    """The sites that the next round will have if nobody comes or goes; a sum among all of them sets theirs up."""
    _state: ServerState | None = field(default=None, init=False)
    _counted: dict[int, int] = field(default_factory=dict, init=False)
    _ahead: Ahead | None = field(default=None, init=False)

    def run(self, algorithm: Algorithm, state: ServerState, jobs: Sequence[Job], seed: int) -> Iterator[Outcome]:
        """See `Executor`."""
        self._state, self._counted = state, {job.client: counted(job.memory) for job in jobs}
        return iter(()) if self.policy is not None else self._trained(algorithm, state, [job.client for job in jobs])

    def close(self) -> None:
        """See `Executor`; sites are nobody's to close."""

    def sum(
        self,
        ring: Ring,
        length: int,
        cohort: Sequence[int],
        vector_of: VectorOf,
        application: bytes = ABOUT_NOTHING,
        opening: Opening = unannounced,
    ) -> Summed:
        """See `SecureSum`; ``vector_of`` is not asked, for the vectors are at the sites."""
        if self._state is None:
            raise PeerError("a secure sum over sites belongs to a round of training")
        return self._sum("train", self._state.round + 1, self._state, ring, length, cohort, application, opening)

    @property
    def minimum(self) -> int:
        """See `SecureSum`."""
        return 1 if self.policy is None else max(self.policy.minimum, self.rounds.minimum)

    def tally(self, work: Work, state: ServerState, model: bytes, tally: Tally, cohort: Sequence[int]) -> list[float]:
        """Add up a few numbers of each site.

        Args:
            work: what the numbers are of.
            state: whose model they are about.
            model: its digest.
            tally: what is added up.
            cohort: the sites.

        Raises:
            PeerError: too few answered; under a secure sum nothing is revealed then.
        """
        if self.policy is None:
            return self._added(work, state, tally, cohort)
        encoding = tally.encoding(len(cohort))
        application = tally.application(self.terms.run, work, state.round, model)
        summed = self._sum(work, state.round, state, encoding.ring, encoding.length, cohort, application)
        return list(tally.decode(summed.total, len(cohort)))

    def _begin(self, work: Work, round: int, state: ServerState, attempt: bytes, frame: bytes, site: int) -> Begin:
        named, _ = pack(self._sent(work, state))
        previous = self.previous if work == "train" else BEGINNING
        return Begin(self.terms, round, attempt, work, previous, frame, self._counted.get(site, 0), named)

    def _sent(self, work: Work, state: ServerState) -> dict[str, Tensor]:
        """What travels with a question."""
        if work == "moments":
            return {}
        named: dict[str, Mapping[str, Tensor]] = {
            "buffer/": state.buffers,
            "shared/": state.shared,
            "input/": self.inputs,
        }
        beside = {prefix + name: tensor for prefix, group in named.items() for name, tensor in group.items()}
        return {"parameters": state.parameters, **beside}

    def _trained(self, algorithm: Algorithm, state: ServerState, cohort: Sequence[int]) -> Iterator[Outcome]:
        updates: dict[int, Update] = {}

        def take(site: int, heard: Heard) -> None:
            updates[site] = _update_of(heard, state, algorithm.extras(state))

        self._answers("train", state.round + 1, state, cohort, take)
        for site in cohort:
            update = updates.get(site)
            lost = self.asking.lost.get(site, "late: enough others had finished")
            yield Outcome(site, update, {}, "" if update else lost)

    def _answers(
        self, work: Work, round: int, state: ServerState, cohort: Sequence[int], take: Callable[[int, Heard], None]
    ) -> None:
        """Have sites answer in the clear."""
        attempt, (_, tensors) = Prg.fresh().bytes(NONCE_BYTES), pack(self._sent(work, state))
        requests = {site: (self._begin(work, round, state, attempt, b"", site), tensors) for site in cohort}
        enough = self.rounds.close_at if work == "train" else None
        asked = self.asking.ask(BEGIN[work], round, requests, enough, self.asking.timing.work, take)
        for number, _ in enumerate(asked, 1):
            if number == enough:
                break

    def _added(self, work: Work, state: ServerState, tally: Tally, cohort: Sequence[int]) -> list[float]:
        count = sum(scalar.count for scalar in tally.scalars)
        totals = [0.0] * count

        def take(site: int, heard: Heard) -> None:
            numbers = [heard.answer.numbers.get(f"{i}") for i in range(count)]
            if len(heard.answer.numbers) != count or None in numbers:
                raise CodecError(f"it sends {len(heard.answer.numbers)} numbers, {count} were asked for")
            totals[:] = [total + number for total, number in zip(totals, numbers, strict=True) if number is not None]

        self._answers(work, state.round, state, cohort, take)
        return totals

    def _sum(
        self,
        work: Work,
        round: int,
        state: ServerState,
        ring: Ring,
        length: int,
        cohort: Sequence[int],
        application: bytes,
        opening: Opening = unannounced,
    ) -> Summed:
        """One secure sum among sites, which sets up the next one if it can."""
        attempt, (_, tensors) = Prg.fresh().bytes(NONCE_BYTES), pack(self._sent(work, state))
        server = self._server(tuple(cohort))
        server.about(Subject(length, ring.bits, application))

        def begin_of(site: int, frame: bytes) -> tuple[Begin, tuple[Tensor, ...]]:
            return self._begin(work, round, state, attempt, frame, site), tensors

        close_at = self.rounds.close_at if work == "train" else None
        following = self._following(tuple(cohort))
        summing = SiteSum(self.asking, BEGIN[work], round, cohort, attempt, begin_of, close_at, opening, following)
        summed = summing.run(server)
        if following is not None and following.ready:
            self._ahead = following
        return summed

    def _server(self, cohort: tuple[int, ...]) -> MaskedServer:
        """The server of a sum that begins: the one that was set up, if it is of this cohort."""
        ahead = self._ahead
        if ahead is None or ahead.cohort != cohort:
            return MaskedServer(self._invite(cohort))
        self._ahead = None
        return ahead.server

    def _following(self, cohort: tuple[int, ...]) -> Ahead | None:
        """The sum to set up while one among this cohort goes on; sites keep one, so it takes the place of any other."""
        expected = self.expected
        if not set(cohort).issuperset(expected) or len(expected) < self.minimum:
            return None
        if self._ahead is not None and self._ahead.cohort == expected:
            return None
        self._ahead = None
        return Ahead(expected, self._invite(expected))

    def _invite(self, cohort: Sequence[int]) -> Invite:
        """The settings of a new sum."""
        if self.policy is None:
            raise InputError("these sites answer in the clear: a secure sum needs a policy that they insist on")
        identities = [self.terms.sites[site] for site in cohort]
        return invitation(identities, _sparing(self.policy, len(cohort)), self.rounds.minimum)


def _sparing(policy: Policy, cohort: int) -> Policy:
    """The policy of a cohort that is too small to do without anybody: then all are needed, or there is no sum.

    What sites insist on is privacy, which does not rest on how many drop out.
    """
    try:
        choose(cohort, policy.assumption)
    except InputError:
        return replace(policy, assumption=replace(policy.assumption, dropped=0.0))
    return policy


def _update_of(heard: Heard, state: ServerState, extras: Mapping[str, Extra]) -> Update:
    """A site's update, as far as its shapes and types go what the round is for.

    Raises:
        CodecError: it is something else.
    """
    numbers, tensors = heard.answer.numbers, dict(heard.tensors)
    expected = {
        "delta": (state.parameters.dtype, state.parameters.shape),
        **{f"buffer/{name}": (buffer.dtype, buffer.shape) for name, buffer in state.buffers.items()},
    }
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items() if not name.startswith("extra/")}
    beside = {name.removeprefix("extra/"): tensor for name, tensor in tensors.items() if name.startswith("extra/")}
    shapes = {name: tensor.shape for name, tensor in beside.items()}
    if shapes != {name: extra.shape for name, extra in extras.items()} or found not in (
        expected,
        {"delta": expected["delta"]},
    ):
        raise CodecError("it sends other tensors than an update of this model has")
    if numbers.keys() != {"examples", "loss", "weight"} or not numbers["weight"] > 0:
        raise CodecError("an update comes with its number of examples, its loss and its weight")
    buffers = {name.removeprefix("buffer/"): t for name, t in tensors.items() if name.startswith("buffer/")}
    update = Update.of_client(
        tensors["delta"], buffers, int(numbers["examples"]), numbers["loss"], numbers["weight"], beside
    )
    if not update.is_finite():
        raise CodecError("its update is not finite")
    return update
