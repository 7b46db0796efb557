"""A secure sum timed client by client in one process: the real protocol and its real frames, without a network.

Seconds are of one core (``time.process_time``). Clients of the masked sum that drop out do so at the costliest moment,
after their secrets are shared and before their vector arrives, so that the server has to rebuild the masks they left
behind. The shared sum's server seconds are alice's and bob's together, and the crypto provider's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from tacit.bench.measuring import inputs_of, versions
from tacit.errors import InputError
from tacit.federated.secure_sum.client import MaskedClient, Policy, Task
from tacit.federated.secure_sum.encoding import Encoding, Scalar
from tacit.federated.secure_sum.masked import MaskedSum, Meter, run_round
from tacit.federated.secure_sum.parameters import Assumption
from tacit.federated.secure_sum.ring import Ring, Words
from tacit.federated.secure_sum.server import MaskedServer, Stage
from tacit.federated.secure_sum.shared import SharedSum
from tacit.federated.secure_sum.shared_bounds import norm_bound
from tacit.ring.prg import Prg
from tacit.runtimes.executors import one_thread

PROTOCOLS = ("masked", "shared", "shared-verified")
_SCALARS = (Scalar("weight", 1e6), Scalar("loss", 1e6, 2.0**-10))


@dataclass(frozen=True)
class SecureSumFigures:
    """The figures of one benchmark.

    Args:
        holders: k, clients that hold shares of a client's secrets; none in a shared sum.
        threshold: t, how many of them it takes; likewise.
        ring_bits: b of the ring Z/2^b, and bits a parameter in the upload.
        client_cpu_s: mean over the clients that finished, all stages; the rounding to integers apart.
        client_max_cpu_s: the largest.
        encode_cpu_s: mean of the rounding to integers.
        server_cpu_s: all stages, all servers.
        server_cpu_s_per_client: the same over the clients that finished.
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
    server_cpu_s_per_client: float
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
        if protocol == "masked":
            return _Masked(clients, params, dropout, lying_server, progress).run()
        return _shared(_Vectors(clients, params, dropout, progress), protocol == "shared-verified")


class _Vectors:
    """The clients' vectors, made when they are asked for, and their plain sum."""

    def __init__(self, n: int, params: int, dropout: float, progress: Callable[[str], None]) -> None:
        self.n, self.dropout, self._progress = n, dropout, progress
        self.encoding = Encoding(params, clip=1.0, clients=n, scalars=_SCALARS)
        self.dropped = {i for i in range(n) if int((i + 1) * dropout) > int(i * dropout)}
        self.plain = self.encoding.ring.zeros(self.encoding.length)
        base = inputs_of((params,)) - 0.5
        # Of length 1 at most, as an update is that was clipped to the largest magnitude of an entry.
        self._base = base / base.norm()
        self.encode_seconds: list[float] = []

    def of(self, client: int) -> Words:
        """A client's residues, which count as summed."""
        prg = Prg.fresh()
        vector = self._base * (2 * client / self.n - 1)
        began = time.process_time()
        words = self.encoding.encode(vector, (client + 1, client * 0.5), prg).words
        self.encode_seconds.append(time.process_time() - began)
        self.plain += words
        self._progress(f"client {client + 1} of {self.n} sends its vector")
        return words


def _shared(vectors: _Vectors, verified: bool) -> SecureSumFigures:
    """One round of the shared sum."""
    encoding, n = vectors.encoding, vectors.n
    _compile(encoding.ring)
    meter = Meter(time.process_time)
    sums = replace(SharedSum.among(n, max(3, n // 2), norm_bound(encoding, 1.0) if verified else 0), meter=meter)
    summed = sums.sum(
        encoding.ring, encoding.length, range(n), lambda i: None if i in vectors.dropped else vectors.of(i)
    )
    exact = bool((summed.total == encoding.ring.reduce_(vectors.plain)).all())
    seconds = [meter.client_seconds[client] for client in summed.survivors]
    up = statistics.mean(summed.traffic.up[client] for client in summed.survivors)
    return SecureSumFigures(
        protocol="shared-verified" if verified else "shared",
        clients=n,
        params=encoding.size,
        dropout=vectors.dropout,
        dropped=len(vectors.dropped),
        lying_server=False,
        holders=0,
        threshold=0,
        ring_bits=encoding.ring.bits,
        client_cpu_s=statistics.mean(seconds),
        client_max_cpu_s=max(seconds),
        encode_cpu_s=statistics.mean(vectors.encode_seconds),
        server_cpu_s=meter.server_seconds,
        server_cpu_s_per_client=meter.server_seconds / len(seconds),
        upload_bytes_per_client=up,
        upload_bytes_per_param=up / encoding.size,
        download_bytes_per_client=0.0,
        exact=exact,
        recovered=exact and set(summed.lost) == vectors.dropped,
        threads=1,
        versions=versions(),
    )


class _Masked:
    def __init__(self, n: int, params: int, dropout: float, lying: bool, progress: Callable[[str], None]) -> None:
        self._lying, self._vectors = lying, _Vectors(n, params, dropout, progress)
        assumption = Assumption(0.1, max(0.1, dropout), True) if lying else Assumption(0.2, max(0.1, dropout), False)
        self._sum = MaskedSum.among(n, Policy(max(3, n // 2), assumption))
        self._invite = self._sum.invitation(range(n))

    def run(self) -> SecureSumFigures:
        """One round."""
        vectors, encoding = self._vectors, self._vectors.encoding
        _compile(encoding.ring)
        policy, task = self._sum.policy, Task(encoding.ring, encoding.length)
        pinned = frozenset(self._invite.identities)
        meter = Meter(time.process_time)
        members: list[MaskedClient] = []
        for number, identity in enumerate(self._sum.identities):
            with meter.client(number):
                members.append(MaskedClient(identity, pinned, policy, task, Prg.fresh()))
        outcome = run_round(
            MaskedServer(self._invite, task.subject),
            members,
            vectors.of,
            lambda client, stage: stage is Stage.MASK and client in vectors.dropped,
            meter,
        )
        exact = bool((outcome.total == encoding.ring.reduce_(vectors.plain)).all())
        seconds = [meter.client_seconds[client] for client in outcome.survivors]
        up = statistics.mean(meter.up[client] for client in outcome.survivors)
        return SecureSumFigures(
            protocol="masked",
            clients=len(members),
            params=encoding.size,
            dropout=vectors.dropout,
            dropped=len(vectors.dropped),
            lying_server=self._lying,
            holders=self._invite.holders,
            threshold=self._invite.threshold,
            ring_bits=encoding.ring.bits,
            client_cpu_s=statistics.mean(seconds),
            client_max_cpu_s=max(seconds),
            encode_cpu_s=statistics.mean(vectors.encode_seconds),
            server_cpu_s=meter.server_seconds,
            server_cpu_s_per_client=meter.server_seconds / len(seconds),
            upload_bytes_per_client=up,
            upload_bytes_per_param=up / encoding.size,
            download_bytes_per_client=statistics.mean(meter.down[client] for client in outcome.survivors),
            exact=exact,
            recovered=exact and set(outcome.lost) == vectors.dropped,
            threads=1,
            versions=versions(),
        )


def _compile(ring: Ring) -> None:
    ring.add_packed(ring.pack(ring.zeros(1)), ring.zeros(1))
