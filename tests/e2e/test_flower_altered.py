"""Messages that are changed on their way between real processes: TLS and tacit's signatures, each without the other."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import pytest
import torch

from carrier import (
    Carried,
    Carrier,
    changing_clients,
    changing_servers,
    changing_words,
    clients_message,
)
from processes import (
    CLEAR,
    EVERYBODY,
    LONG,
    Credulous,
    coordinated,
    everybody,
    in_one_process,
    largest_difference,
    through,
    write,
)
from relay import Relay, flip
from tacit.federated.secure_sum.agreement import KeyPair
from tacit.federated.secure_sum.messages import Advert, Confirm, Inbox, Masked, Shares, Survivors, Unmask, bit_mask
from tacit.identity import Identity
from tacit.party.address import Address
from tacit.ring.prg import Prg
from tacit.runtimes.flower import messages
from tacit.runtimes.flower.asking import Timing
from tacit.runtimes.flower.federation import SiteFederation
from tacit.runtimes.flower.messages import Answer, Begin, Go
from tacit.sites.launch import Federation, Processes, processes, running

pytestmark = pytest.mark.slow
TIMING = Timing(work=25, stage=25, linger=2, gather=EVERYBODY, join=EVERYBODY)
EVERYONE, OTHERS = (0, 1, 2, 3), (0, 1, 2)
TARGET = 3
UNSIGNED, STRANGER, OLD = "is not signed by", "whose key is not pinned here", "a letter answers another question"


@dataclass
class World:
    """A federation whose messages pass a carrier.

    Args:
        over: the coordinator's.
        before: what passed in an honest round.
        own: the carrier's identity, which nobody has pinned.
        cohorts: of the rounds so far.
    """

    federation: Federation
    running: Processes
    carrier: Carrier
    over: SiteFederation
    before: list[Carried]
    own: Identity
    cohorts: list[tuple[int, ...]]

    def advance(self):
        everybody(self.over)
        record = self.over.advance()
        self.cohorts.append(record.cohort)
        return record

    def by(self, site: int, carried: Carried) -> bool:
        return carried.letter.writer == self.over.sites.terms.sites[site]

    def to(self, site: int, carried: Carried) -> bool:
        return carried.letter.reader == self.over.sites.terms.sites[site]

    def arrived(self, kind: type) -> list[Carried]:
        """Clients' messages of a kind that were carried as they were."""
        came = [carried for carried in self.carrier.seen if clients_message(carried, kind) is not None]
        return [carried for carried in came if carried not in self.carrier.changed]

    @property
    def refusals(self) -> str:
        """What the site wrote down that it refused."""
        lines = self.federation.journal(f"s{TARGET}").read_text().splitlines()
        return "\n".join(line for line in lines if " refused " in line)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("altered")
    federation, _ = write(folder / "all", insecure=True)
    with Carrier(Address("127.0.0.1", federation.port)) as carrier:
        through(federation, carrier.port)
        with processes(federation) as started, coordinated(federation, LONG, TIMING) as over:
            made = World(federation, started, carrier, over, [], Identity.fresh(), [])
            for _ in range(2):
                made.before[:] = carrier.seen
                carrier.forget()
                assert made.advance().cohort == EVERYONE
            yield made
            found = over.model().state_dict()
    assert largest_difference(found, in_one_process(folder / "one", LONG, made.cohorts)) <= 1e-6


def answers(kind: type, change: Callable) -> Callable[[World, Carried], bytes | None]:
    """The target's answers of a kind, with frames changed, under the signature that they had."""

    def attack(world: World, carried: Carried) -> bytes | None:
        mine = world.by(TARGET, carried) and clients_message(carried, kind) is not None
        return carried.with_frames(change).sealed if mine else None

    return attack


def questions(kind: type, change: Callable) -> Callable[[World, Carried], bytes | None]:
    """Likewise the questions to it."""

    def attack(world: World, carried: Carried) -> bytes | None:
        if not world.to(TARGET, carried) or not isinstance(carried.message, Begin | Go):
            return None
        other = carried.with_frames(changing_servers(kind, change))
        return other.sealed if other.message != carried.message else None

    return attack


def other_key(advert: Advert) -> Advert:
    """The carrier's own key, so that it would know the masks."""
    return msgspec.structs.replace(advert, mask_key=KeyPair(Prg.fresh()).public)


def other_shares(message: Shares | Inbox) -> Shares | Inbox:
    """Another sealed share, among those on their way."""
    (client, partner, sealed), *rest = message.sealed
    return msgspec.structs.replace(message, sealed=((client, partner, _flipped(sealed)), *rest))


def fewer(message: Confirm | Survivors) -> Confirm | Survivors:
    """Only three survivors, so that the fourth's mask would be taken away beside its sum's."""
    return msgspec.structs.replace(message, survivors=bit_mask((0, 1, 3), 4))


