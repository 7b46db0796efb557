"""What the processes of a service take of the machine while it is under load: resident memory and time, from /proc."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tacit.party.cluster_file import ALICE, BOB, PARTIES
from tacit.party.local import LocalService

_EVERY_S = 1.0
_WARM_UP = 0.2
"""Of a measurement, before its first figure is taken: whatever is made once has been made by then."""
Sample = tuple[float, float]
"""When, in seconds, and how many MB."""


@dataclass(frozen=True)
class Growth:
    """The resident memory of a process under load, in MB of 10^6 bytes.

    Args:
        first: after a fifth of the time.
        last: at the end.
        slope: MB a minute that it grew by in the second half, by least squares; what was made once does not count.
    """

    first: float
    last: float
    slope: float


def growth(samples: Sequence[Sample]) -> Growth:
    """What samples of a process, two at least and in order, say of its growth."""
    (began, _), (ended, last) = samples[0], samples[-1]
    first = next(mb for when, mb in samples if when >= began + _WARM_UP * (ended - began))
    late = [sample for sample in samples if sample[0] >= (began + ended) / 2]
    line = statistics.linear_regression(*zip(*late, strict=True)) if len(late) > 1 else None
    return Growth(first, last, 60 * line.slope if line else 0.0)


@dataclass
class Watch:
    """Samples of every process's memory, taken while `watching`.

    Args:
        samples: by the process's name.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def take(self, now: float, processes: dict[str, int]) -> None:
        """Take a sample of each."""
        for name, pid in processes.items():
            if mb := _resident_mb(pid):
                self.samples.setdefault(name, []).append((now, mb))

    def growth(self) -> dict[str, Growth]:
        """Of every process that was seen more than once."""
        return {name: growth(samples) for name, samples in sorted(self.samples.items()) if len(samples) > 1}


@contextlib.contextmanager
def watching(service: LocalService, look: Callable[[], None] = lambda: None) -> Iterator[Watch]:
    """Take samples every second until the block is left, in a thread of its own.

    Args:
        service: whose processes to watch.
        look: called with every sample; an error of its is raised when the block is left.
    """
    watch, over, errors = Watch(), threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            while not over.is_set():
                watch.take(time.monotonic(), processes(service))
                look()
                over.wait(_EVERY_S)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="watching the service", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()
    watch.take(time.monotonic(), processes(service))
    for error in errors:
        raise error


def processes(service: LocalService) -> dict[str, int]:
    """The process ids of the three and of their workers, by name."""
    found = {name: service.pid(name) for name in PARTIES}
    for name in (ALICE, BOB):
        children = Path(f"/proc/{found[name]}/task/{found[name]}/children")
        if children.exists():
            pids = map(int, children.read_text().split())
            found |= {f"{name}'s worker {number}": pid for number, pid in enumerate(sorted(pids))}
    return found


def cpu_seconds(service: LocalService) -> dict[str, float]:
    """Seconds of one core that every process has taken, this one included."""
    return {name: _cpu_seconds(pid) for name, pid in processes(service).items()} | {"clients": time.process_time()}


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mb(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
