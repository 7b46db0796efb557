"""`tacit.connect` towards parties that do not answer."""

import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

import tacit
from tacit.errors import InputError, PeerError
from tacit.identity import Identity
from tacit.party.cluster_file import PARTIES, Parties
from tacit.party.local import prepare


def test_closing_fails_what_is_on_its_way_and_waits_for_nobody(tmp_path: Path) -> None:
    cluster = prepare(tmp_path)
    with ExitStack() as stack:
        silent = {name: stack.enter_context(socket.create_server(("127.0.0.1", 0))) for name in PARTIES}
        members = {
            name: msgspec.structs.replace(cluster.party(name), address=f"127.0.0.1:{listener.getsockname()[1]}")
            for name, listener in silent.items()
        }
        connection = tacit.connect(
            msgspec.structs.replace(cluster, parties=Parties(**members)), Identity.load(tmp_path / "client.key")
        )
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                connection.model("any")
            except PeerError as error:
                failed.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        stack.enter_context(silent["alice"].accept()[0])  # it is in the middle of its first words
        time.sleep(0.1)
        connection.close()
        asking.join(20)
        assert [str(error) for error in failed] == ["the connection was closed"]
        with pytest.raises(InputError, match="closed: connect again"):
            connection.model("any")
        connection.close()
