"""The scaling model's arithmetic, and its bytes beside those that real ranks send."""

import json
import socket
import subprocess
from dataclasses import replace

import pytest

from tests.conftest import REPOSITORY, environment
from wads_dist.profiling.scaling import (
    Collective,
    Compute,
    Model,
    Network,
    Networks,
    Storage,
    checkpoint_bytes,
    queue_seconds,
    sent_bytes,
    step_collectives,
)

NETWORKS = Networks((64, 3_000_000, 512, 7_000_001), (128, 2_000_000), buffers=50_000)
H100 = Network(per_node=8, link=360e9, nic=40e9)
MODEL = Model(NETWORKS, 1, Compute(1e-3, 1e-3, 10e-3), H100, Storage(1e9, 10e9, 1000))


def sent(stage: int, ranks: int) -> float:
    return sum(sent_bytes(call, ranks) for call in step_collectives(NETWORKS, stage, ranks))


@pytest.mark.parametrize("stage", range(4))
def test_one_rank_sends_nothing_and_two_send_the_parameters(stage: int) -> None:
    assert sent(stage, 1) == 0
    # All-reduce; the same and a gather; gathers of all once and of the discriminator three times more, and a reduce-scatter.
    expected = {0: 1.0, 1: 1.5, 2: 1.5, 3: 1.0 + 3 / 2 * 2_000_128 / NETWORKS.parameters}[stage]
    assert sent(stage, 2) / (4 * NETWORKS.parameters) == pytest.approx(expected, rel=1e-3)


def test_the_agreement_takes_a_row_of_every_rank() -> None:
    assert step_collectives(NETWORKS, 0, 1024)[0] == Collective("all_reduce", 1024 * 5 * 8)


def test_a_flat_network_is_the_textbook_ring() -> None:
    seconds = Network.flat(latency=1e-3, bandwidth=1e9).seconds(Collective("all_reduce", 4e9, count=2), 4)
    assert seconds == pytest.approx(2 * (6 * 1e-3 + 2 * 3 / 4 * 4))


def test_a_tree_spares_an_all_reduce_the_hops_that_a_gather_makes() -> None:
    small = 1000.0
    reduce, gather = (H100.seconds(Collective(kind, small), 1024) for kind in ("all_reduce", "all_gather"))
    assert reduce < gather / 5
    assert gather > 127 * 2.7e-6  # every node is crossed into


def test_between_nodes_a_ring_is_as_fast_as_all_the_cards_of_a_node() -> None:
    slow = replace(H100, nic=10e9)
    large = Collective("all_gather", 80e9)
    assert slow.seconds(large, 8) == pytest.approx(7 / 8 * 80e9 / 360e9, rel=1e-3)
    assert slow.seconds(large, 16) == pytest.approx(15 / 16 * 80e9 / 80e9, rel=1e-3)


def test_no_batch_is_small_enough_to_outrun_the_host() -> None:
    assert MODEL.compute.seconds(1) == MODEL.compute.seconds(8) == 10e-3
    assert MODEL.compute.seconds(64) == pytest.approx(65e-3)
    assert MODEL.step(64, 64) > MODEL.compute.host


def test_fifteen_categories_do_not_fill_sixteen_groups() -> None:
    assert [queue_seconds([2.0] * 15, groups) for groups in (1, 8, 14, 15, 16)] == [30, 4, 4, 2, 2]
    assert queue_seconds([1.0, 1.0, 2.0], 2) == 2  # the longest first


def test_a_save_is_shared_by_ranks_until_the_files_are_too_many() -> None:
    seconds = {ranks: MODEL.save(ranks) for ranks in (1, 8, 1024)}
    assert seconds[8] < seconds[1] < seconds[1024]
    assert MODEL.save(8, worlds=15) > seconds[8]


def test_zero_1_also_saves_the_optimisers_own_weights() -> None:
    assert checkpoint_bytes(NETWORKS, 1, 1) - checkpoint_bytes(NETWORKS, 0, 1) == 4 * NETWORKS.parameters


def test_start_up_weighs_more_the_shorter_a_category_is() -> None:
    slow = replace(MODEL, start_up=60.0)
    share = [60 / slow.category(1, 64, samples) for samples in (640_000, 64_000)]
    assert share[0] < 0.1 < 0.4 < share[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_real_ranks_send_and_save_what_the_formulas_say(stage: int) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = (
        f"deepspeed --num_accelerators 2 --master_port {port} benchmarks/scaling_ranks.py --config configs/demo.toml"
    )
    command += (
        f" --trainer.threads 1 --trainer.global_batch_size 4 --trainer.deepspeed configs/deepspeed/zero{stage}.json"
    )
    done = subprocess.run(command.split(), cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{\n") : done.stdout.rindex("}") + 1])
    step, saved = found["a_step_sends"], found["checkpoint"]
    assert step["calls"] == step["calls, formula"]
    assert step["bytes"] == pytest.approx(
        step["bytes, formula"], rel=1e-5
    )  # the broadcasts' lists of modules are a guess
    assert step["TCP"] == pytest.approx(step["TCP, formula"], rel=5e-3)  # gloo's headers
    assert saved["bytes"] == pytest.approx(saved["bytes, formula"], rel=5e-3)  # names, shapes and zip headers
