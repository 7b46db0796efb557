"""Rounds over a SuperLink between real processes: Flower's own FedAvg, and tacit without and with a secure sum.

    python benchmarks/peers/flower_rounds.py --nodes 10 --rounds 20

2NN on MNIST (under TACIT_DATA; noise of its shape elsewhere) split evenly among the nodes, all of them in every round,
one epoch in batches of ten, over TLS on this machine's loopback interface. One line of JSON a kind, then one of ratios:

- ``flower``: Flower's FedAvg and a plain PyTorch ClientApp on ``flower-supernode``, as Flower's users run them
- ``flower-in-process``: the same strategy and ClientApp on nodes that answer as tacit's sites do, in one process
- ``flower-brisk``: the same, by a grid that looks for answers as often as tacit's coordinator does
- ``tacit``: tacit's FedAvg, updates in the clear
- ``tacit-masked``: tacit's FedAvg, updates in a masked sum, rounds signed

Times are from the end of a round to that of the next, so the first round, with all that starts, is apart. Bytes are
those that the SuperLink counts between itself and the nodes.
"""

from __future__ import annotations

import os

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from federated_peer import Clock, mark_run
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.cli.build import build_fab_from_disk
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from tacit.data.examples import Dataset, Examples
from tacit.data.mnist import load_mnist
from tacit.data.partition import iid
from tacit.federated.evaluation import evaluate
from tacit.federated.initial import initialise
from tacit.federated.models import two_nn
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.selection import Uniform
from tacit.federated.transcript import Transcript, run_digest
from tacit.identity import Identity
from tacit.runs import build, config
from tacit.runs.data import signature
from tacit.runtimes.flower.courier import BRISK, LONGEST_PAUSE
from tacit.runtimes.flower.federation import SiteFederation
from tacit.runtimes.flower.federation_file import FederationFile, node_key
from tacit.runtimes.flower.messages import Terms
from tacit.runtimes.flower.strategy import reached
from tacit.runtimes.flower.superlink import SuperLink
from tacit.sites.launch import Federation, Processes, environment, free_port

HERE = Path(__file__).parent
KINDS = ("flower", "flower-in-process", "flower-brisk", "tacit", "tacit-masked")
LR, BATCH_SIZE = 0.05, 10
PATIENCE = 600.0
"""Seconds for all nodes to be there, or all to be gone."""
CONFIG = """
seed = 1
runtime = "flower"
[data]
dataset = "sites"
shape = [1, 28, 28]
classes = 10
[model]
name = "2nn"
[algorithm]
name = "fedavg"
lr = {lr}
batch_size = {batch_size}
[selection]
name = "uniform"
cohort = {nodes}
[rounds]
number = {rounds}
"""
SECURE_SUM = "[secure_sum]\nmost_examples = {examples}\n"


class Timed(FedAvg):
    """Ticks when a round's updates have become one."""

    def __init__(self, clock: Clock, nodes: int) -> None:
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
        self.clock = clock

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """See Flower."""
        result = super().aggregate_train(server_round, replies)
        self.clock.tick()
        return result


