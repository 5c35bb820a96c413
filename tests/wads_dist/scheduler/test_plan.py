from dataclasses import replace

import pytest

from wads_dist.common.errors import ConfigError
from wads_dist.config.schema import ParallelConfig
from wads_dist.scheduler.plan import RankInfo, form_groups


def sizes(nodes: list[str], categories: int, batch: int = 64, **parallel: object) -> list[tuple[int, ...]]:
    return form_groups(nodes, ParallelConfig.model_validate(parallel), categories, batch)


@pytest.mark.parametrize(
    ("nodes", "categories", "groups", "size"),
    [
        ("a", 15, 1, 1),
        ("aa", 1, 1, 2),
        ("aa", 2, 2, 1),
        ("aa", 15, 2, 1),
        ("aaaa", 2, 2, 2),
        ("aaaaaaaa", 15, 8, 1),  # fewer ranks than categories: one each, and a queue
        ("a" * 8 + "b" * 8, 15, 16, 1),
        ("aaaaaaaabbbbbbbbccccccccdddddddd", 15, 16, 2),
        ("aaaaabbbbb", 2, 2, 4),  # 5 does not share a batch of 64; 4 leaves one rank of each node
    ],
)
def test_every_category_gets_a_group_and_every_group_as_many_ranks_as_there_are(
    nodes: str, categories: int, groups: int, size: int
) -> None:
    formed = sizes(list(nodes), categories)
    assert len(formed) == groups and {len(ranks) for ranks in formed} == {size}
    assert len({rank for ranks in formed for rank in ranks}) == groups * size


def test_groups_stay_on_their_node() -> None:
    nodes = list("aaabbb")
    assert sizes(nodes, 15, ranks_per_category=2) == [(0, 1), (3, 4)]
    assert sizes(nodes, 15, ranks_per_category=2, straddle_nodes=True) == [(0, 1), (2, 3), (4, 5)]
    assert sizes(nodes, 1, batch=6) == [(0, 1, 2), (3, 4, 5)]  # the second has nothing to do
    assert sizes(nodes, 1, batch=6, straddle_nodes=True) == [(0, 1, 2, 3, 4, 5)]


def test_several_categories_on_a_gpu_need_fewer_groups() -> None:
    assert sizes(list("aaaa"), 4, categories_per_gpu=2) == [(0, 1), (2, 3)]


def test_a_group_that_no_node_can_hold_is_refused_with_what_would_help() -> None:
    with pytest.raises(ConfigError, match=r"no node has more than 2 of the 4 .*straddle_nodes"):
        sizes(list("aabb"), 1, ranks_per_category=4)
    with pytest.raises(ConfigError, match="8, but 4 ranks were launched"):
        sizes(list("aabb"), 1, ranks_per_category=8)


def test_a_launchers_number_tells_nodes_of_one_name_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSS_RANK", "0")
    first = RankInfo.here("10.0.0.1")
    monkeypatch.setenv("CROSS_RANK", "1")
    assert RankInfo.here("10.0.0.2").node != first.node
    assert RankInfo.from_json(first.to_json()) == first


def test_a_process_is_known_by_its_start_and_its_machine() -> None:
    mine = RankInfo.here("10.0.0.1")
    assert mine.is_alive()
    assert not replace(mine, started="1").is_alive()  # its number was given to another
    assert replace(mine, started="1", machine="another boot").is_alive()  # nothing can be said
