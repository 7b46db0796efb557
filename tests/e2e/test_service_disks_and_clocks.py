"""A running service on full disks, and on clocks that jump: it goes on with what it has, and nothing is used twice."""

import contextlib
import shutil
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

import tacit
from crashes import Asking, Books, crashing, ready, seen
from faults import injected
from serving import close, cluster_of, inputs, model, pushed, until
from tacit.errors import PoolEmpty
from tacit.party.cluster_file import PARTIES, Pools
from tacit.party.connection import RemoteModel
from tacit.party.local import LocalService
from tacit.party.owning import Owner

pytestmark = pytest.mark.slow
MODEL = model()
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* Seconds by which the wall clock is wrong, as the first 8 bytes of a file say; other clocks are left alone. */
static long long jump(void) {
    static volatile long long *shared;
    if (!shared) {
        int file = open(getenv("WRONG_CLOCK"), O_RDONLY);
        shared = mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);
        close(file);
    }
    return *shared;
}

int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, at);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += jump();
    return failed;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec, at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""
YEAR_S = 365 * 24 * 3600


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own for a folder, where root may mount one."""
    folder.mkdir(mode=0o700, parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(ballast: Path) -> None:
    """Take all that is left of the disk on which a file lies."""
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


@contextmanager
def kept_full(ballast: Path) -> Iterator[None]:
    """Take all that is left of the disk on which a file lies, and what becomes free of it, for a while."""
    done = threading.Event()

    def take() -> None:
        with open(ballast, "wb", buffering=0) as file:
            while not done.is_set():
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(1 << 12))
                done.wait(0.005)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        ballast.unlink()


def burned(service: LocalService) -> int:
    """Tickets that alice says were burned."""
    address = service.cluster.party("alice").http_at
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next(int(float(line.split()[1])) for line in lines if line.startswith("tacit_tickets_burned_total "))


def full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < 1 << 16


@pytest.mark.parametrize("party", PARTIES)
def test_a_disk_that_fills_up_while_tickets_are_dealt_costs_tickets_only(tmp_path: Path, party: str) -> None:
    folder = tmp_path / "service"
    cluster_of(folder, pools=Pools(disk_gb=0.05, ahead=60))
    with (
        small_disk(folder / party, 6),
        crashing(tmp_path / "points") as points,
        LocalService(folder) as service,
    ):
        service.wait_ready()
        pushed(service)
        with Asking(service, MODEL) as asking:
            asking.recovered()
            ballast = folder / party / "ballast"
            for _ in range(3):
                fill(ballast)
                injected("full disks of a running service")
                # What is there is used; what is used is dealt again, and cannot be stored.
                time.sleep(5)
                assert full(folder / party)
                ballast.unlink()
                service.wait_ready()
                asking.recovered()
                books = Books(service, points)
                books.in_step()
                books.check()
        assert seen(asking.outcomes)["right"] > 10


def test_while_bob_s_disk_is_full_clients_have_what_is_ready_and_no_ticket_is_burned(tmp_path: Path) -> None:
    folder = tmp_path / "service"
    cluster_of(folder, pools=Pools(disk_gb=0.05, ahead=60), when_empty="fail")

    def asked(small: RemoteModel) -> str:
        try:
            return "right" if close(small(inputs(1), timeout=20.0), MODEL(inputs(1))) else "wrong"
        except PoolEmpty:
            return "empty"

    with small_disk(folder / "bob", 6), crashing(tmp_path / "points") as points, LocalService(folder) as service:
        service.wait_ready()
        pushed(service)
        books = Books(service, points)
        books.in_step()
        with tacit.connect(service.cluster, service.key("clinic")) as parties:
            small, ballast = parties.model("small"), folder / "bob" / "ballast"
            until(lambda: asked(small) == "right", 30)
            until(lambda: len(ready(service, "alice")) > 20, 60)
            with kept_full(ballast):
                injected("full disks of a running service")
                answers = [asked(small) for _ in range(200)]
                assert answers.count("right") + answers.count("empty") == 200
                assert answers[-5:] == ["empty"] * 5, "what was ready is used up, and no more can be taken"
                before = len(ready(service, "alice")), burned(service)
                for _ in range(20):
                    assert asked(small) == "empty"
                    time.sleep(0.2)
                assert (len(ready(service, "alice")), burned(service)) == before
                assert before[0] > 10
                assert before[1] == 0
            until(lambda: asked(small) == "right", 30)
        service.wait_ready()
        books.in_step()
        books.check()


def test_wall_clocks_may_jump_by_years_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, library, offset = tmp_path / "clock.c", tmp_path / "clock.so", tmp_path / "offset"
    source.write_text(CLOCK)
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    offset.write_bytes(struct.pack("<q", 0))
    cluster_of(tmp_path / "service")
    with crashing(tmp_path / "points") as points:
        monkeypatch.setenv("LD_PRELOAD", str(library))
        monkeypatch.setenv("WRONG_CLOCK", str(offset))
        with LocalService(tmp_path / "service") as service:
            service.wait_ready()
            pushed(service)
            with Asking(service, MODEL) as asking:
                for years in (20, -30, 0.001, -0.001, 200, 0):
                    with open(offset, "r+b") as file:
                        file.write(struct.pack("<q", int(years * YEAR_S)))
                    injected("clocks that jump")
                    asking.recovered()
                    # Also for connections that are opened now, and for what is logged.
                    with tacit.connect(service.cluster, service.key("lab")) as parties:
                        assert close(parties.model("small")(inputs(2)), MODEL(inputs(2)))
                    with Owner(service.cluster, service.key("owner")) as owner:
                        assert all(owner.list().values())
                    service.wait_ready()
                log = (service.folder / "provider.log").read_text().splitlines()
                years = {msgspec.json.decode(line)["time"][:4] for line in log if line.startswith("{")}
                assert len(years) >= 4, "the clock did not jump"
            Books(service, points).check()
        assert {*seen(asking.outcomes)} == {"right"}
