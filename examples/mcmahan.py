"""McMahan's table on real MNIST: communication rounds until the 2NN classifies 97 % of the test images correctly.

    python examples/mcmahan.py --data /path/to/data                    # all of it: hours
    python examples/mcmahan.py --split iid --batch 10 --fraction 0.1   # one cell: a minute or so
    python examples/mcmahan.py --show                                  # the table of what has been run

100 clients with 600 images each, a pass over them a round (E = 1), and the learning rate with which a cell takes the
fewest rounds, as in Table 1 of McMahan et al. 2017, *Communication-Efficient Learning of Deep Networks from
Decentralized Data*. The paper searches 11 to 13 rates a cell; here the grid is shorter (--rate sets another). A rate is
given up once it has taken as many rounds as a better one, since the rest of its run could not change the table.

Every run adds a line to the results file, and what is in it is not run again: a table that was interrupted goes on,
and several processes can fill one file, each with cells of its own.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import tacit
from tacit.data.examples import Dataset
from tacit.data.mnist import load_mnist
from tacit.data.partition import iid, shards
from tacit.errors import TrainingError
from tacit.federated.history import RoundRecord
from tacit.federated.models import two_nn

CLIENTS = 100
PATIENCE = 500
"""A run is given up if its best accuracy has not grown for so many rounds."""
FRACTIONS = (0.0, 0.1, 0.2, 0.5, 1.0)
SPLITS = {"iid": iid, "shards": shards}
BATCHES = {"all": None, "10": 10}

PAPER: dict[tuple[str, str], tuple[int | None, ...]] = {
    ("iid", "all"): (1455, 1474, 1658, None, None),
    ("iid", "10"): (316, 87, 77, 75, 70),
    ("shards", "all"): (4278, 1796, 1528, None, None),
    ("shards", "10"): (3275, 664, 619, 443, 380),
}
"""Table 1, left half, by split and batch size, for each of `FRACTIONS`; ``None``: not reached in the time allowed."""

RATES = {
    ("iid", "all"): (0.5, 0.3, 0.7),
    ("iid", "10"): (0.2, 0.1, 0.3),
    ("shards", "all"): (0.2, 0.5, 0.1),
    ("shards", "10"): (0.05, 0.02, 0.1),
}
"""The learning rates tried, the most promising first."""


@dataclass(frozen=True)
class Cell:
    """A cell of the table. ``fraction`` is C; 0 is one client a round."""

    split: str
    batch: str
    fraction: float

    @property
    def cohort(self) -> int:
        """How many clients take part in a round."""
        return max(1, round(self.fraction * CLIENTS))


@dataclass(frozen=True)
class Run:
    """One training.

    ``limit`` is how many rounds it was allowed, ``rounds`` how many it took, ``reached`` the one that met the target,
    ``best`` the highest accuracy in them.
    """

    split: str
    batch: str
    fraction: float
    rate: float
    target: float
    seed: int
    limit: int
    rounds: int
    reached: int | None
    best: float
    seconds: float


def main() -> None:
    """Run the cells that are asked for, and print the table."""
    args = arguments()
    cells = [Cell(s, b, c) for b in args.batch for s in args.split for c in args.fraction]
    if not args.show:
        data = load_mnist(args.data)
        for cell in sorted(cells, key=lambda cell: cell.cohort * expected(cell)):
            for rate in args.rate or RATES[cell.split, cell.batch]:
                train(cell, rate, data, args)
    print("\n".join(table(list(recorded(args.results)), args.target, args.seed)))


def train(cell: Cell, rate: float, data: Dataset, args: argparse.Namespace) -> None:
    """One run, unless its line is there or it could not beat another rate's."""
    known = [run for run in recorded(args.results) if matches(run, cell, args.target, args.seed)]
    limit = min((run.reached for run in known if run.reached), default=args.rounds + 1) - 1
    before = next((run for run in known if run.rate == rate), None)
    if limit < 1 or (before and (before.reached or before.limit >= limit)):
        return
    generator = torch.Generator().manual_seed(args.seed)
    parts = SPLITS[cell.split](data.train.targets, CLIENTS, generator)
    clients = [data.train.subset(part) for part in parts]
    history: list[RoundRecord] = []
    started, name = time.perf_counter(), f"{cell.split}, B = {cell.batch}, C = {cell.fraction}, rate {rate}"

    def on_round(record: RoundRecord) -> None:
        history.append(record)
        if record.round % 20 == 0:
            print(f"{name}: round {record.round} of at most {limit}, {record.accuracy:.2%}", end="\r", flush=True)

    try:
        tacit.federate(
            two_nn(),
            clients,
            algorithm=tacit.FedAvg(lr=rate, batch_size=BATCHES[cell.batch]),
            rounds=limit,
            cohort=cell.cohort,
            seed=args.seed,
            test=data.test,
            target_accuracy=args.target,
            patience=PATIENCE,
            processes=args.processes,
            on_round=on_round,
        )
    except TrainingError as error:
        print(f"{name}: {error}")
    accuracies = [record.accuracy or 0.0 for record in history]
    best = max(accuracies, default=0.0)
    reached = len(accuracies) if best >= args.target else None
    seconds = time.perf_counter() - started
    run = Run(
        **asdict(cell),
        rate=rate,
        target=args.target,
        seed=args.seed,
        limit=limit,
        rounds=len(accuracies),
        reached=reached,
        best=best,
        seconds=round(seconds, 1),
    )
    with args.results.open("a") as file:
        file.write("\n" + json.dumps(asdict(run)))
    print(f"{name}: {f'{reached} rounds' if reached else f'best {best:.2%} in {run.rounds} rounds'}, {seconds:.0f} s")


