"""Train and tabulate the ablations of the paper's Table 4: ``python launch/ablations.py --out DIR [--seeds N] [--slurm]
[--config FILE] [--SECTION.FIELD VALUE ...]``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.command import main
from launch.sweep import parse
from wads_dist.common.processes import leave
from wads_dist.config.schema import Config

DESCRIPTION = (
    "Trains the method (wads), the same without SSIM in the reconstruction loss (noSSIM), without the sparsity KL (noKL) and "
    "without adversary, latent loss and KL (noGAN), each over all categories, scores local binary patterns in the place of the "
    "segmenter (LBP), and prints and writes the table, with the paper's numbers where it has them. The same command goes on "
    "with what is not done."
)


def run(_: Config) -> int:
    from wads_dist.sweep.ablations import ablations

    return ablations(given, settings)


if __name__ == "__main__":
    given, settings = parse(description=DESCRIPTION, grid=False)
    leave(main(run, []))
