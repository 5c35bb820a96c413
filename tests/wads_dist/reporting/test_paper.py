"""The paper's numbers against each other: a mean that was copied wrongly, or a value, would not fit the others."""

import pytest

from wads_dist.reporting import paper

# Tables 2 and 3, per cent: the evidence of ``paper.WARNING``.
MKD_OBJECTS = (99.4, 80.5, 82.7, 85.6, 93.2, 89.2, 98.4, 73.6, 83.3, 92.2)
MKD_TEXTURES = (78.0, 95.1, 91.6, 79.3, 94.3)
MKD_AS_PRINTED = 90.7
P_NET_TEXTURES = (78.0, 95.1, 91.6, 79.3, 94.3)
REVDISTILL_BOTTLE = 46.2


def test_table_4_has_all_of_mvtec() -> None:
    assert all(set(column) == set(paper.MVTEC) for column in paper.ABLATIONS.values()) and len(paper.MVTEC) == 15


@pytest.mark.parametrize(
    ("group", "categories", "computed"),
    [("all", paper.MVTEC, 0.9292), ("textures", paper.TEXTURES, 0.9446), ("objects", paper.OBJECTS, 0.9215)],
)
def test_the_means_of_the_papers_own_column(group: str, categories: tuple[str, ...], computed: float) -> None:
    assert paper.mean(categories) == pytest.approx(computed, abs=1e-9)
    assert paper.printed_mean(categories) == pytest.approx(computed, abs=0.0009)  # 93.0 is 0.08 higher than its values
    assert f"{100 * paper.PRINTED_MEANS[group]:.1f}" in paper.MEANS and f"{100 * computed:.2f}" in paper.MEANS


@pytest.mark.parametrize(
    ("column", "computed"), [("Method", 0.9292), ("noSSIM", 0.84907), ("noKL", 0.90473), ("LBP", 0.87047)]
)
def test_the_means_of_table_4(column: str, computed: float) -> None:
    assert paper.mean(paper.MVTEC, column) == pytest.approx(computed, abs=5e-6)
    assert paper.ABLATION_MEANS[column] == pytest.approx(computed, abs=0.0023)  # noKL's is 0.23 higher than its values


def test_a_mean_is_over_exactly_the_categories_asked_for() -> None:
    assert paper.mean(["carpet", "wood"]) == pytest.approx(0.93) and paper.printed_mean(["carpet", "wood"]) is None
    assert (
        paper.mean(["carpet", "brick"]) is None and paper.mean([]) is None and paper.mean(["carpet"], "noGAN") is None
    )


def test_the_warning_has_its_evidence_right() -> None:
    mean = sum(MKD_OBJECTS + MKD_TEXTURES) / len(paper.MVTEC)
    assert (
        f"prints a mean of {MKD_AS_PRINTED} for MKD, whose 15 values in Tables 2 and 3 have {mean:.1f}" in paper.WARNING
    )
    assert "columns of MKD and P-Net are identical" in paper.WARNING and P_NET_TEXTURES == MKD_TEXTURES
    assert f"RevDistill has {REVDISTILL_BOTTLE} on bottle" in paper.WARNING