def recorded(results: Path) -> Iterator[Run]:
    """The runs in the results file; a line that was cut off is passed over."""
    for line in filter(None, results.read_text().splitlines()) if results.exists() else []:
        try:
            yield Run(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            print(f"{results}: a line does not parse and is passed over")


def matches(run: Run, cell: Cell, target: float, seed: int) -> bool:
    """Whether the run belongs to a cell."""
    return (Cell(run.split, run.batch, run.fraction), run.target, run.seed) == (cell, target, seed)


def table(runs: list[Run], target: float, seed: int) -> Iterator[str]:
    """The table in Markdown, the paper's figures in brackets."""
    columns = [(split, batch) for split in SPLITS for batch in BATCHES]
    yield "| C | " + " | ".join(f"{split}, B = {batch}" for split, batch in columns) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    for index, fraction in enumerate(FRACTIONS):
        entries = []
        for split, batch in columns:
            mine = [run for run in runs if matches(run, Cell(split, batch, fraction), target, seed)]
            entries.append(f"{outcome(mine)} ({PAPER[split, batch][index] or '—'})")
        yield f"| {fraction} | " + " | ".join(entries) + " |"


def outcome(runs: list[Run]) -> str:
    """The fewest rounds among a cell's runs, and the rate that took them."""
    done = [run for run in runs if run.reached]
    if done:
        best = min(done, key=lambda run: run.reached or 0)
        return f"**{best.reached}** at {best.rate}"
    if runs:
        best = max(runs, key=lambda run: run.best)
        return f"{best.best:.1%} after {best.rounds}"
    return "not run"


def expected(cell: Cell) -> int:
    """Rounds in the paper, or many."""
    return PAPER[cell.split, cell.batch][FRACTIONS.index(cell.fraction)] or 2000


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with mnist/; default: TACIT_DATA, else downloaded")
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--batch", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--fraction", nargs="+", type=float, choices=FRACTIONS, default=list(FRACTIONS), help="C")
    parser.add_argument("--rate", nargs="+", type=float, help="learning rates to try; default: three for each cell")
    parser.add_argument("--rounds", type=int, default=5000, help="give a run up after so many")
    parser.add_argument("--target", type=float, default=0.97)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="train the clients in so many processes")
    parser.add_argument("--results", type=Path, default=Path("mcmahan.jsonl"))
    parser.add_argument("--show", action="store_true", help="run nothing, print the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
