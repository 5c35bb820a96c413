import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.support.narrow import NARROW
from wads_dist.common.errors import ConfigError, ExitCode
from wads_dist.config.load import load_config
from wads_dist.config.schema import Config
from wads_dist.evaluation.lbp import lbp_maps
from wads_dist.launch.sweep import parse
from wads_dist.model.networks import Wads
from wads_dist.model.weights import save_weights
from wads_dist.reporting import paper
from wads_dist.sweep import ablations as module
from wads_dist.sweep.ablations import COLUMNS, VARIANTS, LbpModel, Scores, ablations, about_masks, markdown, rows, table
from wads_dist.sweep.plan import open_sweep, plan_runs, record
from wads_dist.sweep.run import sweep
from wads_dist.sweep.summary import SCORES, spread

TINY = f"{NARROW} --data.categories demo_biscuit"


@pytest.fixture
def settings(demo_shards: Path) -> list[str]:
    return ["--data.shards", str(demo_shards), *TINY.split()]


@pytest.fixture
def config(settings: list[str]) -> Config:
    return load_config(settings)


# --- the plan ----------------------------------------------------------------------------------------------------


def test_a_run_for_every_variant_and_seed(settings: list[str], tmp_path: Path) -> None:
    runs = {run.name: run for run in plan_runs(tmp_path, settings, {}, 2, build=True, variants=VARIANTS)}
    assert list(runs) == [
        f"{variant},seed={seed}" for variant in ("wads", "noSSIM", "noKL", "noGAN") for seed in (0, 1)
    ]
    weights = {name: (r.config.objective.reconstruction.ssim, r.config.objective.kl.weight) for name, r in runs.items()}
    assert weights["wads,seed=1"] == (1.0, 0.01) and weights["noSSIM,seed=1"] == (0.0, 0.01)
    assert weights["noKL,seed=0"] == (1.0, 0.0) and runs["noKL,seed=1"].point == "noKL"


def test_only_what_a_variant_sets_makes_it_differ(settings: list[str], tmp_path: Path) -> None:
    method, *others = plan_runs(tmp_path, settings, {}, None, build=True, variants=VARIANTS)
    for run in others:
        different = {name for name, value in run.settings.items() if value != method.settings[name]}
        assert different == set(VARIANTS[run.point])


