"""Parts of the service that need no process: what to stock, whom to count on, what to serve, files to ask about."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tacit.cli.predict import read_items
from tacit.errors import DataError, InputError
from tacit.party.choosing import Unloaded, chosen
from tacit.party.promptness import Promptness
from tacit.party.stocking import MOST, TOGETHER, next_lease
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
    assert held[LARGE] == 4
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
    with pytest.raises(InputError, match="holds 12 numbers"):
        read_items(tmp_path / "x.npy", ModelInput((5,)))
    with pytest.raises(InputError, match="give an image"):
        read_items(tmp_path / "x.txt", wanted)
    (tmp_path / "bad.npy").write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be read"):
        read_items(tmp_path / "bad.npy", wanted)
