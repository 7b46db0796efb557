"""A secure sum timed client by client in one process: the real protocol and its real frames, without a network.

Seconds are of one core (``time.process_time``). Clients that drop out do so at the costliest moment, after their
secrets are shared and before their vector arrives, so that the server has to rebuild the masks they left behind.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tacit.bench.measuring import inputs_of, versions
from tacit.errors import InputError
from tacit.federated.secure_sum.client import MaskedClient, Policy, Task
from tacit.federated.secure_sum.encoding import Encoding, Scalar
from tacit.federated.secure_sum.masked import MaskedSum, Meter, run_round
from tacit.federated.secure_sum.parameters import Assumption
from tacit.federated.secure_sum.ring import Ring, Words
from tacit.federated.secure_sum.server import MaskedServer, Stage
from tacit.ring.prg import Prg
from tacit.runtimes.executors import one_thread

PROTOCOLS = ("masked",)
_SCALARS = (Scalar("weight", 1e6), Scalar("loss", 1e6, 2.0**-10))


@dataclass(frozen=True)
class SecureSumFigures:
    """The figures of one benchmark.

    Args:
        holders: k, clients that hold shares of a client's secrets.
        threshold: t, how many of them it takes.
        ring_bits: b of the ring Z/2^b, and bits a parameter in the upload.
        client_cpu_s: mean over the clients that finished, all stages; the rounding to integers apart.
        client_max_cpu_s: the largest.
        encode_cpu_s: mean of the rounding to integers.
        server_cpu_s: all stages.
        upload_bytes_per_client: mean of all frames of a client that finished.
        download_bytes_per_client: mean of all frames to it, the model apart.
        exact: whether the sum equals the plain sum of the finishers' integers, word for word.
        recovered: whether it does in spite of clients that dropped out.
    """

    protocol: str
    clients: int
    params: int
    dropout: float
    dropped: int
    lying_server: bool
    holders: int
    threshold: int
    ring_bits: int
    client_cpu_s: float
    client_max_cpu_s: float
    encode_cpu_s: float
    server_cpu_s: float
    upload_bytes_per_client: float
    upload_bytes_per_param: float
    download_bytes_per_client: float
    exact: bool
    recovered: bool
    threads: int
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """The figures for ``--json``."""
        return asdict(self)


def measure_secure_sum(
    protocol: str,
    clients: int,
    params: int,
    dropout: float,
    lying_server: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> SecureSumFigures:
    """Run the benchmark.

    Args:
        protocol: one of `PROTOCOLS`.
        clients: n.
        params: D, entries of each vector of 16-bit integers.
        dropout: the fraction of clients to lose.
        lying_server: whether parameters withstand a server that departs from the protocol, with a tenth of the clients
            on its side; if not, one that follows it, with a fifth.
        progress: told what happens next.

    Raises:
        InputError: no such protocol, or a number is out of range.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    if params < 1 or not 0 <= dropout < 0.5:
        raise InputError(f"params is {params} and dropout is {dropout}: at least 1, and a fraction in [0, 0.5)")
    with one_thread():
        return _Masked(clients, params, dropout, lying_server, progress).run()


class _Masked:
    def __init__(self, n: int, params: int, dropout: float, lying: bool, progress: Callable[[str], None]) -> None:
        self._dropout, self._lying, self._progress = dropout, lying, progress
        assumption = Assumption(0.1, max(0.1, dropout), True) if lying else Assumption(0.2, max(0.1, dropout), False)
        self._encoding = Encoding(params, clip=1.0, clients=n, scalars=_SCALARS)
        self._sum = MaskedSum.among(n, Policy(max(3, n // 2), assumption))
        self._invite = self._sum.invitation(self._encoding.ring, self._encoding.length, range(n))
        self._dropped = {i for i in range(n) if int((i + 1) * dropout) > int(i * dropout)}
        self._plain = self._encoding.ring.zeros(self._encoding.length)
        self._base = inputs_of((params,)) - 0.5
        self._encode_seconds: list[float] = []

    def _vector(self, client: int) -> Words:
        n, prg = len(self._invite.identities), Prg.fresh()
        vector = self._base * (2 * client / n - 1)
        began = time.process_time()
        words = self._encoding.encode(vector, (client + 1, client * 0.5), prg).words
        self._encode_seconds.append(time.process_time() - began)
        self._plain += words
        self._progress(f"client {client + 1} of {n} masks its vector")
        return words

    def run(self) -> SecureSumFigures:
        """One round."""
        _compile(self._encoding.ring)
        policy, task = self._sum.policy, Task(self._encoding.ring, self._encoding.length)
        pinned = frozenset(self._invite.identities)
        meter = Meter(time.process_time)
        members: list[MaskedClient] = []
        for number, identity in enumerate(self._sum.identities):
            with meter.client(number):
                members.append(MaskedClient(identity, pinned, policy, task, Prg.fresh()))
        outcome = run_round(
            MaskedServer(self._invite),
            members,
            self._vector,
            lambda client, stage: stage is Stage.MASK and client in self._dropped,
            meter,
        )
        exact = bool((outcome.total == self._encoding.ring.reduce_(self._plain)).all())
        seconds = [meter.client_seconds[client] for client in outcome.survivors]
        up = statistics.mean(meter.up[client] for client in outcome.survivors)
        return SecureSumFigures(
            protocol="masked",
            clients=len(members),
            params=self._encoding.size,
            dropout=self._dropout,
            dropped=len(self._dropped),
            lying_server=self._lying,
            holders=self._invite.holders,
            threshold=self._invite.threshold,
            ring_bits=self._invite.bits,
            client_cpu_s=statistics.mean(seconds),
            client_max_cpu_s=max(seconds),
            encode_cpu_s=statistics.mean(self._encode_seconds),
            server_cpu_s=meter.server_seconds,
            upload_bytes_per_client=up,
            upload_bytes_per_param=up / self._encoding.size,
            download_bytes_per_client=statistics.mean(meter.down[client] for client in outcome.survivors),
            exact=exact,
            recovered=exact and set(outcome.lost) == self._dropped,
            threads=1,
            versions=versions(),
        )


def _compile(ring: Ring) -> None:
    ring.add_packed(ring.pack(ring.zeros(1)), ring.zeros(1))