def other_unmasking(message: Unmask) -> Unmask:
    (client, share), *rest = message.shares
    return msgspec.structs.replace(message, shares=((client, _flipped(share)), *rest))


def another_sites_answer(world: World, carried: Carried) -> bytes | None:
    if world.by(TARGET, carried) and clients_message(carried, Masked) is not None:
        passed = (*world.carrier.seen, *world.before)
        return next(c for c in passed if world.by(2, c) and clients_message(c, Masked) is not None).frame
    return None


def earlier_answer(world: World, carried: Carried) -> bytes | None:
    if world.by(TARGET, carried) and clients_message(carried, Masked) is not None:
        return next(c for c in world.before if world.by(TARGET, c) and clients_message(c, Masked) is not None).frame
    return None


def answer_in_its_name(world: World, carried: Carried) -> bytes | None:
    mine = world.by(TARGET, carried) and isinstance(carried.message, Answer)
    return carried.forged_by(world.own) if mine else None


def answer_of_a_stranger(world: World, carried: Carried) -> bytes | None:
    mine = world.by(TARGET, carried) and isinstance(carried.message, Answer)
    return carried.sealed_by(world.own) if mine else None


def other_model(world: World, carried: Carried) -> bytes | None:
    if not world.to(TARGET, carried) or not isinstance(carried.message, Begin):
        return None
    return carried.with_tensors(tuple(tensor + 1 for tensor in carried.tensors)).sealed


def other_terms(world: World, carried: Carried) -> bytes | None:
    """Terms that the coordinator did not set."""
    if not world.to(TARGET, carried) or not isinstance(carried.message, Begin):
        return None
    terms = carried.message.terms
    easier = msgspec.structs.replace(terms, config=terms.config.replace("most_examples = 50", "most_examples = 60"))
    return carried.saying(msgspec.structs.replace(carried.message, terms=easier)).sealed


def question_of_a_stranger(world: World, carried: Carried) -> bytes | None:
    mine = world.to(TARGET, carried) and isinstance(carried.message, Begin)
    return carried.sealed_by(world.own) if mine else None


def another_sites_question(world: World, carried: Carried) -> bytes | None:
    if not world.to(TARGET, carried) or not isinstance(carried.message, Begin):
        return None
    return next(c for c in world.before if world.to(2, c) and isinstance(c.message, Begin)).frame


def earlier_question(world: World, carried: Carried) -> bytes | None:
    if not world.to(TARGET, carried) or not isinstance(carried.message, Begin):
        return None
    return next(c for c in world.before if world.to(TARGET, c) and isinstance(c.message, Begin)).frame


def _flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


