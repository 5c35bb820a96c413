"""Score a finished run's categories again: ``python launch/evaluate.py --config RUN/config.toml [--data.categories a,b]``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wads_dist.config import Config
from wads_dist.entry import main


def evaluate(config: Config) -> int:
    from wads_dist.run import evaluate_run  # imports DeepSpeed; a misspelled setting is told before

    return evaluate_run(config)


if __name__ == "__main__":
    sys.exit(main(evaluate, resumes=False))
