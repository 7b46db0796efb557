"""Encrypted inference with CrypTen: two parties and a trusted third party, as processes on this machine."""

import crypten_peer
from crypten_peer import crypten


def run(name: str, batch: int, repeat: int) -> dict:
    """One party's program."""
    plain, x = crypten_peer.prepared(name, batch)
    model = crypten_peer.converted(plain)
    model.eval()
    model.encrypt(src=0)
    shared = crypten.cryptensor(x, src=1)
    times, result = crypten_peer.measured(lambda: model(shared), repeat)
    return times | {"error": (result.get_plain_text() - plain(x)).abs().max().item()}


if __name__ == "__main__":
    crypten_peer.report(run, "max_abs_error")
