"""alice, bob and the provider as three processes on this machine, and the side that the owner and the client see."""

from __future__ import annotations

import os
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, TypeVar

from torch import Tensor

from tacit.errors import CodecError, PeerError
from tacit.mpc.shares import Share
from tacit.mpc.steps import Role
from tacit.party import calls
from tacit.party.calls import (
    Answer,
    Call,
    Deal,
    Done,
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
)
from tacit.party.children import ENVIRONMENT
from tacit.party.process import ALICE, BOB, LAUNCHER, NAMES, PROVIDER
from tacit.party.programs import Program, encode_program
from tacit.party.training import TrainingProgram, encode_training_program
from tacit.party.transport import TOKEN_BYTES, Link, connect
from tacit.wire import Kind

_STARTING_S = 120.0
_STOPPING_S = 5.0
_REAPING_S = 1.0
Pair = tuple[Share, Share]
_Reply = tuple[Answer, tuple[Tensor, ...]]
T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Outcome:
    """What a run gave.

    Args:
        outputs: for every output of the program, alice's and bob's share.
        alice: what alice counted and timed.
        bob: what bob did.
        seconds: from sending the first share of the inputs to receiving the last share of the outputs.
    """

    outputs: tuple[Pair, ...]
    alice: Ran
    bob: Ran
    seconds: float


@dataclass(frozen=True)
class Dealt:
    """What the dealing for one run took.

    Args:
        provider_s: seconds of one core in the provider's process.
        party_s: seconds of one core in the busier party's.
        wall_s: seconds until all three were done, on the cores of this machine.
        nbytes: bytes of corrections that the provider sent.
    """

    provider_s: float
    party_s: float
    wall_s: float
    nbytes: int


