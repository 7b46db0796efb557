"""What alice, bob and the provider must not learn from the service: their memory, disks and what they are sent.

After requests, none of their processes and none of their files holds an input, a weight or a result in any form in
which it would be recognised; the same search finds all of them where they are in the clear. What a client sends to a
party is uniform and another each time, though the input is the same. What the parties send each other is in
`tests/statistical/test_views.py`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

import tacit
from serving import close, cluster_of, inputs, model, pushed
from tacit.party import channel, messages
from tacit.party.cluster_file import ALICE, BOB, PARTIES
from tacit.party.local import LocalService
from tacit.party.messages import Ask
from tacit.ring.fixed_point import encode
from tacit.ring.prg import SEED_BYTES
from tacit.wire import Array, Kind

pytestmark = pytest.mark.slow
MODEL = model()
ASKED = 40
_PIECE = 1 << 22
_LEVEL = 1e-6


def forms(rows: Tensor) -> list[bytes]:
    """How each row, of three numbers or more, could stand in memory: as floats of either size, and in fixed point."""
    as_they_are = (rows.float(), rows.double(), encode(rows.float()))
    return [row.contiguous().numpy().tobytes() for form in as_they_are for row in form]


def secrets() -> dict[str, list[bytes]]:
    given = inputs(2)
    return {
        "an input": forms(given),
        "a weight": [one for name in ("0.weight", "2.weight") for one in forms(MODEL.state_dict()[name])],
        "a bias": forms(torch.stack([MODEL.state_dict()["2.bias"]])),
        "a result": forms(MODEL(given).detach()),
    }


def found(pieces: Iterator[bytes]) -> set[str]:
    """Which secrets occur; a piece's end is looked at again with the next one's beginning."""
    wanted, end, names = secrets(), b"", set()
    overlap = max(len(one) for many in wanted.values() for one in many)
    for piece in pieces:
        data = end + piece
        names |= {name for name, many in wanted.items() if any(one in data for one in many)}
        end = data[-overlap:]
    return names


def memory_of(pid: int) -> Iterator[bytes]:
    """All that a process has written to its memory, or could have."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            first, last = (int(one, 16) for one in span.split("-"))
            if not rights.startswith("rw"):
                continue
            for start in range(first, last, _PIECE):
                try:
                    memory.seek(start)
                    yield memory.read(min(_PIECE, last - start))
                except (OSError, ValueError):
                    break  # the kernel's own, or given back meanwhile


def processes(pid: int) -> list[int]:
    """A process and its children."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    folder = tmp_path_factory.mktemp("service")
    cluster_of(folder, ("clinic",))
    with LocalService(folder) as service:
        service.wait_ready()
        pushed(service)
        yield service


def ask(service: LocalService, times: int) -> None:
    given = inputs(2)
    with closing(tacit.connect(service.cluster, service.key("clinic"))) as parties:
        small = parties.model("small")
        for _ in range(times):
            assert close(small(given), MODEL(given))


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="the memory of a process is looked at as Linux shows it"
)
def test_no_process_of_the_parties_has_an_input_a_weight_or_a_result_in_memory(service: LocalService) -> None:
    ask(service, ASKED)
    assert found(memory_of(os.getpid())) == set(secrets())  # here they are in the clear
    for party in PARTIES:
        for pid in processes(service.pid(party)):
            assert found(memory_of(pid)) == set(), party


def test_no_disk_has_them_and_requests_change_pools_and_logs_alone(service: LocalService) -> None:
    before = {party: contents(service.folder / party) for party in PARTIES}
    ask(service, ASKED)
    after = {party: contents(service.folder / party) for party in PARTIES}
    for party in PARTIES:
        files = [*after[party].values(), (service.folder / f"{party}.log").read_bytes()]
        assert found(iter(files)) == set(), party
        changed = {name for name in before[party] | after[party] if before[party].get(name) != after[party].get(name)}
        assert {name.split("/")[0] for name in changed} <= {"pool", "dealt"}, party
    plain = service.folder / "plain"
    plain.write_bytes(b"".join(forms(inputs(2))))
    assert found(iter([plain.read_bytes()])) == {"an input"}


def test_what_a_party_is_sent_is_uniform_and_never_the_same(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alice is sent a seed and bob is sent words: beside them nothing but what anybody may know of a request."""
    sent: dict[str, list[bytes]] = {ALICE: [], BOB: []}
    write = channel.Channel._write

    def recorded(self: channel.Channel, kind: Kind, tensors: Sequence[Array], body: bytes) -> bool:
        said = messages.decode(messages.client_calls, body, "the client") if kind is Kind.CALL else None
        if isinstance(said, Ask):
            assert (said.seed is not None, len(tensors)) == ((True, 0) if self.peer == ALICE else (False, 1))
            sent[self.peer].append(said.seed or tensors[0].tobytes())
            assert msgspec.structs.replace(said, seed=None, number=0) == Ask(0, said.model, 2, said.deadline_ms)
        else:
            assert not tensors
        return write(self, kind, tensors, body)

    monkeypatch.setattr(channel.Channel, "_write", recorded)
    ask(service, 10 * ASKED)
    words = 8 * encode(inputs(2)).numel()
    assert ({len(one) for one in sent[ALICE]}, {len(one) for one in sent[BOB]}) == ({SEED_BYTES}, {words})
    for party, shares in sent.items():
        assert len(shares) == len(set(shares)) == 10 * ASKED, party
        counts = np.bincount(np.frombuffer(b"".join(shares), np.uint8), minlength=256)
        expected = counts.sum() / 256
        assert chi2.sf(((counts - expected) ** 2 / expected).sum(), 255) > _LEVEL, party
        assert found(iter(shares)) == set()
