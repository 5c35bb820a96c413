"""Train categories: ``deepspeed [--num_accelerators N] launch/train.py --config FILE [--SECTION.FIELD VALUE ...]``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wads_dist.entry import leave, main
from wads_dist.run import train_run

if __name__ == "__main__":
    leave(main(train_run))
