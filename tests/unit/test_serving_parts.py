"""Parts of the service that need no process: what to stock, whom to count on, what to serve, files to ask about."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from tacit.cli.predict import read_items
from tacit.errors import DataError, InputError, StorageFull
from tacit.identity import Identity
from tacit.party.choosing import Unloaded, chosen
from tacit.party.house import House
from tacit.party.local import prepare
from tacit.party.logs import Log
from tacit.party.promptness import Promptness
from tacit.party.sounding import Sounding
from tacit.party.stocking import MOST, TOGETHER, next_lease
from tacit.party.tickets import Ticket
from tacit.party.vault import Entry
from tacit.program.inputs import ModelInput

SMALL, LARGE = ("a" * 64, 1), ("a" * 64, 64)


def test_every_line_gets_one_ticket_then_what_is_used_most_gets_more_within_memory() -> None:
    sizes, levels = {SMALL: 1, LARGE: 100}, {SMALL: 1000, LARGE: 1000}
    held = dict.fromkeys(sizes, 0)
    while lease := next_lease(sizes, held, levels, {LARGE: 10.0}, 450):
        line, count = lease
        held[line] += count
        assert sum(held[line] * size for line, size in sizes.items()) <= 450
    assert MOST - TOGETHER < held[SMALL] <= MOST
    assert held[LARGE] == 3, "a part of the memory is the other line's"
    # A line that nobody uses fills its part, and leaves the rest to those that are used.
    held = dict.fromkeys(sizes, 0)
    while lease := next_lease(sizes, held, levels, {}, 850):
        held[lease[0]] += lease[1]
    assert held[LARGE] == 2
    # What lacks little is left alone.
    assert next_lease({SMALL: 1}, {SMALL: MOST - TOGETHER + 1}, levels, {SMALL: 10.0}, 450) is None
    assert next_lease({SMALL: 1}, {SMALL: MOST - TOGETHER}, levels, {SMALL: 10.0}, 450) == (SMALL, TOGETHER)
    # A line that is larger than all the memory has one all the same, and nothing comes from an empty pool.
    assert next_lease({LARGE: 100}, {}, {LARGE: 5}, {}, 10) == (LARGE, 1)
    assert next_lease({LARGE: 100}, {LARGE: 1}, {LARGE: 5}, {}, 10) is None
    assert next_lease(sizes, {}, {}, {}, 450) is None


def test_a_client_is_counted_upon_once_it_has_been_prompt() -> None:
    known = Promptness(0.004)
    assert not known.is_prompt("clinic")
    known.came("clinic", 0.001)
    assert known.is_prompt("clinic")
    known.late("clinic")
    assert not known.is_prompt("clinic")
    for _ in range(30):
        known.came("clinic", 0.0)
    assert known.is_prompt("clinic")


def test_a_network_that_is_not_as_planned_is_told_once() -> None:
    def sounded(planned_s: float, trips: list[float]) -> list[float | None]:
        sounding, now, told = Sounding(planned_s), 0.0, []
        for seconds in trips:
            number = sounding.send(now)
            sounding.returned(now + seconds, number)
            surprise = sounding.surprise()
            told.append(None if surprise is None else round(surprise, 6))
            now += 1.0
        return told

    assert sounded(0.0002, [0.041, 0.04] * 20) == [None] * 29 + [0.04] + [None] * 10
    assert sounded(0.04, [0.0003] * 30)[-1] == 0.0003
    # A busy process, and a difference that no plan depends on, are no surprise; nor is what comes back too late.
    assert not any(sounded(0.04, [0.5] * 5 + [0.042] + [0.9] * 54))
    assert not any(sounded(0.0002, [0.002] * 60))
    sounding = Sounding(0.0)
    late = sounding.send(0.0)
    sounding.send(1.0)
    sounding.returned(1.2, late)
    assert sounding.round_trip is None


def test_the_newest_version_that_both_have_is_served_unless_unloaded(tmp_path: Path) -> None:
    entries = [Entry(name, "owner", digit * 64, "alice", n, (1,)) for n, (name, digit) in enumerate(("a1", "b2", "a3"))]
    everywhere = {entry.digest for entry in entries}
    assert chosen(entries, everywhere, ()) == ["3" * 64, "2" * 64]
    assert chosen(entries, everywhere - {"3" * 64}, ()) == ["1" * 64, "2" * 64]
    unloaded = Unloaded(tmp_path)
    unloaded.set("a", True)
    assert Unloaded(tmp_path).names == {"a"}
    assert chosen(entries, everywhere, unloaded.names) == ["2" * 64]
    unloaded.set("a", False)
    assert not Unloaded(tmp_path).names
    (tmp_path / "unloaded.json").write_bytes(b"{")
    with pytest.raises(DataError, match="cannot be read"):
        Unloaded(tmp_path)


def test_files_to_ask_about(tmp_path: Path) -> None:
    wanted = ModelInput((1, 2, 3))
    values = np.arange(12, dtype=np.float64).reshape(2, 6)
    np.save(tmp_path / "x.npy", values)
    np.savetxt(tmp_path / "x.csv", values, delimiter=",")
    for name in ("x.npy", "x.csv"):
        items = read_items(tmp_path / name, wanted)
        assert items.dtype == torch.float32
        assert torch.equal(items.reshape(2, 6), torch.from_numpy(values).float())
    for shape in ((1, 2, 3), (2, 3), (6,), (4, 1, 2, 3), (4, 2, 3), (4, 6)):
        items = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
        np.save(tmp_path / "y.npy", items)
        assert torch.equal(read_items(tmp_path / "y.npy", wanted).flatten(), torch.from_numpy(items).flatten().float())
    for shape in ((3, 2, 1), (2, 3, 1), (3, 2), (12,), (2, 2, 3, 1), (0, 6), (1, 1, 1, 2, 3)):
        np.save(tmp_path / "y.npy", np.zeros(shape))
        with pytest.raises(InputError, match=r"holds (no numbers|numbers of shape)"):
            read_items(tmp_path / "y.npy", wanted)
    np.save(tmp_path / "y.npy", np.array([1.0, 2.0]))
    assert torch.equal(read_items(tmp_path / "y.npy", ModelInput((2,), whole=True)), torch.tensor([[1, 2]]))
    np.save(tmp_path / "y.npy", np.array([1.0, 2.5]))
    with pytest.raises(InputError, match="not whole"):
        read_items(tmp_path / "y.npy", ModelInput((2,), whole=True))
    with pytest.raises(InputError, match="none of the files that can be asked about"):
        read_items(tmp_path / "x.txt", wanted)
    (tmp_path / "bad.npy").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"bad\.npy is not a readable \.npy array"):
        read_items(tmp_path / "bad.npy", wanted)


def test_what_a_full_disk_does_not_let_go_of_is_thrown_away_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, log = prepare(tmp_path), io.StringIO()
    house = House("bob", cluster, Identity.load(tmp_path / "bob.key"), tmp_path / "bob", Log("bob", log))
    tickets = [Ticket("a" * 64, 1, serial) for serial in range(3)]
    house.pool.put_seeds(dict.fromkeys(tickets, bytes(16)))

    def full(*_: object) -> None:
        raise StorageFull("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(house.pool._ledger, "transaction", full)
        assert house.lease("a" * 64, 1, 1) == house.discard_ready(tickets) == []
        assert house.claim(tickets) == ([], True)
        house.discard(tickets[:2])
        house.tidy()
    assert log.getvalue().count("disk_full") == 5
    assert house.pool.serials("a" * 64, 1) == [0, 1, 2]
    house.tidy()
    assert house.pool.serials("a" * 64, 1) == [2]
    assert house.claim(tickets) == ([tickets[2]], False)
    house.pool.close()
    house.jobs.close()
