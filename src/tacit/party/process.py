"""What runs in the process of alice, bob or the provider: joining the others, and answering calls until told to stop.

Links: the launcher calls all three; bob connects to alice, for openings; the provider connects to both, sends each of
them a seed that it drew, and later sends bob his corrections. A process whose launcher or peer is gone ends.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from tacit.errors import InputError, PeerError, TacitError, one_line
from tacit.mpc.correlation import Correlation, Party, Provider, layout
from tacit.mpc.linear import Weight
from tacit.mpc.lockstep import Meter
from tacit.mpc.shares import Share
from tacit.mpc.steps import Protocol, Role
from tacit.party.calls import (
    Answer,
    Call,
    Deal,
    Done,
    Failure,
    Held,
    Install,
    InstallTraining,
    Join,
    Keep,
    Load,
    Planned,
    Ran,
    Restore,
    Restored,
    Reveal,
    RevealLoss,
    Run,
    Save,
    Step,
    Usage,
    Used,
    decode_call,
    encode,
)
from tacit.party.driver import Pool, Watch, drive
from tacit.party.programs import Program, decode_program
from tacit.party.training import TrainingProgram, decode_training_program
from tacit.party.transport import TOKEN_BYTES, Link, accept, connect, listen
from tacit.program import checkpoint
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.program.run import Cost, execute, load
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.ring.prg import SEED_BYTES, Prg
from tacit.wire import Frame, Item, Kind

LAUNCHER, ALICE, BOB, PROVIDER = "the launcher", "alice", "bob", "provider"
NAMES = (ALICE, BOB, PROVIDER)
_LAUNCHING_S = 60.0


class _Process(ABC):
    """What the three have in common: the installed program and its plan.

    Args:
        name: which of the three.
        token: see `tacit.party.transport.connect`.
        listener: where the others connect.
    """

    def __init__(self, name: str, token: bytes, listener: socket.socket) -> None:
        self.name, self.token, self.listener = name, token, listener
        self._installed: tuple[Program | TrainingProgram, Cost] | None = None

    def handle(self, call: Call, frame: Frame) -> tuple[Answer, Sequence[Share]]:
        """Carry out a call; the answer, and shares to go with it."""
        match call:
            case Join(ports):
                return self._timed(lambda: self.join(ports)), ()
            case Install(data):
                return self._install(decode_program(data)), ()
            case InstallTraining(data):
                return self._install(decode_training_program(data)), ()
            case Load():
                return self._timed(lambda: self.load(call, frame)), ()
            case Deal():
                return self._timed(lambda: self.deal(self.cost.correlations)), ()
            case Run():
                return self.run(call, frame)
            case Keep(names):
                return self._timed(lambda: self.keep(names, frame)), ()
            case Step():
                return self.step(call, frame), ()
            case Reveal(names):
                return _held(self.reveal(names))
            case RevealLoss():
                return _held([self.loss()])
            case Save():
                return self._timed(lambda: self.save(call)), ()
            case Restore():
                return Restored(self.restore(call)), ()
            case Usage():
                return Used(peak_rss_mb()), ()

    @property
    def program(self) -> Program:
        """The installed program for prediction."""
        program = self._required()[0]
        if not isinstance(program, Program):
            raise InputError(f"{self.name} has a training step where a model is needed: install that first")
        return program

    @property
    def training(self) -> TrainingProgram:
        """The installed training step."""
        program = self._required()[0]
        if not isinstance(program, TrainingProgram):
            raise InputError(f"{self.name} has a model where a training step is needed: install that first")
        return program

    @property
    def cost(self) -> Cost:
        """The plan of whichever is installed."""
        return self._required()[1]

    def _install(self, program: Program | TrainingProgram) -> Planned:
        cost = program.cost()
        self._installed = program, cost
        return Planned(cost.rounds, cost.bytes_online, cost.bytes_dealt)

    def _required(self) -> tuple[Program | TrainingProgram, Cost]:
        if self._installed is None:
            raise InputError(f"{self.name} has no program: install one first")
        return self._installed

    def _timed(self, work: Callable[[], int]) -> Done:
        wall, cpu = time.perf_counter(), time.process_time()
        nbytes = work()
        return Done(time.perf_counter() - wall, time.process_time() - cpu, nbytes)

    @abstractmethod
    def join(self, ports: dict[str, int]) -> int:
        """Connect to the others."""

    @abstractmethod
    def load(self, call: Load, frame: Frame) -> int:
        """Load the weights; bytes sent for it."""

    @abstractmethod
    def deal(self, correlations: Iterable[Correlation]) -> int:
        """Deal, or receive, these; bytes sent for it."""

    @abstractmethod
    def run(self, call: Run, frame: Frame) -> tuple[Ran, Sequence[Share]]:
        """Run the program on input shares."""

    @abstractmethod
    def keep(self, names: Sequence[str], frame: Frame) -> int:
        """Keep the state of a training; bytes sent for it."""

    @abstractmethod
    def step(self, call: Step, frame: Frame) -> Ran:
        """Take a training step on shares of a batch."""

    @abstractmethod
    def reveal(self, names: Sequence[str]) -> Sequence[Share]:
        """Shares of the state of a training."""

    @abstractmethod
    def loss(self) -> Share:
        """The share of the last step's loss."""

    @abstractmethod
    def save(self, call: Save) -> int:
        """Write the shares of a training's state; bytes sent for it."""

    @abstractmethod
    def restore(self, call: Restore) -> int:
        """Keep the shares that were written; after which step they were."""