class Bench:
    """A federation's files, its examples, and what is run on it.

    Args:
        folder: for all of it.
        nodes, rounds, examples: how many; of examples, those of each node.
    """

    def __init__(self, folder: Path, nodes: int, rounds: int, examples: int) -> None:
        self.nodes, self.rounds = nodes, rounds
        self.federation = Federation.make(folder, [f"s{number}" for number in range(nodes)])
        self.processes = Processes(self.federation)
        self.file = FederationFile.read(folder / "federation.toml")
        self.link = SuperLink(self.file.superlink, (folder / "superlink.secret").read_bytes())
        data = dataset(nodes * examples)
        self.name, self.test = data.name, data.test
        parts = iid(data.train.targets, nodes, torch.Generator().manual_seed(0))
        self.examples = min(examples, min(map(len, parts)))
        for name, part in zip(self.federation.names, parts, strict=True):
            np.save(folder / f"{name}.x.npy", data.train.inputs[part[: self.examples]].numpy())
            np.save(folder / f"{name}.y.npy", data.train.targets[part[: self.examples]].numpy())
            data_of_site = f'format = "numpy"\ninputs = "{name}.x.npy"\ntargets = "{name}.y.npy"\n'
            self.federation.site(name, data_of_site, 'privacy = "none"\nclear = true\n')
            key = node_key(Identity.load(folder / f"{name}.key"))
            (folder / f"{name}.node").write_bytes(
                key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
            )

    def measure(self, kind: str) -> dict[str, Any]:
        """The figures of a kind."""
        before = os.getloadavg()[0]
        with self._started(kind):
            clock, model, (up, down) = self._tacit(kind) if kind.startswith("tacit") else self._flower(kind)
        laps = clock.laps[1:] or clock.laps
        walls = [wall for _, wall in laps]
        return {
            "kind": kind,
            "nodes": self.nodes,
            "rounds": self.rounds,
            "data": f"{self.name}, {self.examples} examples a node",
            "median_s": statistics.median(walls),
            "min_s": min(walls),
            "max_s": max(walls),
            "first_s": clock.laps[0][1],
            "cpu_s": statistics.mean(cpu for cpu, _ in laps),
            "bytes_up": up // self.rounds,
            "bytes_down": down // self.rounds,
            "accuracy": evaluate(model, self.test)[1],
            "load_before": before,
            "load_after": os.getloadavg()[0],
        }

    def _flower(self, kind: str) -> tuple[Clock, torch.nn.Module, tuple[int, int]]:
        """Flower's strategy."""
        model = two_nn()
        initialise(model, "he", torch.Generator().manual_seed(0))
        with self.link.run(build_fab_from_disk(HERE / "flower_app")) as (number, grid):
            self._await(grid, self.nodes)
            if kind == "flower-brisk":
                grid.send_and_receive = brisk(grid)  # type: ignore[method-assign]
            clock = Clock()
            result = Timed(clock, self.nodes).start(
                grid,
                ArrayRecord(model.state_dict()),
                self.rounds,
                train_config=ConfigRecord({"lr": LR, "batch-size": BATCH_SIZE}),
            )
            traffic = self.link.traffic(number)
        model.load_state_dict(result.arrays.to_torch_state_dict())
        return clock, model, traffic

    def _tacit(self, kind: str) -> tuple[Clock, torch.nn.Module, tuple[int, int]]:
        """What `tacit train` makes of such a config, without a run's folder."""
        masked, run = kind == "tacit-masked", Identity.fresh()
        text = CONFIG.format(lr=LR, batch_size=BATCH_SIZE, nodes=self.nodes, rounds=self.rounds)
        text += SECURE_SUM.format(examples=self.examples) if masked else ""
        settings, coordinator = config.parse(text), Identity.load(self.federation.folder / "coordinator.key")
        model, secure = build.model(settings, signature(settings).blank(), HERE), settings.secure_sum
        with self.link.run() as (number, grid):
            self._await(grid, self.nodes)
            terms = Terms(run.public, text, self.file.keys)
            sites = reached(grid, coordinator, terms, None if secure is None else Policy(3))
            federation = SiteFederation(
                model,
                sites,
                None if secure is None else secure.most_examples,
                algorithm=build.algorithm(settings, model),
                selection=Uniform(self.nodes),
                secure_mean=None if secure is None else SecureMean(sites, secure.clip, secure.bits),
                transcript=Transcript(run_digest(text.encode(), run.public), run, lambda entry: None),
            )
            if len(sites.asking.presence.await_some(self.nodes, PATIENCE)) < self.nodes:
                raise RuntimeError(f"not all sites are there: {sites.asking.board.notes}")
            clock = Clock()
            for _ in range(self.rounds):
                record = federation.advance()
                if record.lost:
                    raise RuntimeError(f"round {record.round} lost sites: {record.lost}")
                clock.tick()
            traffic = self.link.traffic(number)
        return clock, federation.model(), traffic

    @contextmanager
    def _started(self, kind: str) -> Iterator[None]:
        """The nodes of a kind, running; the SuperLink runs on from kind to kind."""
        if "superlink" not in self.processes.running:
            self.processes.start_superlink()
            for site in self.file.sites:
                self.link.register(site.node)
        with contextlib.ExitStack() as running:
            for name in self.federation.names:
                running.enter_context(self._node(kind, name))
            yield
        with self.link.run() as (_, grid):
            self._await(grid, 0)

    @contextmanager
    def _node(self, kind: str, name: str) -> Iterator[None]:
        """A node's process, and those that it starts."""
        folder = self.federation.folder
        if kind == "flower":
            command = [
                *(sys.executable, "-c", "from flwr.supernode.cli import flower_supernode; flower_supernode()"),
                *("--superlink", self.file.superlink.superlink, "--root-certificates", str(folder / "superlink.pem")),
                *("--auth-supernode-private-key", str(folder / f"{name}.node"), "--port", str(free_port())),
                *("--node-config", f'data="{folder / name}"'),
            ]
        elif kind.startswith("flower"):
            command = [sys.executable, str(HERE / "flower_node.py"), str(folder), name]
        else:
            main = "from tacit.cli.main import main; main()"
            command = [sys.executable, "-c", main, "site", "join", "--config", str(folder / f"{name}.toml")]
        with (folder / f"{name}.{kind}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=own_environment(folder),
                start_new_session=True,
            )
        try:
            yield
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()

    def _await(self, grid: Grid, nodes: int) -> None:
        """Until so many nodes are connected."""
        end = time.monotonic() + PATIENCE
        while len(list(grid.get_node_ids())) != nodes:
            if time.monotonic() > end:
                raise RuntimeError(f"there are not {nodes} nodes: see the logs in {self.federation.folder}")
            time.sleep(0.5)