def test_a_grid_over_what_a_variant_sets_is_refused(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--grid objective\.kl\.weight"):
        plan_runs(tmp_path, settings, {"objective.kl.weight": ["0", "1"]}, None, build=True, variants=VARIANTS)


def test_a_dry_run_plans_the_variants_and_writes_nothing(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse(["--out", str(tmp_path / "out"), "--dry-run", *settings], grid=False)
    assert ablations(*options) == ExitCode.OK
    printed = capsys.readouterr().out
    assert all(variant in printed for variant in VARIANTS) and not (tmp_path / "out").exists()


def test_a_sweep_without_variants_is_as_before(settings: list[str], tmp_path: Path) -> None:
    (run,) = plan_runs(tmp_path, settings, {}, None, build=True)
    assert (run.name, run.settings) == ("run", {})
    assert sweep(*parse(["--out", str(tmp_path), "--dry-run", *settings])) == ExitCode.OK


# --- LBP and the table -------------------------------------------------------------------------------------------


def test_lbp_takes_the_place_of_the_segmenter(config: Config) -> None:
    model, images = Wads(config.model, 64).eval(), torch.rand(2, 3, 64, 64)
    reconstruction, maps, code, _ = LbpModel(model).eval().predict(images)
    theirs = model.predict(images)
    assert torch.equal(reconstruction, theirs[0]) and torch.equal(code, theirs[2])
    assert torch.equal(maps, lbp_maps(images, reconstruction)) and not torch.equal(maps, theirs[1])


def test_one_command_tabulates_what_is_trained(
    settings: list[str],
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training is played: it leaves random weights and made-up numbers."""

    def trained(given, arguments, variants):  # type: ignore[no-untyped-def]
        runs = plan_runs(given.out, arguments, {}, given.seeds, build=True, variants=variants)
        record(open_sweep(given.out, runs, None), "")
        for number, run in enumerate(runs):
            folder = run.folder / "demo_biscuit"
            folder.mkdir(parents=True)
            torch.manual_seed(0)
            state = {k: v.contiguous() for k, v in Wads(config.model, 64).state_dict().items()}
            save_weights(state, folder, config, "demo_biscuit")
            scores = {"pixel_auroc": 0.9 - number / 10, "pixel_ap": 0.5, "image_auroc": None}
            (folder / "metrics.json").write_text(json.dumps(scores))
        return ExitCode.OK

    monkeypatch.setattr(module, "sweep", trained)
    for unwanted in ("fit_threshold", "trivial_maps", "mean_image"):  # only the maps of LBP are new
        monkeypatch.setattr(f"wads_dist.evaluation.evaluate.{unwanted}", None)
    assert ablations(*parse(["--out", str(tmp_path), *settings], grid=False)) == ExitCode.OK
    scores = json.loads((tmp_path / "ablations.json").read_text())
    assert [scores[v]["demo_biscuit"]["pixel_auroc"]["mean"] for v in VARIANTS] == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert scores["LBP"]["demo_biscuit"]["image_auroc"]["n"] == 1
    text = (tmp_path / "ablations.md").read_text()
    assert "| pixel AUROC | wads | noSSIM | noKL | noGAN | LBP |" in text
    assert "| demo_biscuit | 0.900 | 0.800 | 0.700 | 0.600 | 0." in text
    printed = capsys.readouterr().out
    assert "noSSIM" in printed and "resolution by area" in printed


def scored(**categories: list[float | None]) -> Scores:
    """One value a column."""
    return {
        variant: {
            category: {score: spread([v] if (v := values[column]) is not None else []) for score in SCORES}
            for category, values in categories.items()
        }
        for column, variant in enumerate(COLUMNS)
    }


def test_means_are_over_the_categories_that_every_column_has() -> None:
    scores = scored(
        carpet=[0.9, 0.8, 0.7, 0.6, 0.5],
        wood=[0.7, 0.6, 0.5, 0.4, 0.3],
        bottle=[0.1, None, 0.1, 0.1, 0.1],
        zipper=[0.5] * 5,
    )
    found = dict(rows(scores, "pixel_auroc"))
    assert found["bottle"] == ["0.100", "–", "0.100", "0.100", "0.100"]
    assert found["mean, textures (2)"] == ["0.800", "0.700", "0.600", "0.500", "0.400"]
    assert found["mean, all (3)"] == ["0.700", "0.633", "0.567", "0.500", "0.433"]
    assert "mean, objects (1)" not in found


def test_below_a_category_of_the_paper_stands_its_row_of_table_4() -> None:
    scores = scored(carpet=[0.9] * 5, brick=[0.9] * 5)
    assert list(rows(scores, "pixel_auroc"))[1] == ("paper", ["0.915", "0.889", "0.902", "–", "0.864"])
    assert [name for name, _ in rows(scores, "pixel_auroc")].count("paper") == 1
    assert "paper" not in dict(rows(scores, "pixel_ap"))


def test_below_a_mean_stands_that_of_table_4_over_the_same_categories() -> None:
    found = list(rows(scored(carpet=[0.9] * 5, wood=[0.9] * 5, brick=[0.9] * 5), "pixel_auroc"))
    position = [name for name, _ in found].index("mean, textures (2)")
    assert found[position + 1] == ("paper", ["0.9300", "0.9020", "0.9040", "–", "0.8855"])
    assert found[-1][0] == "mean, all (3)"  # one of which the paper has not


def test_below_the_mean_of_all_15_stands_what_the_paper_prints() -> None:
    *_, computed, printed = rows(scored(**{category: [0.9] * 5 for category in paper.MVTEC}), "pixel_auroc")
    assert computed == ("paper", ["0.9292", "0.8491", "0.9047", "–", "0.8705"])
    assert printed == ("paper, as printed", ["0.930", "0.849", "0.907", "–", "0.870"])


def test_the_table_fits_a_terminal() -> None:
    scores = scored(toothbrush=[0.9] * 5, carpet=[0.9] * 5)
    for of in scores.values():
        of["toothbrush"]["pixel_auroc"] = spread([0.8, 0.9])
    text = StringIO()
    Console(file=text, width=80).print(table(scores, "pixel_auroc"))
    line = next(line for line in text.getvalue().splitlines() if line.startswith("toothbrush"))
    assert line.split() == ["toothbrush", *["0.850", "±.071"] * 5]


def test_a_deviation_over_seeds_is_shown() -> None:
    scores = scored(carpet=[0.9] * 5)
    scores["noKL"]["carpet"]["pixel_auroc"] = spread([0.8, 0.9])
    assert dict(rows(scores, "pixel_auroc"))["carpet"][2] == "0.850 ± 0.071"


def test_the_file_says_what_the_columns_are() -> None:
    text = "\n".join(markdown(scored(carpet=[0.9] * 5), about_masks(["area"])))
    for said in ("`objective.kl.weight = 0`", "resolution by area", "era.2024169"):
        assert said in text
    assert text.count("| carpet |") == len(SCORES)