# The attack; why the coordinator does not hear; why the site refuses.
ATTACKS = {
    "an advertised key": (answers(Advert, changing_clients(Advert, other_key)), UNSIGNED, ""),
    "shares that it deals": (answers(Shares, changing_clients(Shares, other_shares)), UNSIGNED, ""),
    "masked words": (answers(Masked, changing_words), UNSIGNED, ""),
    "a confirmation": (answers(Confirm, changing_clients(Confirm, fewer)), UNSIGNED, ""),
    "an unmasking share": (answers(Unmask, changing_clients(Unmask, other_unmasking)), UNSIGNED, ""),
    "an answer in its name": (answer_in_its_name, UNSIGNED, ""),
    "an answer of a stranger": (answer_of_a_stranger, STRANGER, ""),
    "another site's answer": (another_sites_answer, STRANGER, ""),
    "an earlier answer": (earlier_answer, OLD, ""),
    "the model": (other_model, OLD, UNSIGNED),
    "the terms": (other_terms, OLD, UNSIGNED),
    "shares that it holds": (questions(Inbox, other_shares), OLD, UNSIGNED),
    "the survivors": (questions(Survivors, fewer), OLD, UNSIGNED),
    "a question of a stranger": (question_of_a_stranger, OLD, STRANGER),
    "another site's question": (another_sites_question, OLD, "came to somebody else"),
    "an earlier question": (earlier_question, OLD, "this question came before"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_without_tls_what_is_changed_is_not_signed(world, name):
    attack, reason, refusal = ATTACKS[name]
    notes, refused = world.over.sites.asking.board.notes, world.refusals
    world.carrier.forget()
    notes.clear()
    world.carrier.change = lambda carried: attack(world, carried)
    record = world.advance()
    assert world.carrier.changed
    counted = any(world.by(TARGET, carried) for carried in world.arrived(Masked))
    assert record.cohort == (EVERYONE if counted else OTHERS)
    assert any(note.startswith(f"site {TARGET} ") and reason in note for note in notes)
    assert counted or reason in record.lost[TARGET]
    assert refusal in world.refusals[len(refused) :]
    assert counted or not any(world.by(TARGET, carried) for carried in world.arrived(Unmask))
    world.carrier.forget()
    assert world.advance().cohort == EVERYONE


def test_without_tls_too_few_that_are_heard_have_no_sum_and_give_no_share(world):
    world.carrier.forget()

    def change(carried: Carried) -> bytes | None:
        masked = clients_message(carried, Masked) is not None
        return carried.with_frames(changing_words).sealed if masked and not world.by(0, carried) else None

    world.carrier.change = change
    before = world.over.snapshot.state.parameters.clone()
    record = world.advance()
    assert record.cohort == ()
    assert "1 clients are left in stage MASK, 3 are needed: no sum" in record.note
    assert all(UNSIGNED in record.lost[site] for site in (1, 2, 3))
    assert torch.equal(world.over.snapshot.state.parameters, before)
    assert not world.arrived(Unmask)


@pytest.mark.parametrize(
    ("kind", "reason", "noted"),
    [
        (Begin, "did not answer within", "could not be read or answered"),
        (Answer, "answered what is no message of Flower's", ""),
    ],
)
def test_without_tls_what_is_no_message_of_flowers_any_more_is_dropped(world, kind, reason, noted):
    world.carrier.forget()

    def spoil(carried: Carried, content: bytes) -> bytes:
        mine = world.to(TARGET, carried) or world.by(TARGET, carried)
        return content[: len(content) // 2] if mine and isinstance(carried.message, kind) else content

    world.carrier.spoil = spoil
    record = world.advance()
    assert record.cohort == OTHERS
    assert reason in record.lost[TARGET]
    assert noted in world.running.log(f"s{TARGET}").read_text()
    world.carrier.forget()
    assert world.advance().cohort == EVERYONE


def test_a_site_whose_line_breaks_while_it_answers_holds_up_nobody(world):
    world.carrier.forget()
    world.carrier.cut = lambda carried: world.by(TARGET, carried) and clients_message(carried, Masked) is not None
    began = time.monotonic()
    record = world.advance()
    # Flower's own grid waits for three minutes for what was announced and did not come.
    assert time.monotonic() - began < 150
    assert record.cohort == OTHERS
    assert "did not answer within" in record.lost[TARGET]
    assert "cannot be reached" in world.running.log(f"s{TARGET}").read_text()
    world.carrier.forget()
    assert world.advance().cohort == EVERYONE


def test_without_tls_and_signatures_a_changed_update_is_in_the_model(tmp_path, monkeypatch):
    # So that the tests above and below say what they seem to: it is the signatures, and TLS, that help.
    federation, _ = write(tmp_path / "all", insecure=True)
    monkeypatch.setattr(messages, "verify", lambda *what: True)
    with Carrier(Address("127.0.0.1", federation.port)) as carrier:
        through(federation, carrier.port)
        with running(Credulous(federation)), coordinated(federation, CLEAR, TIMING) as over:
            everybody(over)
            target = over.sites.terms.sites[TARGET]

            def change(carried: Carried) -> bytes | None:
                if carried.letter.writer != target or not isinstance(carried.message, Answer):
                    return None
                return carried.with_tensors(tuple(torch.full_like(t, 0x41000000) for t in carried.tensors)).sealed

            carrier.change = change
            assert over.advance().cohort == EVERYONE
            found = over.model().state_dict()
    assert largest_difference(found, in_one_process(tmp_path / "one", CLEAR, [EVERYONE])) > 1


def test_without_signatures_bits_changed_on_the_way_are_noticed_by_tls(tmp_path, monkeypatch):
    federation, _ = write(tmp_path / "all")
    monkeypatch.setattr(messages, "verify", lambda *what: True)
    cohorts = []
    with Relay(Address("127.0.0.1", federation.port), to_target=[flip(40_000)], to_caller=[flip(9_000)]) as relay:
        behind = federation.folder / "s3.federation.toml"
        text = (federation.folder / "federation.toml").read_text()
        behind.write_text(text.replace(f":{federation.port}", f":{relay.address.port}"))
        own = federation.folder / "s3.toml"
        own.write_text(own.read_text().replace('"federation.toml"', f'"{behind.name}"'))
        with running(Credulous(federation)) as started, coordinated(federation, CLEAR, TIMING) as over:
            presence = over.sites.asking.presence
            assert len(presence.await_some(3, EVERYBODY)) >= 3
            for _ in range(4):
                presence.await_some(4, 30)
                cohorts.append(over.advance().cohort)
            started.kill("s3")
            found = over.model().state_dict()
    assert all(set(cohort) >= set(OTHERS) for cohort in cohorts)
    assert largest_difference(found, in_one_process(tmp_path / "one", CLEAR, cohorts)) <= 1e-6
    assert relay.passed[1] > 9_000
    assert "bad record mac" in started.log("s3").read_text().lower().replace("_", " ")
