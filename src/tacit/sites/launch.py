"""A federation on one machine, in real processes: a SuperLink and a process for each site, over TLS.

For trying out, for tests and for benchmarks; everything lies in one folder. Across machines the same commands are run
by hand, as docs/deploy/federation.md shows.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tacit import atomic
from tacit.errors import PeerError
from tacit.identity import Identity, key_text
from tacit.runtimes.flower.federation_file import entry

LOOPBACK = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 10.0
_SUPERLINK = "from flwr.superlink.cli import flower_superlink; flower_superlink()"
_SITE = "from tacit.cli.main import main; main()"


@dataclass(frozen=True)
class Federation:
    """A federation's files in one folder.

    Args:
        folder: where they are.
        names: of the sites, by index.
        port: on which the SuperLink listens.
        host: the address that it listens on, an IP address of this machine.
        insecure: without TLS, which is for tests.
    """

    folder: Path
    names: tuple[str, ...]
    port: int
    host: str = LOOPBACK
    insecure: bool = False

    @classmethod
    def make(
        cls,
        folder: Path,
        names: Sequence[str],
        port: int | None = None,
        *,
        host: str = LOOPBACK,
        insecure: bool = False,
    ) -> Federation:
        """Make keys for the coordinator and each site, a certificate and a secret for the SuperLink, and
        federation.toml and coordinator.toml; what a site has and allows is for its own site.toml, see `site`.

        Args:
            folder: an empty one, or one that will be made.
            names: of the sites.
            port: for the SuperLink; ``None`` for a free one.
            host, insecure: see the class.
        """
        atomic.make_private(folder)
        made = cls(folder, tuple(names), port or free_port(), host, insecure)
        identities = {name: Identity.fresh() for name in ("coordinator", *names)}
        for name, identity in identities.items():
            identity.save(folder / f"{name}.key")
        atomic.create(folder / "superlink.secret", secrets.token_bytes(32), 0o600)
        _certify(folder, host)
        sites = "\n".join(entry(name, identities[name]) for name in names)
        trust = "insecure = true" if insecure else 'certificates = "superlink.pem"'
        (folder / "federation.toml").write_text(
            f'superlink = "{host}:{made.port}"\n{trust}\n\n'
            f'[coordinator]\nkey = "{key_text(identities["coordinator"].public)}"\n\n{sites}',
            encoding="utf-8",
        )
        (folder / "coordinator.toml").write_text("[wait]\njoin = 60.0\n", encoding="utf-8")
        return made

    def site(self, name: str, data: str, allow: str) -> Path:
        """Write a site's file.

        Args:
            name: of the site.
            data, allow: the TOML of its tables ``[data]`` and ``[allow]``.
        """
        path = self.folder / f"{name}.toml"
        path.write_text(
            f'name = "{name}"\nfederation = "federation.toml"\nidentity = "{name}.key"\nstate = "{name}.state"\n\n'
            f"[data]\n{data}\n[allow]\n{allow}",
            encoding="utf-8",
        )
        return path

    def journal(self, name: str) -> Path:
        """A site's journal."""
        return self.folder / f"{name}.state" / "journal.txt"


@dataclass
class Processes:
    """The processes of a federation.

    Args:
        federation: whose.
        threads: that each site's process computes with.
    """

    federation: Federation
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)

    def start_superlink(self, *options: str) -> None:
        """Start the SuperLink, and wait until it answers.

        Args:
            options: of ``flower-superlink`` beside those that are always given.

        Raises:
            PeerError: it ends, or does not answer in time.
        """
        self._start("superlink", _SUPERLINK, (*_superlink_options(self.federation), *options))
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.running["superlink"].poll() is not None:
                break
            if self._listens(self.federation.host, self.federation.port):
                return
            time.sleep(0.1)
        raise PeerError(f"the SuperLink did not start: see {self.log('superlink')}")

    def start_site(self, name: str) -> None:
        """Start a site's process; it connects by itself."""
        self._start(name, _SITE, ("site", "join", "--config", str(self.federation.folder / f"{name}.toml")))

    def kill(self, name: str) -> None:
        """End a process at once, as a crash would."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End all processes, the SuperLink last."""
        for process in self.running.values():
            process.terminate()
        end = time.monotonic() + STOP_SECONDS
        for process in self.running.values():
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()

    def log(self, name: str) -> Path:
        """What a process printed."""
        return self.federation.folder / f"{name}.log"

    def _listens(self, host: str, port: int) -> bool:
        """Whether somebody listens there."""
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return True
        return False

    def _command(self, name: str, code: str, arguments: Sequence[str]) -> list[str]:
        """The command line of a process."""
        return [sys.executable, "-c", code, *arguments]

    def _start(self, name: str, code: str, arguments: Sequence[str]) -> None:
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                self._command(name, code, arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(self.federation.folder),
                start_new_session=True,
            )


@contextmanager
def processes(federation: Federation, sites: Sequence[str] = (), *options: str) -> Iterator[Processes]:
    """A running SuperLink and sites, which end with the block."""
    with running(Processes(federation), sites, *options) as started:
        yield started


@contextmanager
def running(started: Processes, sites: Sequence[str] = (), *options: str) -> Iterator[Processes]:
    """The same, by a `Processes` that starts them in a way of its own.

    Args:
        started: nothing is running yet.
        sites: those to start; empty for all.
        options: see `Processes.start_superlink`.
    """
    try:
        started.start_superlink(*options)
        for name in sites or started.federation.names:
            started.start_site(name)
        yield started
    finally:
        started.stop()


def environment(folder: Path) -> Mapping[str, str]:
    """What Flower's processes should find in their environment: no telemetry, nothing outside of the folder."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(folder / "flwr")}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _superlink_options(federation: Federation) -> tuple[str, ...]:
    """The options that a federation's SuperLink is always given."""
    folder = federation.folder
    certificates = (
        *("--ssl-certfile", str(folder / "superlink.pem"), "--ssl-keyfile", str(folder / "superlink.pem.key")),
        *("--ssl-ca-certfile", str(folder / "superlink.pem"), "--enable-supernode-auth"),
    )
    return (
        # Without TLS Flower refuses to ask nodes for their keys.
        *(("--insecure",) if federation.insecure else certificates),
        *("--isolation", "process", "--superexec-auth-secret-file", str(folder / "superlink.secret")),
        *("--disable-runtime-dependency-installation", "--host", federation.host, "--port", str(federation.port)),
    )


def _certify(folder: Path, host: str) -> None:
    """A self-signed certificate for an address of this machine, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tacit on this machine")])
    now = datetime.now(UTC)
    addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(host))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, SHA256())
    )
    (folder / "superlink.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    atomic.create(folder / "superlink.pem.key", pem, 0o600)