def own_environment(folder: Path) -> dict[str, str]:
    """Of nodes; Flower's finds its commands beside this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**environment(folder), "PATH": path}


def brisk(grid: Grid) -> Callable[..., list[Message]]:
    """Flower's `Grid.send_and_receive`, which does not wait three seconds between two looks."""

    def send_and_receive(messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        waiting, found, pause = set(grid.push_messages(list(messages))), [], BRISK
        end = time.monotonic() + (PATIENCE if timeout is None else timeout)
        while waiting and time.monotonic() < end:
            answers = list(grid.pull_messages(list(waiting)))
            found += answers
            waiting -= {answer.metadata.reply_to_message_id for answer in answers}
            pause = BRISK if answers else min(1.5 * pause, LONGEST_PAUSE)
            if waiting:
                time.sleep(pause)
        return found

    return send_and_receive


def dataset(examples: int) -> Dataset:
    """MNIST if there is a folder for it, and noise of its shape elsewhere."""
    if os.environ.get("TACIT_DATA"):
        return load_mnist(download=False)
    generator = torch.Generator().manual_seed(0)

    def noise(count: int) -> Examples:
        inputs = torch.empty(count, 1, 28, 28).uniform_(generator=generator)
        return Examples(inputs, torch.empty(count, dtype=torch.int64).random_(10, generator=generator))

    return Dataset("noise", noise(examples), noise(1000), 10)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--examples", type=int, default=6000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--folder", type=Path, help="for keys, examples and logs; left out: one that goes at the end")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    mark_run()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "federation"
        bench = Bench(folder, args.nodes, args.rounds, args.examples)
        medians: dict[str, float] = {}
        try:
            for kind in args.kinds:
                figures = bench.measure(kind)
                medians[kind] = figures["median_s"]
                print(json.dumps(figures), flush=True)
        finally:
            bench.processes.stop()
    masked = medians.get("tacit-masked")
    if masked is not None:
        print(json.dumps({f"tacit-masked ÷ {kind}": masked / median for kind, median in medians.items()}), flush=True)


if __name__ == "__main__":
    main()
