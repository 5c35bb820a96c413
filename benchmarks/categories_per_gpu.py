"""How many categories should share a device: total images/s of 1, 2 and 4 processes on it (``parallel.categories_per_gpu``).

Each setting trains four categories on one rank through ``launch/train.py``, so that every process does the same work: start-up
is left out, and what counts is the samples of all categories over the time in which they were trained and evaluated. On a GPU,
run it with and without NVIDIA's MPS (``nvidia-cuda-mps-control -d``); on a CPU every process gets its share of the cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from wads_dist.runs.reader import rank_times
from wads_dist.shards.arguments import Parser, local_path

REPOSITORY = Path(__file__).resolve().parent.parent
CATEGORIES = 4


def measure(shards: Path, run: Path, at_once: int, settings: list[str]) -> dict[str, float]:
    """Trains the categories, ``at_once`` at a time, on one rank."""
    names = sorted(path.name for path in shards.iterdir() if path.is_dir())[:CATEGORIES]
    what = ["--data.shards", str(shards), "--run.dir", str(run), "--data.categories", ",".join(names)]
    command = [sys.executable, "launch/train.py", *what, "--parallel.categories_per_gpu", str(at_once), *settings]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    metrics = [json.loads((run / name / "metrics.json").read_text()) for name in names]
    times = rank_times(run)[0]
    return {
        "at_once": at_once,
        "images_per_second": sum(m["samples"] for m in metrics) / (times.worked / at_once),
        "each": sum(m["images_per_second"] for m in metrics) / len(metrics),
        "startup": times.startup / CATEGORIES,
    }


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--config", default="configs/demo.toml")
    parser.add_argument("--samples", type=int, default=800, help="training samples of each category")
    parser.add_argument("--json", type=local_path, help="also write the numbers there")
    given, settings = parser.parse_known_args()
    settings += ["--config", given.config, "--trainer.samples", str(given.samples)]
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        demo = [sys.executable, "-m", "shards", "demo", "--out", str(shards), "--categories", str(CATEGORIES)]
        subprocess.run(demo, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        rows: list[dict[str, float]] = []
        for n in given.at_once:
            rows.append(measure(shards, Path(folder) / f"run-{n}", n, settings))
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1))
    table = Table(title=f"{CATEGORIES} categories of {given.config} on one rank, {os.cpu_count()} cores")
    for name in ("at once", "images/s in all", "of the fewest", "images/s of each", "start-up of each, s"):
        table.add_column(name, justify="right")
    fewest = min(rows, key=lambda row: row["at_once"])
    for row in rows:
        ratio = row["images_per_second"] / fewest["images_per_second"]
        numbers = (f"{row['images_per_second']:.1f}", f"{ratio:.2f}×", f"{row['each']:.1f}", f"{row['startup']:.1f}")
        table.add_row(str(row["at_once"]), *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
