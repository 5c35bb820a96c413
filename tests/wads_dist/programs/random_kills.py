"""kill -9 at random moments of a training on two ranks, resumed each time, against one that nothing happened to.

usage: random_kills.py FOLDER KILLS SEED. Kills fall anywhere in a life: while ranks join, load, step or save; on one rank (its
peer is then ended, as a supervisor does) or on both. At the end every bit is that of the unbroken run, and the steps that
count used every sample once.
"""

import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import lives
import torch
from common import small_trainer
from exact_resume import assert_same, everything
from lives import DATA

from wads_dist.common.ranks import Ranks
from wads_dist.training import checkpoint
from wads_dist.training.trainer import Trainer

EVERY = 2
OPTIONS = ["--trainer.ema", "0.9", "--checkpoint.keep", "2", "--trainer.learning_rate", "1e-3"]
PHASES = ("joining", "loading", "stepping", "saving")


class Life:
    """What a rank does in each life, and what it leaves for the parent to read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shared = mmap.mmap(-1, 2)  # with the forked ranks: the first one's phase, and how many it has entered

    def enter(self, ranks: Ranks, phase: str) -> None:
        if ranks.is_first:
            self.shared[:] = bytes([PHASES.index(phase), min(self.shared[1] + 1, 255)])

    def start(self) -> list[int]:
        self.shared[:] = bytes(2)
        return lives.start(2, lambda ranks: self.train(ranks, None) and None)

    def note(self, ranks: Ranks, entry: dict[str, object]) -> None:
        """One line in this rank's log, in one write: a kill leaves all of it or nothing."""
        log = os.open(self.folder / f"log-{ranks.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, (json.dumps(entry) + "\n").encode())
        os.close(log)

    def train(self, ranks: Ranks, until: int | None) -> Trainer:
        """Resumes and trains up to step ``until`` (None: until killed), saving every second step."""
        self.enter(ranks, "loading")
        trainer = small_trainer(ranks, *OPTIONS)
        random.seed(ranks.rank)  # Python seeds it anew in a fork; a resume restores it
        checkpoint.resume(trainer, self.folder / "checkpoints", DATA)
        progress = trainer.progress
        self.note(ranks, {"from": progress.step})
        while until is None or progress.step < until:
            self.enter(ranks, "stepping")
            ids = torch.cat(trainer.sample_ids(progress.next_sample)).tolist()
            trainer.step(progress.next_sample)
            self.note(ranks, {"step": progress.step, "ids": ids})
            if progress.step % EVERY == 0:
                self.enter(ranks, "saving")
                saved = checkpoint.save(trainer, self.folder / "checkpoints", DATA, loss=1.0 / progress.step)
                assert saved.path, saved
        return trainer

    def samples_that_count(self) -> list[int]:
        """The samples of all steps that no later life took again, in the order of training."""
        taken: dict[int, list[int]] = {}
        for rank in range(2):
            own: dict[int, list[int]] = {}
            for line in (self.folder / f"log-{rank}").read_text().splitlines():
                entry = json.loads(line)
                if "from" in entry:
                    own = {step: ids for step, ids in own.items() if step <= entry["from"]}
                    assert sorted(own) == list(range(1, entry["from"] + 1))
                else:
                    assert entry["step"] not in own
                    own[entry["step"]] = entry["ids"]
            for step, ids in own.items():
                taken.setdefault(step, []).extend(ids)
        return [sample for step in sorted(taken) for sample in taken[step]]


def main(base: Path) -> None:
    kills, draw = int(sys.argv[2]), random.Random(int(sys.argv[3]))
    (base / "broken").mkdir()
    (base / "whole").mkdir()
    broken, whole = Life(base / "broken"), Life(base / "whole")
    folder = base / "broken" / "checkpoints"

    started = time.monotonic()
    lives.run(2, lambda ranks: broken.train(ranks, EVERY) and None)
    # Joining, loading, two steps, a save, and so on: to the third save at most, and from there into a phase.
    longest = (time.monotonic() - started) / 4
    when: Counter[str] = Counter()
    for _ in range(kills):
        pids, phases, delay = broken.start(), draw.randint(0, 10), draw.uniform(0, longest)
        lives.wait_until(lambda phases=phases: broken.shared[1] >= phases, pids)
        time.sleep(delay)
        when[PHASES[broken.shared[0]]] += 1
        victims = draw.choice([pids, pids[:1], pids[1:]])
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        codes = lives.wait(pids)
        assert all(codes), codes
    print(f"{kills} kills:", dict(when), flush=True)

    newest = int((folder / "latest").read_text().removeprefix("step-"))
    target = newest + 3

    def finish(ranks: Ranks, life: Life) -> None:
        torch.save(everything(life.train(ranks, target)), life.folder / f"state-{ranks.rank}.pt")

    lives.run(2, lambda ranks: finish(ranks, broken))
    lives.run(2, lambda ranks: finish(ranks, whole), timeout=600)
    count = 0
    for rank in range(2):
        a, b = (torch.load(life.folder / f"state-{rank}.pt", weights_only=False) for life in (broken, whole))
        count += assert_same(a, b, f"rank {rank}")
    samples = broken.samples_that_count()
    assert samples == whole.samples_that_count() == list(range(8 * target))
    assert not (folder / "quarantine").exists(), "a kill left a damaged checkpoint under its name"
    assert newest > EVERY, "no life got as far as a save: nothing was shown"
    print(f"{target} steps: {count:,} numbers bitwise equal, samples 0 to {len(samples) - 1} each once", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as base:  # gigabytes
        main(Path(base))
