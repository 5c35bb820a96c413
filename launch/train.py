"""Train categories: ``deepspeed [--num_accelerators N] launch/train.py --config FILE [--SECTION.FIELD VALUE ...]``.

``--dry-run`` says who would train what, and writes nothing.
"""

import sys
from collections.abc import Sequence

from wads_dist.common.processes import leave
from wads_dist.config.load import HOW_TO_START
from wads_dist.config.schema import Config
from wads_dist.launch.command import run_command

DRY_RUN = "--dry-run"


def train(config: Config, dry_run: bool = False) -> int:
    config.require_data(HOW_TO_START)
    from wads_dist.scheduler.run import plan_run, train_run  # imports DeepSpeed; a misspelled setting is told before

    return plan_run(config) if dry_run else train_run(config)


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    settings = [argument for argument in given if argument != DRY_RUN]
    return run_command(lambda config: train(config, len(settings) < len(given)), settings)


if __name__ == "__main__":
    leave(main())
