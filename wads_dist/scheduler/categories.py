"""A launch's way through the categories: every group takes one from the queue, trains it, and takes the next."""

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wads_dist.common.errors import ExitCode, WadsError, exit_code
from wads_dist.common.processes import free_port
from wads_dist.common.signals import StopRequest
from wads_dist.config.schema import Config, ParallelConfig
from wads_dist.runs.events import Tail
from wads_dist.runs.folder import CONFIG, EVENTS, LOG, METRICS
from wads_dist.runs.leases import REPEATS, Lease, Owner, Queue
from wads_dist.scheduler.plan import RankInfo
from wads_dist.scheduler.rendezvous import LOST_SECONDS, STOP, Group, Launch
from wads_dist.scheduler.supervisor import Cores, Task, supervise
from wads_dist.shards.addresses import public
from wads_dist.shards.names import printable

WAIT_SECONDS = 1.0
# For a thread to end its worker when everything ends.
LONGEST_END = 10.0
TICK_SECONDS = 2.0
# Longer than a launcher takes to end the other ranks of a node.
NODE_END_SECONDS = 60.0
FILE_SYSTEM_SECONDS = 600.0
# So many different categories that died in a group, one after the other, are the fault of its device or node.
DIED_ENOUGH = 2


@dataclass(frozen=True)
class Plan:
    """What the first rank has settled for the whole launch."""

    launch: str
    """Tells this launch's attempts from those of others."""
    location: str
    """Of the shards."""
    categories: list[str]
    """In the order in which they are taken."""
    groups: list[tuple[int, ...]]
    places: list[RankInfo]

    def queue(self, run: Path, settings: ParallelConfig, group: str, ranks: tuple[int, ...], host: str) -> Queue:
        """The run's queue, as seen by ``group``."""
        owner = Owner(self.launch, group, ranks, host)
        return Queue(run, self.categories, owner, attempts=settings.attempts, lease_seconds=settings.lease_seconds)

    def neighbours(self, rank: int) -> list[int]:
        """The ranks on the node of ``rank``, itself included."""
        return [other for other, place in enumerate(self.places) if place.node == self.places[rank].node]


