"""Dealing tickets ahead of need: what the provider, bob and alice take for it, beside plaintext in the same run.

    python benchmarks/dealing.py --net lenet --batch 64 --tickets 16

One line of JSON. Three processes: the provider draws tickets and sends them over TLS, bob writes them to his disk, and
alice hers, synced. ``*_cpu_s`` is what one core computes for a ticket, whatever else the machine does; ``wall_s`` is
what passes on this machine, its disk included. Plaintext is one batch in float32 on one thread, best of 30, in seconds
of one core too. ``draw_s`` is the provider's arithmetic alone.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from tacit.bench.measuring import inputs_of, versions
from tacit.bench.nets import build
from tacit.errors import PeerError
from tacit.identity import Identity, key_text
from tacit.party import dialing, tls
from tacit.party.address import Address
from tacit.party.children import ENVIRONMENT
from tacit.party.dealing import Dealer, DealtModel
from tacit.party.dealing_messages import Want
from tacit.party.loaded import LoadedModel
from tacit.party.pool import PoolStore
from tacit.party.push import Push, prepare
from tacit.party.refilling import fetch, take_seeds, ticket_bytes
from tacit.party.tickets import DealtLedger
from tacit.party.transport import Link
from tacit.party.vault import Vault

KEY = bytes(32)
NAMES = ("provider", "alice", "bob")
IDENTITIES = {name: Identity(bytes([number]) * 32) for number, name in enumerate(NAMES)}
PINS = {name: identity.public for name, identity in IDENTITIES.items()}


def dial(port: int, name: str) -> Link:
    """A party's link to the provider."""
    return dialing.dial(Address("127.0.0.1", port), IDENTITIES[name], "provider", PINS["provider"], patience=None)


def be_provider(listener: socket.socket, folder: Path, pushed: Push) -> None:
    """Deal until bob is gone."""
    vault = Vault(folder / "provider", KEY, "provider")
    vault.save(pushed.provider)
    dealer, identity = Dealer(vault, DealtLedger(folder / "provider")), IDENTITIES["provider"]
    context, threads = tls.server_context(identity, PINS), []
    for _ in range(2):
        link = dialing.answer(listener.accept()[0], context, identity, PINS, None)
        if link.peer == "alice":
            dealer.attach_alice(link)
        else:
            threads.append(threading.Thread(target=dealer.serve_bob, args=(link,)))
            threads[0].start()
    threads[0].join()


def be_alice(port: int, folder: Path) -> None:
    """Store seeds until the provider is gone."""
    store = PoolStore(folder / "alice", KEY, 1 << 40)
    try:
        take_seeds(dial(port, "alice"), store)
    except PeerError:
        store.close()


def forked(work: object, *args: object) -> int:
    """Do it in another process."""
    pid = os.fork()
    if not pid:
        with torch.inference_mode():
            work(*args)  # type: ignore[operator]
        os._exit(0)
    return pid


def cpu_s(pid: int) -> float:
    """Seconds of one core that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def best(work: object, count: int) -> float:
    """The least that one of several runs took of one core."""
    times = []
    for _ in range(count):
        began = time.process_time()
        work()  # type: ignore[operator]
        times.append(time.process_time() - began)
    return min(times)


def measure(net: str, batch: int, tickets: int, folder: Path) -> dict[str, object]:
    """Run it."""
    torch.set_num_threads(1)
    model, shape = build(net)
    owner = key_text(Identity(bytes([9]) * 32).public)
    pushed = prepare(model, [torch.zeros(1, *shape)], name=net, owner=owner, batch_sizes=[batch])
    loaded, dealt, inputs = LoadedModel(pushed.bob), DealtModel(pushed.provider), inputs_of((batch, *shape))
    with torch.inference_mode():
        plaintext = best(lambda: model(inputs), 30)
        draw = best(lambda: [None for _ in dealt.draw(batch).corrections], 6)
        with dialing.listen(Address("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            pids = {"provider": forked(be_provider, listener, folder, pushed), "alice": forked(be_alice, port, folder)}
        link, store = dial(port, "bob"), PoolStore(folder / "bob", KEY, 1 << 40)
        while not fetch(link, store, loaded, Want(pushed.digest, batch, 1)).complete:
            time.sleep(0.05)
        pids["bob"] = os.getpid()
        before, began = {name: cpu_s(pid) for name, pid in pids.items()}, time.perf_counter()
        complete = fetch(link, store, loaded, Want(pushed.digest, batch, tickets)).complete
        wall = (time.perf_counter() - began) / len(complete)
        used = {f"{name}_cpu_s": (cpu_s(pid) - before[name]) / len(complete) for name, pid in pids.items()}
    link.close()
    for name in ("provider", "alice"):
        os.waitpid(pids[name], 0)
    ratios = {"draw_over_plaintext": draw / plaintext, "provider_over_plaintext": used["provider_cpu_s"] / plaintext}
    size = {"mb_a_ticket": ticket_bytes(loaded, batch) / 1e6, "tickets_a_minute": 60 / wall}
    figures = {"plaintext_s": plaintext, "draw_s": draw, **used, "wall_s": wall, **size, **ratios}
    rounded = {name: float(f"{value:.3g}") for name, value in figures.items()}
    return {"net": net, "batch": batch, "tickets": len(complete), **rounded, "versions": versions()}


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="lenet")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tickets", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(measure(options.net, options.batch, options.tickets, Path(place))))
