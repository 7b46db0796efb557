"""What every kind of test may ask for."""

import gzip
import hashlib
import os
import struct
from dataclasses import replace

import pytest
from hypothesis import settings

from faults import INJECTED
from networks import EXPLAINED
from tacit.data import mnist as mnist_files
from tacit.data.examples import Dataset

settings.register_profile("tacit", deadline=None)
settings.load_profile("tacit")


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    """The real data set, found through TACIT_DATA."""
    folder = os.environ.get("TACIT_DATA")
    if not folder:
        pytest.skip("needs the MNIST files: set TACIT_DATA to the folder that holds mnist/")
    return mnist_files.load_mnist(folder)


@pytest.fixture
def tiny_mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Six training and four test images in files that pass for the published ones, by file name."""
    contents = {}
    for kind, count in (("TRAIN", 6), ("TEST", 4)):
        pixels = bytes(i % 256 for i in range(count * 28 * 28))
        for what, body in (
            ("IMAGES", struct.pack(">4I", 0x0803, count, 28, 28) + pixels),
            ("LABELS", struct.pack(">2I", 0x0801, count) + bytes(range(count))),
        ):
            content = gzip.compress(body, mtime=0)
            published = getattr(mnist_files, f"{kind}_{what}")
            digest = hashlib.sha256(content).hexdigest()
            monkeypatch.setattr(mnist_files, f"{kind}_{what}", replace(published, size=len(content), sha256=digest))
            contents[published.name] = content
    return contents


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many faults the tests have injected, and how the times that they took are explained."""
    if INJECTED:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(INJECTED.items()))
        terminalreporter.write_line(f"{INJECTED.total():,} faults injected: {kinds}")
    for line in EXPLAINED:
        terminalreporter.write_line(line)