class RankLog:
    """``RUN/log/LAUNCH/rank-RANK.jsonl``: what a launched rank did with its time; one JSON object a line, for machines."""

    def __init__(self, run: Path, launch: str, rank: int) -> None:
        self.path = run / LOG / launch / f"rank-{rank:05d}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()

    def write(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
        with suppress(OSError), self._lock, self.path.open("a") as stream:  # a full disk must not end the training
            stream.write(line + "\n")


class LocalStop:
    """A request to stop as one rank's groups see it: the launch's, or one that concerns this rank alone."""

    def __init__(self, launch: StopRequest) -> None:
        self.launch, self.here = launch, False

    @property
    def requested(self) -> bool:
        return self.here or self.launch.requested


class Slot(threading.Thread):
    """This rank's part in one group: a thread, because a rank may have several (``parallel.categories_per_gpu``)."""

    def __init__(self, config: Config, plan: Plan, group: Group, index: int, stop: LocalStop, log: RankLog) -> None:
        super().__init__(name=group.name, daemon=True)
        self.config, self.plan, self.group, self.index, self.stop, self.log = config, plan, group, index, stop, log
        launch = group.launch
        neighbours = plan.neighbours(launch.rank)
        parallel, local_rank = config.parallel, neighbours.index(launch.rank)
        self.cores = Cores.share(parallel, config.trainer.threads, local_rank, len(neighbours), index)
        self.queue = None
        if group.is_first:
            self.queue = plan.queue(config.run.dir, parallel, group.name, group.ranks, launch.host)
        self.alone = len(plan.groups) * config.parallel.categories_per_gpu == 1
        self.died_here: list[str] = []
        """Categories whose workers have died in this group, since one has not."""
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised by whoever joins this thread
            self.error = error

    def _work(self) -> None:
        free_since, number = time.monotonic(), 0
        while True:
            lease, nothing_left = self._take() if self.queue else (None, 0.0)
            task = Task.from_json(self.group.broadcast(f"task/{number}", self._describe(lease, nothing_left)))
            number += 1
            if task is None:
                nothing_left = time.monotonic() - free_since
                self.log.write("over", slot=self.index, nothing_left=round(nothing_left, 3))
                return
            self.group.while_waiting = lease.beat if lease else lambda: None
            waited = time.monotonic() - free_since - task.nothing_left
            started = time.time()
            try:
                worked = supervise(self.config, self.group, self.stop, self.plan.location, task, self.cores, lease)
            except BaseException as error:
                if lease:
                    asked = self.stop.requested or self.group.launch.abandoned.is_set()
                    lease.end(ExitCode.PREEMPTED if asked else exit_code(error), printable(public(str(error))))
                raise
            finally:
                self.group.while_waiting = lambda: None
            free_since = worked.ended
            if worked.code == ExitCode.PREEMPTED:
                self.stop.launch.request()  # whoever asked a worker of this group meant the launch
            if lease:
                self._conclude(lease, task, worked.code, started)
            self.log.write(
                "worked",
                category=task.category,
                attempt=task.attempt,
                group=self.group.name,
                slot=self.index,
                code=worked.code,
                waited=round(max(0.0, waited), 3),
                nothing_left=round(task.nothing_left, 3),
                startup=round(worked.startup, 3),
                seconds=round(worked.seconds, 3),
            )

    def _conclude(self, lease: Lease, task: Task, code: int, started: float) -> None:
        """Ends the lease, and keeps a broken device from being the end of every category."""
        if code == ExitCode.OK and not (self.config.run.dir / task.category / METRICS).is_file():
            code = ExitCode.CRASHED  # a defect; taken for success, the category would be tried for ever
        lease.end(code, failure(self.config.run.dir / task.category, started) if code else "")
        if code in (ExitCode.OK, ExitCode.PREEMPTED, *REPEATS):
            self.died_here.clear()
            return
        assert self.queue is not None  # whoever holds a lease has one
        self.died_here.append(task.category)
        # Another group may do better with it: here it comes last.
        self.queue.categories.sort(key=lambda name: name == task.category)

    def _take(self) -> tuple[Lease | None, float]:
        """The next category's lease (None: there will be none), and for how many seconds none could be had."""
        assert self.queue is not None
        nothing_left, first_problem = 0.0, None
        while not self.stop.requested:
            if not self.alone and len(set(self.died_here)) >= DIED_ENOUGH:
                names = " and ".join(dict.fromkeys(self.died_here))
                print(
                    f"group {self.group.name} on {self.group.launch.host} takes no more: {names} died in it",
                    file=sys.stderr,
                )
                break
            try:
                if lease := self.queue.take():
                    return lease, nothing_left
                looked = time.monotonic()
                if not self.queue.remaining():
                    break
                first_problem = None
            except (OSError, WadsError):  # of the file system; it may pass
                looked = time.monotonic()
                first_problem = first_problem or looked
                if looked - first_problem > FILE_SYSTEM_SECONDS:
                    raise
            self.group.check_peers()  # what is left is being trained by others, whose node may die
            # Many idle groups must not keep a shared file system busy.
            time.sleep(WAIT_SECONDS * min(5.0, 1 + len(self.plan.groups) / 16))
            nothing_left += time.monotonic() - looked
        return None, nothing_left

    def _describe(self, lease: Lease | None, nothing_left: float) -> str | None:
        if not self.group.is_first:
            return None
        if lease is None:
            return "{}"
        address = self.plan.places[self.group.launch.rank].address
        config = self.log.path.parent / CONFIG
        task = Task(lease.category, lease.attempt, str(lease.path), str(config), address, free_port(), nothing_left)
        return task.to_json()


def failure(category: Path, since: float) -> str:
    """What a worker has written of why it could not go on, since then; empty if it could not even do that."""
    tail = Tail(category / EVENTS)
    tail.read()
    return str(tail.last_failure["reason"]) if tail.last_failure.get("time", 0.0) >= since - 1 else ""


def work(config: Config, plan: Plan, launch: Launch, stop: StopRequest, on_tick: Callable[[], bool]) -> None:
    """Trains what is missing, in this rank's groups; returns when every rank has nothing more to do. ``on_tick`` is called
    every few seconds, and says whether nothing is left to train.

    Raises:
        RankLostError: a rank that this one depends on is gone.
        PreemptedError, KeyboardInterrupt: asked to end at once.
    """
    log = RankLog(config.run.dir, plan.launch, launch.rank)
    if launch.is_first:
        hosts = sorted({place.node.partition("/")[2] for place in plan.places})
        log.write("launch", ranks=launch.world_size, groups=plan.groups, hosts=hosts, categories=plan.categories)
    slots: list[Slot] = []
    local_stop, ticks = LocalStop(stop), Ticks(launch, plan, stop, on_tick)
    for number, ranks in enumerate(plan.groups):
        if launch.rank in ranks:
            local = len(set(ranks) & set(plan.neighbours(launch.rank)))
            for index in range(config.parallel.categories_per_gpu):
                name = f"g{number}" if config.parallel.categories_per_gpu == 1 else f"g{number}.{index}"
                slots.append(Slot(config, plan, launch.group(name, ranks, local), index, local_stop, log))
    try:
        with stop.deferred():
            for slot in slots:
                slot.start()
            while any(slot.is_alive() for slot in slots):
                local_stop.here = any(slot.error for slot in slots)  # what else runs here can save
                ticks.tick()
            for slot in slots:
                if slot.error:
                    raise slot.error
            launch.finish()
            while not launch.all_finished() and not ticks.overdue:
                ticks.tick()
    except BaseException:
        launch.abandoned.set()
        for slot in slots:
            slot.join(LONGEST_END)
        raise


class Ticks:
    """What a rank's main thread does while its groups work."""

    def __init__(self, launch: Launch, plan: Plan, stop: StopRequest, on_tick: Callable[[], bool]) -> None:
        self.launch, self.plan, self.stop, self.on_tick = launch, plan, stop, on_tick
        self.neighbours = {rank: plan.places[rank] for rank in plan.neighbours(launch.rank)}
        self.gone_since: dict[int, float] = {}
        self.nothing_left_since: float | None = None
        self.said = False
        self._next = 0.0

    def tick(self) -> None:
        now = time.monotonic()
        for rank, place in self.neighbours.items():
            if not place.is_alive():
                self.gone_since.setdefault(rank, now)
        self.launch.gone = frozenset(self.gone_since)
        self._spread_stop(now)
        if now >= self._next:
            self._next = now + TICK_SECONDS
            try:
                if not self.on_tick():
                    self.nothing_left_since = None
                elif self.nothing_left_since is None:
                    self.nothing_left_since = now
            except (OSError, SystemExit) as error:
                # A full disk, or a terminal that nobody reads any more, must not end the training.
                if not self.said:
                    self.said = True
                    with suppress(OSError):
                        print(f"rank {self.launch.rank}: {error}; training goes on", file=sys.stderr)
        time.sleep(self.launch.poll_seconds)

    @property
    def overdue(self) -> bool:
        """On the first rank: all is done, but some rank does not come to its end, as when its file system hangs."""
        since = self.nothing_left_since
        return since is not None and time.monotonic() - since > 2 * LOST_SECONDS

    def _spread_stop(self, now: float) -> None:
        """A launch stops as a whole. But the signals of a launcher that ends its node because one of its ranks has just died
        concern that node alone; the other nodes go on, unless it is the first, without which nobody can."""
        just_died = any(now - since < NODE_END_SECONDS for since in self.gone_since.values())
        if self.launch.stop_asked.is_set():
            self.stop.request()
        elif self.stop.requested and (self.launch.is_first or not just_died):
            try:
                self.launch.raise_flag(STOP, f"rank {self.launch.rank} was asked to stop")
            except WadsError:
                return  # the store is gone, which every rank finds out by itself
            self.launch.stop_asked.set()
