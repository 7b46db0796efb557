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
from typing import NamedTuple

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


class Case(NamedTuple):
    """One row: what is measured, and how often."""

    task: str
    net: str
    batch: int
    repeat: int


CASES = [
    Case("inference", "mlp", 1, 15),
    Case("inference", "lenet", 1, 15),
    Case("inference", "lenet", 128, 3),
    Case("training", "mlp", 128, 5),
    Case("training", "lenet", 128, 2),
]
TACIT_TIMES = {"inference": ("repeat", "online_s", "plaintext_s"), "training": ("steps", "step_s", "plaintext_step_s")}
"""For each task, tacit's option for how often, and its names for what the peers call online, and for plaintext."""


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


def measure(case: Case, peers: dict[str, Path]) -> dict:
    """One row: tacit and every peer, and how many times as long each peer takes, online and all in."""
    often, online, plaintext = TACIT_TIMES[case.task]
    command = [Path(sys.executable).with_name("tacit"), "bench", case.task, "--net", case.net, "--batch"]
    row = case._asdict() | {"load_before": os.getloadavg()[0]}
    tacit = last_line([*command, str(case.batch), f"--{often}", str(case.repeat), "--json"])
    tacit |= {"online_s": tacit[online], "all_in_s": tacit[online] + tacit["profile"]["deal_wall_s"]}
    row |= {"plaintext_s": tacit[plaintext], "tacit": tacit}
    for peer, python in peers.items():
        script = HERE / f"{peer}_{case.task}.py"
        row[peer] = last_line([python, "-W", "ignore", script, case.net, str(case.batch), str(case.repeat)])
        for time in ("online", "all_in"):
            row[f"{peer}_{time}_over_tacit"] = row[peer][f"{time}_s"] / tacit[f"{time}_s"]
    return row


def markdown(rows: list[dict], peers: list[str]) -> str:
    """The rows as a table; every cell is online / all in."""
    names = " | ".join(f"{peer} | ÷ tacit" for peer in peers)
    lines = [f"| task, net, batch | plaintext | tacit | {names} |", "|" + "---|" * (3 + 2 * len(peers))]
    for row in rows:
        cells = [f"{row['task']}, {row['net']}, {row['batch']}", readable(row["plaintext_s"]), both(row["tacit"])]
        for peer in peers:
            ratios = (row[f"{peer}_{time}_over_tacit"] for time in ("online", "all_in"))
            cells += [both(row[peer]), " / ".join(f"{ratio:.0f}×" for ratio in ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def both(times: dict) -> str:
    """Online and all in; one time where a peer's dealing cannot be taken apart."""
    online, all_in = readable(times["online_s"]), readable(times["all_in_s"])
    return online if times["online_s"] == times["all_in_s"] else f"{online} / {all_in}"


def readable(seconds: float) -> str:
    """Three digits of it."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=list(INSTALL), default=list(INSTALL))
    parser.add_argument("--tasks", nargs="+", choices=list(TACIT_TIMES), default=list(TACIT_TIMES))
    options = parser.parse_args()
    interpreters = {peer: install(peer) for peer in options.peers}
    rows = []
    for case in (case for case in CASES if case.task in options.tasks):
        rows.append(measure(case, interpreters))
        print(json.dumps(rows[-1]), flush=True)
    print(markdown(rows, options.peers))
