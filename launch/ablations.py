"""Train and tabulate the ablations of the paper's Table 4: ``python launch/ablations.py --out DIR [--seeds N] [--slurm]
[--config FILE] [--SECTION.FIELD VALUE ...]``."""

from collections.abc import Sequence

from wads_dist.common.processes import leave
from wads_dist.config.schema import Config
from wads_dist.launch.command import run_command
from wads_dist.launch.sweep import parse

DESCRIPTION = (
    "Trains the method (wads), the same without SSIM in the reconstruction loss (noSSIM), without the sparsity KL (noKL) and "
    "without adversary, latent loss and KL (noGAN), each over all categories, scores local binary patterns in the place of the "
    "segmenter (LBP), and prints and writes the table, with the paper's numbers where it has them. The same command goes on "
    "with what is not done."
)


def main(argv: Sequence[str] | None = None) -> int:
    given, settings = parse(argv, description=DESCRIPTION, grid=False)

    def run(_: Config) -> int:
        from wads_dist.sweep.ablations import ablations  # imports DeepSpeed; a misspelled option is told before

        return ablations(given, settings)

    return run_command(run, [])


if __name__ == "__main__":
    leave(main())
