"""Take part: connect to the SuperLink and answer the coordinator, until told to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import torch

from tacit.identity import Identity
from tacit.runtimes.flower.client_app import client_app
from tacit.runtimes.flower.federation_file import FederationFile, node_key
from tacit.runtimes.flower.supernode import SuperNode
from tacit.sites.config import SiteFile
from tacit.sites.site import Site


def join(path: Path, tell: Callable[[str], None]) -> None:
    """Answer until a signal to stop comes.

    Args:
        path: of site.toml.
        tell: told in words what happens to the connection.

    Raises:
        InputError: a file says what it cannot, or names another key for this site.
        DataError: the site's data cannot be read, or its files are damaged.
        PeerError: the SuperLink is not who it must be.
    """
    file = SiteFile.read(path)
    federation, identity = FederationFile.read(file.federation), Identity.load(file.identity)
    torch.set_num_threads(1)
    with closing(Site(file, federation, identity)) as site:

        def noted(text: str) -> None:
            site.journal.note("note", text)
            tell(text)

        node = SuperNode(federation.superlink, node_key(identity), client_app(site), noted)
        with _stopped_by_signals(node):
            node.run()


@contextmanager
def _stopped_by_signals(node: SuperNode) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        node.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
