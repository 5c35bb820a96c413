"""``launch/train.py`` whose workers are ``faulty_worker.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from wads_dist import supervisor
from wads_dist.entry import leave, main
from wads_dist.run import train_run

if __name__ == "__main__":
    supervisor.WORKER = (sys.executable, str(Path(__file__).with_name("faulty_worker.py")))
    leave(main(train_run))
