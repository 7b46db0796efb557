"""Sites in this process for the tests: their files, and a grid of Flower's that calls their real ClientApps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from tacit.data.examples import Examples
from tacit.federated.history import RoundRecord
from tacit.identity import Identity, key_text
from tacit.runs import over_sites
from tacit.runs.train import OnBoard, start, unwatched
from tacit.runtimes.flower import strategy
from tacit.runtimes.flower.client_app import client_app
from tacit.runtimes.flower.courier import Courier
from tacit.runtimes.flower.federation_file import FederationFile, entry
from tacit.sites.config import SiteFile
from tacit.sites.site import Site

Meddle = Callable[[str, int, Message], Message | None]
"""What becomes of a message on its way, by stage and node; ``None`` if it is lost."""


def untouched(stage: str, node: int, message: Message) -> Message | None:
    return message


@dataclass
class Files:
    """A federation's files in a folder."""

    folder: Path
    coordinator: Identity
    sites: tuple[Identity, ...]

    @property
    def federation(self) -> FederationFile:
        return FederationFile.read(self.folder / "federation.toml")

    def site(self, index: int) -> Path:
        return self.folder / f"site{index}.toml"


def write_files(
    folder: Path, examples: list[Examples], allow: str = "", training: float = 1.0, superlink: str = "localhost:1"
) -> Files:
    """Keys, federation.toml, and of each site its site.toml and data, as NumPy files."""
    coordinator = Identity.fresh()
    coordinator.save(folder / "coordinator.key")
    identities = []
    text = f'superlink = "{superlink}"\n[coordinator]\nkey = "{key_text(coordinator.public)}"\n'
    for index, own in enumerate(examples):
        identity = Identity.fresh()
        identity.save(folder / f"site{index}.key")
        identities.append(identity)
        text += entry(f"site{index}", identity)
        np.save(folder / f"inputs{index}.npy", own.inputs.numpy())
        np.save(folder / f"targets{index}.npy", own.targets.numpy())
        (folder / f"site{index}.toml").write_text(
            f'name = "site{index}"\nfederation = "federation.toml"\n'
            f'identity = "site{index}.key"\nstate = "state{index}"\n'
            f'[data]\nformat = "numpy"\ninputs = "inputs{index}.npy"\ntargets = "targets{index}.npy"\n'
            f"training = {training}\n[allow]\n{allow}"
        )
    (folder / "federation.toml").write_text(text)
    return Files(folder, coordinator, tuple(identities))


@contextmanager
def answering(files: Files, count: int) -> Iterator[list[Site]]:
    """The sites, open."""
    with ExitStack() as held:
        yield [held.enter_context(closing(open_site(files, index))) for index in range(count)]


def open_site(files: Files, index: int) -> Site:
    file = SiteFile.read(files.site(index))
    return Site(file, FederationFile.read(file.federation), Identity.load(file.identity))


@dataclass
class LocalGrid(Grid):
    """Nodes in this process; a message is answered when its answer is asked for."""

    apps: dict[int, ClientApp]
    meddle: Meddle = untouched
    back: Meddle = untouched
    seen: list[tuple[str, int]] = field(default_factory=list)
    _messages: dict[str, Message] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run: Run) -> None:
        raise AssertionError("not used")

    @property
    def run(self) -> Run:
        raise AssertionError("not used")

    def create_message(self, *arguments: object, **named: object) -> Message:
        raise AssertionError("not used")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers = []
        for message in messages:
            number = f"message {len(self.seen)}"
            message.metadata.__dict__["_message_id"] = number
            stage, node = message.metadata.message_type, message.metadata.dst_node_id
            self.seen.append((stage, node))
            if (passed := self.meddle(stage, node, message)) is not None:
                self._messages[number] = passed
            numbers.append(number)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        answers = []
        for number in message_ids:
            message = self._messages.pop(number, None)
            node = message.metadata.dst_node_id if message is not None else -1
            if message is None or node not in self.apps:
                continue
            answer = self.apps[node](message, Context(1, node, {}, RecordDict(), {}))
            back = self.back(message.metadata.message_type, node, answer)
            if back is not None:
                answers.append(back)
        return answers

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("not used")


def grid_of(sites: list[Site]) -> LocalGrid:
    """A grid whose nodes 100, 101, … are these sites."""
    return LocalGrid({100 + index: client_app(site) for index, site in enumerate(sites)})


@dataclass(frozen=True)
class LocalLink:
    """A SuperLink that has these nodes, for a coordinator that is given it in place of its own."""

    grid: LocalGrid

    @contextmanager
    def run(self) -> Iterator[tuple[int, Grid]]:
        yield 1, self.grid

    def stop(self, number: int) -> None:
        """Nothing is left behind."""

    def register(self, node: str) -> None:
        """All are known."""


class Clock:
    """Time that passes when somebody waits."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def train_over(
    monkeypatch: pytest.MonkeyPatch,
    files: Files,
    grid: LocalGrid,
    text: str,
    watch: OnBoard = unwatched,
) -> tuple[RoundRecord, ...]:
    """What ``tacit train`` makes of a configuration, in the folder ``run``, with a grid for its SuperLink."""
    clock = Clock()
    monkeypatch.setattr(over_sites, "SuperLink", lambda address, secret: LocalLink(grid))
    monkeypatch.setattr(strategy, "Courier", lambda grid: Courier(grid, clock.now, clock.sleep))
    (files.folder / "superlink.secret").write_bytes(bytes(32))
    (files.folder / "coordinator.toml").write_text("[wait]\nstage = 5.0\njoin = 5.0\ngather = 5.0\n")
    (files.folder / "run.toml").write_text(text)
    return start(files.folder / "run.toml", files.folder / "run", None, None, watch).history


def tables(count: int, sizes: tuple[int, ...] = (30, 40, 20, 50), features: int = 4) -> list[Examples]:
    """Examples of two classes that a linear model tells apart well, not quite alike at each site."""
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(features, generator=generator)
    made = []
    for index in range(count):
        inputs = torch.randn(sizes[index % len(sizes)], features, generator=generator) + 0.2 * index
        noise = 0.3 * torch.randn(len(inputs), generator=generator)
        made.append(Examples(inputs, ((inputs - 0.2 * index) @ direction + noise > 0).long()))
    return made
