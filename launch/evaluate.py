"""Score a finished run's categories again: ``python launch/evaluate.py RUN [--data.categories a,b]``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from wads_dist.config.schema import Config
from wads_dist.launch.command import run_command


def evaluate(config: Config) -> int:
    from wads_dist.scheduler.rescore import evaluate_run  # imports DeepSpeed; a misspelled setting is told before

    return evaluate_run(config)


def arguments(argv: Sequence[str]) -> list[str]:
    """With a run's folder first, that run's settings, wherever it has been moved; otherwise settings, as for training."""
    if argv and not argv[0].startswith("-"):
        return ["--config", str(Path(argv[0]) / "config.toml"), "--run.dir", argv[0], *argv[1:]]
    return list(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(evaluate, arguments(sys.argv[1:] if argv is None else argv), resumes=False)


if __name__ == "__main__":
    sys.exit(main())