class _ProviderProcess(_Process):
    """The crypto provider: it is sent programs and shapes, and no share of anything."""

    def join(self, ports: dict[str, int]) -> int:
        seeds = {name: Prg.fresh().bytes(SEED_BYTES) for name in (ALICE, BOB)}
        links = {name: connect(ports[name], PROVIDER, name, self.token) for name in (ALICE, BOB)}
        for name, link in links.items():
            link.send(Kind.SEED, body=seeds[name])
        # alice is sent nothing but her seed; the connection stays open as long as this process lives.
        self._alice, self._bob = links[ALICE], links[BOB]
        self._provider = Provider(Prg(seeds[ALICE]), Prg(seeds[BOB]), Prg.fresh())
        return 0

    def load(self, call: Load, frame: Frame) -> int:
        return self.deal(self.program.load_correlations())

    def deal(self, correlations: Iterable[Correlation]) -> int:
        before = self._bob.bytes_corrections
        for correlation in correlations:
            _, corrections = self._provider.deal(correlation)
            if corrections:
                self._bob.send(Kind.CORRECTIONS, [corrections[name] for name in layout(correlation).dealt])
        return self._bob.bytes_corrections - before

    def run(self, call: Run, frame: Frame) -> tuple[Ran, Sequence[Share]]:
        raise InputError("the provider takes no part in a run")

    def keep(self, names: Sequence[str], frame: Frame) -> int:
        raise InputError("the provider keeps nothing of a training")

    def step(self, call: Step, frame: Frame) -> Ran:
        raise InputError("the provider takes no part in a step")

    def reveal(self, names: Sequence[str]) -> Sequence[Share]:
        raise InputError("the provider keeps nothing of a training")

    def loss(self) -> Share:
        raise InputError("the provider keeps nothing of a training")

    def save(self, call: Save) -> int:
        raise InputError("the provider keeps nothing of a training")

    def restore(self, call: Restore) -> int:
        raise InputError("the provider keeps nothing of a training")


class _PartyProcess(_Process):
    """alice or bob."""

    def join(self, ports: dict[str, int]) -> int:
        if self.name == ALICE:
            links = [accept(self.listener, ALICE, {BOB, PROVIDER}, self.token) for _ in range(2)]
        else:
            links = [
                connect(ports[ALICE], BOB, ALICE, self.token),
                accept(self.listener, BOB, {PROVIDER}, self.token),
            ]
        by_name = {link.peer: link for link in links}
        if len(by_name) < len(links):
            raise PeerError(f"{links[0].peer} connected twice: it was refused")
        self._provider = by_name.pop(PROVIDER)
        (self._peer,) = by_name.values()
        self._role = Role(self.name)
        self._party = Party(self._role, Prg(self._provider.receive(Kind.SEED, limit=0).body))
        self._pool, self._number = Pool(), 0
        self._kept: dict[str, Share] = {}
        self._loss: Share | None = None
        return 0

    def load(self, call: Load, frame: Frame) -> int:
        program = self.program
        state = {name: self._share(words, scale) for name, words, scale in _zipped(call, frame)}
        if {name: tuple(value.shape) for name, value in state.items()} != program.state:
            raise InputError("the state to load does not have the names and shapes of the installed program's")
        self.deal(program.load_correlations())
        loaded = drive(load(program.graph, state, program.first_number), self._pool, self._peer, Meter())
        self._party.weights |= {value.number: value for value in loaded.values() if isinstance(value, Weight)}
        self._state = loaded
        return 0

    def deal(self, correlations: Iterable[Correlation]) -> int:
        for correlation in correlations:
            dealt = layout(correlation).dealt if self._role is Role.BOB else {}
            items = [Item(field.dtype, field.shape) for field in dealt.values()]
            tensors = self._provider.receive_tensors(Kind.CORRECTIONS, items) if items else ()
            corrections = dict(zip(dealt, tensors, strict=True))
            self._pool.put(correlation, self._party.receive(self._number, correlation, corrections))
            self._number += 1
        return 0

    def run(self, call: Run, frame: Frame) -> tuple[Ran, Sequence[Share]]:
        program = self.program
        if tuple(tuple(words.shape) for words in frame.tensors) != program.inputs:
            raise InputError("the inputs do not have the shapes of the installed program's")
        inputs = [self._share(words, scale) for words, scale in zip(frame.tensors, call.scales, strict=True)]
        outputs, ran = self._driven(
            execute(program.graph, self._state, inputs, program.context, program.ready), call.by_layer
        )
        ran.scales = [output.scale for output in outputs]
        return ran, outputs

    def keep(self, names: Sequence[str], frame: Frame) -> int:
        if len(names) != len(frame.tensors) or len(set(names)) < len(names):
            raise InputError("a state is kept with one name for each tensor")
        shares = [self._share(words, PARAMETER_BITS) for words in frame.tensors]
        self._kept, self._loss = dict(zip(names, shares, strict=True)), None
        return 0

    def step(self, call: Step, frame: Frame) -> Ran:
        batch = [self._share(words, FRACTION_BITS) for words in frame.tensors]
        (*updated, self._loss), ran = self._driven(self.training.run(self._kept, batch, call.numbers), call.by_layer)
        self._kept |= dict(zip(self.training.updated, updated, strict=True))
        return ran

    def reveal(self, names: Sequence[str]) -> Sequence[Share]:
        if not self._kept.keys() >= set(names):
            raise InputError(f"{self.name} does not keep a state of all these names")
        return [self._kept[name] for name in names]

    def save(self, call: Save) -> int:
        if not self._kept:
            raise InputError(f"{self.name} keeps nothing to save: keep a state first")
        words = {name: share.words for name, share in self._kept.items()}
        checkpoint.save(Path(call.folder), self._role, words, call.program, call.step)
        return 0

    def restore(self, call: Restore) -> int:
        words, step = checkpoint.load(Path(call.folder), self._role, self.training.state, call.program)
        self._kept = {name: self._share(words[name], PARAMETER_BITS) for name in self.training.state}
        self._loss = None
        return step

    def loss(self) -> Share:
        if self._loss is None:
            raise InputError(f"{self.name} has no loss: take a step first")
        return self._loss

    def _driven(self, protocol: Protocol[Sequence[Share]], by_layer: bool) -> tuple[Sequence[Share], Ran]:
        """Run a protocol with the other party; what it gives, and what it took."""
        link, meter = self._peer, Watch(time.perf_counter if by_layer else None)
        waited, moved, opened = link.waited_s, link.moved_s, link.bytes_opened
        began = time.perf_counter()
        outputs = drive(protocol, self._pool, link, meter)
        ran = Ran(
            [],
            meter.rounds,
            link.bytes_opened - opened,
            time.perf_counter() - began,
            link.waited_s - waited,
            link.moved_s - moved,
            {name: count.seconds for name, count in meter.layers.items()} if by_layer else {},
        )
        return outputs, ran

    def _share(self, words: torch.Tensor, scale: int) -> Share:
        if words.dtype != torch.int64:
            raise InputError(f"a share has dtype {words.dtype}: shares are int64")
        return Share(words, scale, self._role)


