"""The table tacit : Flower : pfl for simulated federated averaging, every figure taken on this machine in this run.

Run it with the interpreter that tacit is installed in; see the README beside it. The three run one after another, and
the machine's load is printed with them: compare ratios, not times.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import compare

HERE = Path(__file__).parent
compare.INSTALL |= {
    "flower": [["torch==2.13.0", "flwr[simulation]==1.41.0"]],
    "pfl": [["torch==2.13.0", "pfl==0.6.0"]],
}
PEERS = ("flower", "pfl")


class Case(NamedTuple):
    """One row: what is trained, and for how many measured rounds."""

    model: str
    clients: int
    cohort: int
    batch_size: int
    rounds: int


CASES = {"2nn": Case("2nn", 1000, 50, 10, 10), "cnn": Case("cnn", 1000, 10, 10, 4)}


def measure(case: Case, peers: dict[str, Path]) -> dict:
    """One row: tacit and every peer, and how many times as much CPU time each peer takes for a round."""
    command = [Path(sys.executable).with_name("tacit"), "bench", "federated"]
    for name, value in case._asdict().items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    row = case._asdict() | {"load_before": os.getloadavg()[0], "tacit": compare.last_line([*command, "--json"])}
    for peer, python in peers.items():
        script = HERE / f"{peer}_federated.py"
        row[peer] = compare.last_line([python, "-W", "ignore", script, *map(str, case)])
        row[f"{peer}_over_tacit"] = row[peer]["cpu_s_per_round"] / row["tacit"]["cpu_s_per_round"]
    return row


def markdown(rows: list[dict], peers: list[str]) -> str:
    """The rows as a table: CPU seconds a round, and the first round's wall-clock time."""
    names = " | ".join(f"{peer} | ÷ tacit" for peer in peers)
    lines = [f"| net, clients a round | plain loop | tacit | {names} |", "|" + "---|" * (3 + 2 * len(peers))]
    for row in rows:
        tacit = row["tacit"]
        cells = [f"{row['model']}, {row['cohort']}", f"{tacit['plain_loop_cpu_s']:.3f} s", figures(tacit)]
        for peer in peers:
            cells += [figures(row[peer]), f"{row[f'{peer}_over_tacit']:.1f}×"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(one: dict) -> str:
    """CPU time a round, and how long the start takes."""
    return f"{one['cpu_s_per_round']:.3f} s (first after {one['startup_s']:.1f} s)"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    interpreters = {peer: compare.install(peer) for peer in options.peers}
    rows = []
    for name in options.models:
        rows.append(measure(CASES[name], interpreters))
        print(json.dumps(rows[-1]), flush=True)
    print(markdown(rows, options.peers))
