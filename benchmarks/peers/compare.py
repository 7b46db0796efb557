"""The table tacit : peers, every figure taken on this machine in this run.

Run it with the interpreter that tacit is installed in; see the README beside it. The cases of one row run one after
another, and the machine's load is printed with them: compare ratios, not times.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".peers"
INSTALL = {
    "crypten": [
        ["torch==2.13.0", "numpy==2.4.6", "onnx", "omegaconf", "pandas", "pyyaml"],
        ["--no-deps", "crypten==0.4.1"],
    ],
    "spu": [["spu==0.9.5"]],
}
"""What pip installs in each environment, in order. CrypTen's own list asks for torchvision, which it does not use."""
CASES = [("mlp", 1, 15), ("lenet", 1, 15), ("lenet", 128, 3)]


def install(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made if it is missing.

    Raises:
        CalledProcessError: pip could not install it; pip has printed why.
    """
    folder = ENVIRONMENTS / peer
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for packages in INSTALL[peer]:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        done.touch()
    return python


def last_line(command: list) -> dict:
    """Run a benchmark and read the JSON in its last line."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    result = subprocess.run(command, env=os.environ | one_thread, capture_output=True, text=True, timeout=1800)
    if result.returncode:
        sys.exit(f"{command[0]} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def measure(net: str, batch: int, repeat: int, peers: dict[str, Path]) -> dict:
    """One row: tacit and every peer."""
    tacit = [Path(sys.executable).with_name("tacit"), "bench", "inference", "--net", net]
    row = {"net": net, "batch": batch, "load_before": os.getloadavg()[0]}
    row["tacit"] = last_line([*tacit, "--batch", str(batch), "--repeat", str(repeat), "--json"])
    for peer, python in peers.items():
        script = HERE / f"{peer}_inference.py"
        row[peer] = last_line([python, "-W", "ignore", script, net, str(batch), str(repeat)])
        row[f"{peer}_over_tacit"] = row[peer]["online_s"] / row["tacit"]["online_s"]
    return row


def markdown(rows: list[dict], peers: list[str]) -> str:
    """The rows as a table."""
    names = " | ".join(f"{peer} | {peer} ÷ tacit" for peer in peers)
    lines = [f"| net, batch | plaintext | tacit online | {names} |", "|" + "---|" * (3 + 2 * len(peers))]
    for row in rows:
        cells = [f"{row['net']}, {row['batch']}", milliseconds(row["tacit"]["plaintext_s"])]
        cells.append(milliseconds(row["tacit"]["online_s"]))
        for peer in peers:
            cells += [milliseconds(row[peer]["online_s"]), f"{row[f'{peer}_over_tacit']:.0f}×"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    """Three digits of it."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=list(INSTALL), default=list(INSTALL))
    chosen = parser.parse_args().peers
    interpreters = {peer: install(peer) for peer in chosen}
    rows = []
    for case in CASES:
        rows.append(measure(*case, interpreters))
        print(json.dumps(rows[-1]), flush=True)
    print(markdown(rows, chosen))
