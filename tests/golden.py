"""What training makes of a small data set, to the last bit: ``python tests/golden.py OUT [REPOSITORY]``, OUT a new folder.

Two CPU ranks under DeepSpeed's launcher train two categories side by side with the default preset, and then one category
together, with every expert, checkpoints and early stopping. Printed are one hash of all tensors and the scores of each. Run it
on one machine, with the same packages, before and after a change that is to change nothing, and compare the lines.
REPOSITORY is the checkout that trains, this one if left out.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

SMALL = (
    "--config configs/demo.toml --trainer.samples 160 --evaluation.holdout 0.25 --model.width 8 "
    "--model.fpn_width 32 --model.latent 16 --trainer.log_every 1"
).split()
RUNS = {
    "plain": ["--parallel.ranks_per_category", "1"],
    "experts": (
        "--preset wads_features --data.categories demo_biscuit --parallel.ranks_per_category 2 --features.size 64 "
        "--checkpoint.every_steps 8 --stopping.every 64 --trainer.ema 0.9"
    ).split(),
}


def digest(weights: Path) -> str:
    """One hash of names, dtypes, shapes and bytes, whatever the header says of versions and settings."""
    found = hashlib.sha256()
    with safe_open(weights, framework="numpy") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            found.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    out, repository = Path(sys.argv[1]).resolve(), Path(sys.argv[2] if len(sys.argv) > 2 else __file__).resolve()
    repository = repository if repository.is_dir() else repository.parent.parent
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"

    def run(*command: str) -> None:
        subprocess.run(command, cwd=repository, env=environment, check=True, stdout=subprocess.DEVNULL)

    shards = out / "shards"
    run(sys.executable, "-m", "shards", "demo", "--out", str(shards), "--categories", "2")
    for name, settings in RUNS.items():
        folder = out / name
        run(
            *("deepspeed", "--num_accelerators", "2", "launch/train.py", *SMALL, *settings),
            *("--data.shards", str(shards), "--run.dir", str(folder)),
        )
        for metrics in sorted(folder.glob("*/metrics.json")):
            scores = json.loads(metrics.read_text())
            print(
                name,
                metrics.parent.name,
                digest(metrics.parent / "weights.safetensors"),
                *(f"{key} {scores[key]!r}" for key in ("pixel_auroc", "pixel_ap", "pixel_aupro", "image_auroc")),
            )


if __name__ == "__main__":
    main()
