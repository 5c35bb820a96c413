"""A launch's way through the categories: every group takes one from the queue, trains it, and takes the next."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wads_dist.config import Config
from wads_dist.errors import ExitCode, WadsError, exit_code
from wads_dist.groups import Place
from wads_dist.leases import METRICS, Lease, Owner, Queue
from wads_dist.rendezvous import STOP, Group, Launch, free_port
from wads_dist.signals import StopRequest, is_alive
from wads_dist.supervisor import Cores, Task, supervise

LOG = "log"
WAIT_SECONDS = 1.0
# For a thread to end its worker when everything ends.
LONGEST_END = 10.0


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
    places: list[Place]

    def queue(self, config: Config, group: str, ranks: tuple[int, ...], host: str) -> Queue:
        """The run's queue, as seen by ``group``."""
        parallel = config.parallel
        owner = Owner(self.launch, group, ranks, host)
        return Queue(
            config.run.dir, self.categories, owner, attempts=parallel.attempts, lease_seconds=parallel.lease_seconds
        )

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
        with self._lock, self.path.open("a") as stream:
            stream.write(line + "\n")


class Station(threading.Thread):
    """This rank's part in one group: a thread, because a rank may have several (``parallel.categories_per_gpu``)."""

    def __init__(self, config: Config, plan: Plan, group: Group, slot: int, stop: StopRequest, log: RankLog) -> None:
        super().__init__(name=group.name, daemon=True)
        self.config, self.plan, self.group, self.slot, self.stop, self.log = config, plan, group, slot, stop, log
        launch = group.launch
        neighbours = plan.neighbours(launch.rank)
        self.cores = Cores.share(config, neighbours.index(launch.rank), len(neighbours), slot)
        self.queue = plan.queue(config, group.name, group.ranks, launch.host) if group.is_first else None
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
            task = Task.from_json(self.group.share(f"task/{number}", self._describe(lease, nothing_left)))
            number += 1
            if task is None:
                nothing_left = time.monotonic() - free_since
                self.log.write("over", slot=self.slot, nothing_left=round(nothing_left, 3))
                return
            self.group.while_waiting = lease.beat if lease else lambda: None
            waited = time.monotonic() - free_since - task.nothing_left
            try:
                worked = supervise(self.config, self.group, self.stop, self.plan.location, task, self.cores, lease)
            except BaseException as error:
                if lease:
                    asked = self.stop.requested or self.group.launch.abandoned.is_set()
                    lease.end(ExitCode.PREEMPTED if asked else exit_code(error), str(error))
                raise
            finally:
                self.group.while_waiting = lambda: None
            free_since = time.monotonic()
            if lease:
                lease.end(self._judge(task, worked.code))
            self.log.write(
                "worked",
                category=task.category,
                attempt=task.attempt,
                group=self.group.name,
                slot=self.slot,
                code=worked.code,
                waited=round(max(0.0, waited), 3),
                nothing_left=round(task.nothing_left, 3),
                startup=round(worked.startup, 3),
                seconds=round(worked.seconds, 3),
            )
            if worked.code == ExitCode.PREEMPTED:
                self.stop.request()  # whoever asked a worker of this group meant the launch

    def _judge(self, task: Task, code: int) -> int:
        """An exit code of 0 without the numbers is a defect; taken for success, the category would be tried for ever."""
        done = (self.config.run.dir / task.category / METRICS).is_file()
        return ExitCode.CRASHED if code == ExitCode.OK and not done else code

    def _take(self) -> tuple[Lease | None, float]:
        """The next category's lease (None: there will be none), and for how many seconds none could be had."""
        assert self.queue is not None
        started = time.monotonic()
        while not self.stop.requested:
            if lease := self.queue.take():
                return lease, time.monotonic() - started
            if not self.queue.remaining():
                break
            self.group.check_peers()  # what is left is being trained by others, whose node may die
            time.sleep(WAIT_SECONDS)
        return None, time.monotonic() - started

    def _describe(self, lease: Lease | None, nothing_left: float) -> str | None:
        if not self.group.is_first:
            return None
        if lease is None:
            return "{}"
        address = self.plan.places[self.group.launch.rank].address
        return Task(lease.category, lease.attempt, str(lease.path), address, free_port(), nothing_left).to_json()


def work(config: Config, plan: Plan, launch: Launch, stop: StopRequest, on_tick: Callable[[], None]) -> None:
    """Trains what is missing, in this rank's groups; returns when every rank has nothing more to do. ``on_tick`` is called
    about once a second.

    Raises:
        RankLostError: a rank that this one depends on is gone.
        PreemptedError, KeyboardInterrupt: asked to end at once.
    """
    log = RankLog(config.run.dir, plan.launch, launch.rank)
    if launch.is_first:
        hosts = sorted({place.node.partition("/")[2] for place in plan.places})
        log.write("launch", ranks=launch.world_size, groups=plan.groups, hosts=hosts, categories=plan.categories)
    stations: list[Station] = []
    for number, ranks in enumerate(plan.groups):
        if launch.rank in ranks:
            local = len(set(ranks) & set(plan.neighbours(launch.rank)))
            for slot in range(config.parallel.categories_per_gpu):
                name = f"g{number}" if config.parallel.categories_per_gpu == 1 else f"g{number}.{slot}"
                stations.append(Station(config, plan, launch.group(name, ranks, local), slot, stop, log))
    try:
        with stop.deferred():
            for station in stations:
                station.start()
            while any(station.is_alive() for station in stations):
                if any(station.error for station in stations):
                    stop.request()  # what else runs here can save
                _tick(launch, plan, stop, on_tick)
            for station in stations:
                if station.error:
                    raise station.error
            launch.finish()
            while not launch.all_finished():
                _tick(launch, plan, stop, on_tick)
    except BaseException:
        launch.abandoned.set()
        for station in stations:
            station.join(LONGEST_END)
        raise


def _tick(launch: Launch, plan: Plan, stop: StopRequest, on_tick: Callable[[], None]) -> None:
    launch.gone = frozenset(rank for rank in plan.neighbours(launch.rank) if not is_alive(plan.places[rank].pid))
    _spread_stop(launch, plan, stop)
    on_tick()
    time.sleep(launch.poll_seconds)


def _spread_stop(launch: Launch, plan: Plan, stop: StopRequest) -> None:
    """A launch stops as a whole. But the signals of a launcher that ends its node because one of its ranks has died concern
    that node alone; the other nodes go on."""
    if launch.stop_asked.is_set():
        stop.request()
    elif stop.requested and not launch.gone:
        try:
            launch.raise_flag(STOP, f"rank {launch.rank} was asked to stop")
        except WadsError:
            return  # the store is gone, which every rank finds out by itself
        launch.stop_asked.set()
