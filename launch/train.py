"""Train categories: ``deepspeed [--num_accelerators N] launch/train.py --config FILE [--SECTION.FIELD VALUE ...]``.

``--dry-run`` says who would train what, and writes nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.command import main
from wads_dist.common.processes import leave
from wads_dist.config.load import HOW_TO_START
from wads_dist.config.schema import Config

DRY_RUN = "--dry-run"


def train(config: Config) -> int:
    config.require_data(HOW_TO_START)
    from wads_dist.scheduler.run import plan_run, train_run  # imports DeepSpeed; a misspelled setting is told before

    return plan_run(config) if DRY_RUN in sys.argv else train_run(config)


if __name__ == "__main__":
    leave(main(train, [argument for argument in sys.argv[1:] if argument != DRY_RUN]))