def _held(shares: Sequence[Share]) -> tuple[Held, Sequence[Share]]:
    return Held([share.scale for share in shares]), shares


def _zipped(call: Load, frame: Frame) -> list[tuple[str, torch.Tensor, int]]:
    if not len(call.names) == len(call.scales) == len(frame.tensors):
        raise InputError("a model is loaded with one name and one scale for each tensor")
    return list(zip(call.names, frame.tensors, call.scales, strict=True))


def peak_rss_mb() -> float:
    """The largest resident memory of this process so far, in MB of 10^6 bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def serve(name: str, token: bytes, announce: Callable[[int], None]) -> None:
    """Be alice, bob or the provider until the launcher closes its connection or a call fails.

    Args:
        name: which of the three.
        token: 16 secret bytes that the processes of one session share.
        announce: called with the port on which this process listens.

    Raises:
        InputError: the token has another length.
        PeerError: the launcher did not connect.
    """
    if len(token) != TOKEN_BYTES:
        raise InputError(
            f"the session's token is {len(token)} bytes, not {TOKEN_BYTES}: was this process started by hand?"
        )
    torch.set_num_threads(1)
    # What was imported stays: a collection that looks through it takes 10 ms, and comes in the middle of a run.
    gc.freeze()
    with listen() as listener, torch.inference_mode():
        announce(listener.getsockname()[1])
        process = (_ProviderProcess if name == PROVIDER else _PartyProcess)(name, token, listener)
        launcher = accept(listener, name, {LAUNCHER}, token, patience=_LAUNCHING_S)
        launcher.patience = None
        # Whatever comes out of `launcher` itself means that it is gone, and nobody is left to report to.
        with contextlib.suppress(PeerError):
            while _answered(process, launcher):
                pass


def _answered(process: _Process, launcher: Link) -> bool:
    """Answer one call; whether the process is fit to answer another."""
    frame = launcher.receive(Kind.CALL)
    try:
        answer, shares = process.handle(decode_call(frame.body), frame)
    except Exception as error:
        launcher.send(Kind.ERROR, body=encode(_failure(error)))
        if isinstance(error, TacitError):
            return False
        raise
    launcher.send(Kind.REPLY, [share.words for share in shares], encode(answer))
    return True


def _failure(error: Exception) -> Failure:
    """What may be said of an error: tacit's own messages hold no secrets, others might."""
    if isinstance(error, TacitError):
        return Failure(one_line(error), isinstance(error, PeerError))
    return Failure(f"{type(error).__name__} in its own code, see its traceback")