class LocalProcesses:
    """The three processes; a context manager, which ends them however it is left.

    They run on the loopback interface without encryption and on this machine's good faith; that is for measuring and
    for tests. Ctrl-C reaches this process alone, which then ends the others; if this process is killed they see their
    connections close and end by themselves.

    Each computes with one thread.

    Raises:
        PeerError: on entering, a process did not start.
    """

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._links: dict[str, Link] = {}

    def __enter__(self) -> LocalProcesses:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def pid(self, name: str) -> int:
        """The process id of ``alice``, ``bob`` or ``provider``."""
        return self._processes[name].pid

    def install(self, program: Program | TrainingProgram) -> Planned:
        """Send a program, or a training step, to all three, which check and plan it; it replaces the one before.

        Raises:
            PeerError: they do not come to the same plan, or one of them failed.
        """
        if isinstance(program, TrainingProgram):
            plans = self._all(InstallTraining(encode_training_program(program)))
        else:
            plans = self._all(Install(encode_program(program)))
        planned = {(plan.rounds, plan.bytes_online, plan.bytes_dealt) for plan in _of(Planned, plans)}
        if len(planned) != 1:
            raise PeerError("alice, bob and the provider plan the program differently: do they run the same version?")
        return Planned(*planned.pop())

    def load(self, state: Mapping[str, Pair]) -> Done:
        """Send the shares of a model to alice and bob, who load it; what the slowest process took.

        Raises:
            PeerError: one of them failed.
        """
        call = Load(list(state), [pair[0].scale for pair in state.values()])
        answers = _of(Done, self._all(call, _sides(state.values())))
        return max(answers, key=lambda done: done.wall_s)

    def deal(self) -> Dealt:
        """Deal what one run takes.

        Raises:
            PeerError: one of them failed.
        """
        began = time.perf_counter()
        provider, alice, bob = _of(Done, self._all(Deal(), names=(PROVIDER, ALICE, BOB)))
        wall = time.perf_counter() - began
        return Dealt(provider.cpu_s, max(alice.cpu_s, bob.cpu_s), wall, provider.nbytes)

    def run(self, inputs: Sequence[Pair], *, by_layer: bool = False) -> Outcome:
        """Run the installed program on shared inputs; `deal` must have gone before.

        Args:
            inputs: alice's and bob's share of every input.
            by_layer: whether the parties take the time of every layer.

        Raises:
            PeerError: one of them failed.
        """
        call = Run([pair[0].scale for pair in inputs], by_layer)
        answers, seconds = self._timed(call, inputs)
        alice, bob = _of(Ran, answers)
        return Outcome(_pairs(answers, alice.scales, bob.scales), alice, bob, seconds)

    def keep(self, state: Mapping[str, Pair]) -> None:
        """Send the shares of parameters and of the optimizer's state to alice and bob, who keep them from step to step.

        Raises:
            PeerError: one of them failed.
        """
        _of(Done, self._all(Keep(list(state)), _sides(state.values()), names=(ALICE, BOB)))

    def step(self, batch: Sequence[Pair], numbers: Sequence[float] = (), *, by_layer: bool = False) -> Outcome:
        """Take a step of the installed training on a shared batch; `keep` and `deal` must have gone before.

        Args:
            batch: alice's and bob's share of the inputs and of the labels.
            numbers: the optimizer's public numbers for this step.
            by_layer: whether the parties take the time of every operator.

        Returns:
            No outputs: parameters, state and loss stay with the parties.

        Raises:
            PeerError: one of them failed.
        """
        answers, seconds = self._timed(Step(list(numbers), by_layer), batch)
        alice, bob = _of(Ran, answers)
        return Outcome((), alice, bob, seconds)

    def reveal(self, names: Sequence[str]) -> dict[str, Pair]:
        """Both shares of what the parties keep, for its owner.

        Raises:
            PeerError: one of them failed, or does not keep a state of these names.
        """
        return dict(zip(names, self._asked(Reveal(list(names))), strict=True))

    def reveal_loss(self) -> Pair:
        """Both shares of the last step's loss, before its update.

        Raises:
            PeerError: one of them failed, or there has been no step.
        """
        (pair,) = self._asked(RevealLoss())
        return pair

    def save(self, folder: str, program: str, step: int) -> None:
        """Have alice and bob write their shares of what they keep, each to its own disk.

        Raises:
            PeerError: one of them failed.
        """
        _of(Done, self._all(Save(folder, program, step), names=(ALICE, BOB)))

    def restore(self, folder: str, program: str) -> tuple[int, int]:
        """Have alice and bob keep the shares that they wrote; after which step each of them did.

        Raises:
            PeerError: one of them failed, or has no such shares.
        """
        alice, bob = _of(Restored, self._all(Restore(folder, program), names=(ALICE, BOB)))
        return alice.step, bob.step

    def peak_rss_mb(self) -> dict[str, float]:
        """The largest resident memory of each process so far, in MB of 10^6 bytes."""
        return dict(zip(NAMES, (used.peak_rss_mb for used in _of(Used, self._all(Usage()))), strict=True))

    def close(self) -> None:
        """End the processes and wait until they are gone."""
        for link in self._links.values():
            link.close()
        deadline = time.monotonic() + _STOPPING_S
        for process in self._processes.values():
            try:
                # A process between two calls ends by itself once its connection closes.
                process.wait(max(0.0, deadline - time.monotonic()) if self._links else 0.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                _present(pipe).close()
        self._links.clear()

    def _start(self) -> None:
        token = secrets.token_bytes(TOKEN_BYTES)
        for name in NAMES:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "tacit.party", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )
        for process in self._processes.values():
            _present(process.stdin).write(token.hex().encode() + b"\n")
            _present(process.stdin).flush()
        ports = {name: self._port(name) for name in NAMES}
        self._links = {name: connect(ports[name], LAUNCHER, name, token) for name in NAMES}
        self._all(Join(ports))

    def _port(self, name: str) -> int:
        stdout = _present(self._processes[name].stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            line = stdout.readline() if selector.select(_STARTING_S) else b""
        if not line.strip().isdigit():
            raise PeerError(f"{name}'s process did not start: its standard error says why")
        return int(line)

    def _all(
        self, call: Call, tensors: Mapping[str, Sequence[Tensor]] | None = None, names: Sequence[str] = NAMES
    ) -> list[_Reply]:
        """Call several processes at once and collect their answers, all of them before any failure is raised."""
        failures: list[tuple[str, calls.Failure]] = []
        answers = []
        body = calls.encode(call)
        for name in names:
            try:
                self._links[name].send(Kind.CALL, (tensors or {}).get(name, ()), body)
            except CodecError:
                raise
            except PeerError as error:
                failures.append((name, calls.Failure(str(error), peer=True)))
        for name in names if not failures else ():
            try:
                frame = self._links[name].receive(Kind.REPLY, Kind.ERROR)
            except CodecError:
                raise
            except PeerError as error:
                failures.append((name, calls.Failure(str(error), peer=True)))
                continue
            if frame.kind is Kind.ERROR:
                failures.append((name, calls.decode_failure(frame.body)))
            else:
                answers.append((calls.decode_answer(frame.body), frame.tensors))
        if failures:
            raise self._blamed(failures)
        return answers

    def _timed(self, call: Call, shares: Sequence[Pair]) -> tuple[Sequence[_Reply], float]:
        """Call alice and bob; seconds from sending the first share to receiving the last one's answer."""
        began = time.perf_counter()
        answers = self._all(call, _sides(shares), names=(ALICE, BOB))
        return answers, time.perf_counter() - began

    def _asked(self, call: Call) -> tuple[Pair, ...]:
        answers = self._all(call, names=(ALICE, BOB))
        alice, bob = _of(Held, answers)
        return _pairs(answers, alice.scales, bob.scales)

    def _blamed(self, failures: Sequence[tuple[str, calls.Failure]]) -> PeerError:
        """The failure that led to the others: one of a process's own, else the end of one that was killed."""
        for name, failure in failures:
            if not failure.peer:
                return PeerError(f"{name}: {failure.text}")
        for name, _ in failures:
            try:
                code = self._processes[name].wait(_REAPING_S)
            except subprocess.TimeoutExpired:
                continue
            if code:
                return PeerError(f"{name}'s process has ended with exit code {code}")
        name, failure = failures[0]
        return PeerError(f"{name}: {failure.text}")


def _sides(pairs: Iterable[Pair]) -> dict[str, list[Tensor]]:
    """What to send to alice and what to bob."""
    both = list(pairs)
    return {ALICE: [alice.words for alice, _ in both], BOB: [bob.words for _, bob in both]}


def _pairs(answers: Sequence[_Reply], alice: Sequence[int], bob: Sequence[int]) -> tuple[Pair, ...]:
    """The shares that came with alice's and with bob's answer, at the scales that they gave."""
    parts = zip(answers[0][1], alice, answers[1][1], bob, strict=True)
    return tuple((Share(one, s, Role.ALICE), Share(other, t, Role.BOB)) for one, s, other, t in parts)


def _of(kind: type[T], answers: Sequence[_Reply]) -> list[T]:
    """The answers, all of which must be of one kind."""
    found: list[T] = [answer for answer, _ in answers if isinstance(answer, kind)]
    if len(found) != len(answers):
        raise CodecError(f"a process answered with something else than {kind.__name__}")
    return found


def _present(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise PeerError("a process was started without its pipes")
    return pipe
