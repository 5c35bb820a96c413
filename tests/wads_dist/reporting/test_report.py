"""Reports of run folders made by hand: what a report says must not depend on what the folder lacks."""

import base64
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, environment
from wads_dist.launch.report import main
from wads_dist.reporting import paper, report
from wads_dist.reporting.charts import Chart, Series, compact
from wads_dist.reporting.report import render, write_report
from wads_dist.reporting.report_data import as_json, missing, read_run
from wads_dist.runs.events import read_history

VOID = {"meta", "br", "img", "line", "polyline"}
LOSSES = dict(
    total=2.0, dissimilarity=0.5, mse=0.1, focal=0.01, kl=0.02, adversarial=0.7, discriminator=0.6, latent=0.1
)
METRICS = {
    "pixel_auroc": 0.9, "pixel_ap": 0.5, "pixel_aupro": 0.8, "pixel_f1_max": 0.55, "pixel_iou_max": 0.4,
    "image_auroc": 0.7, "image_ap": 0.75, "image_f1_max": 0.65,
    "trivial": {"pixel_auroc": 0.6, "pixel_ap": 0.3}, "reconstruction": {"ssim": 0.66},
    "samples": 64, "seconds": 90.0, "world_size": 2, "images_per_second": 10.0,
    "rejected_steps": 0, "spikes": 0, "at_threshold": {"pixel_f1": 0.123},
}  # fmt: skip


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"event": "step", "time": 1000.0 + number, "step": number, "samples": 8 * number} | LOSSES | more


def write_events(folder: Path, *events: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "events.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def add_category(run: Path, name: str, tile: bytes = b"picture", **metrics: Any) -> Path:
    """A category that is done, with all its files."""
    folder = run / name
    write_events(folder, {"event": "start", "time": 1000.0, "step": 0, "samples": 0}, *(step(k) for k in range(1, 9)))
    curve = [0.0, 0.5, 1.0]
    curves = {
        "roc": {"fpr": curve, "tpr": curve},
        "pro": {"fpr": curve, "pro": curve},
        "pr": {"recall": curve, "precision": curve},
    }
    kinds = [(rank, "cut") for rank in ("best", "median", "worst") for _ in range(2)] + [
        ("median", "good"),
        ("worst", "good"),
    ]
    examples = []
    (folder / "examples").mkdir()
    for number, (rank, defect) in enumerate(kinds):
        tiles = {kind: f"{number:02d}-{kind}.jpg" for kind in report.TILES}
        for file in tiles.values():
            (folder / "examples" / file).write_bytes(tile)
        entry = {
            "key": f"test/{defect}/{number}",
            "defect": defect,
            "rank": rank,
            "place": number + 1,
            "of": 8,
            "score": 0.25,
        }
        examples.append(entry | {"ap": 0.5 if defect == "cut" else None, "iou": None, "tiles": tiles})
    for file, content in (
        ("metrics.json", METRICS | metrics),
        ("curves.json", curves),
        ("threshold.json", {"pixel": 0.4, "image": 0.3, "source": "normal images held out of training", "images": 20}),
        ("examples/examples.json", {"category": name, "threshold": 0.4, "examples": examples}),
    ):
        (folder / file).write_text(json.dumps(content))
    return folder


def add_attempt(run: Path, name: str, number: int, code: int, reason: str) -> None:
    folder = run / "queue" / name
    folder.mkdir(parents=True, exist_ok=True)
    claim = dict(
        attempt=number, launch="l", group="g0", ranks=[0], host="node-a", machine="m", pid=1, started="1", time=1.0
    )
    (folder / f"{number:03d}.json").write_text(json.dumps(claim))
    end = {"code": code, "reason": reason, "time": time.time(), "seconds": 60.0}
    (folder / f"{number:03d}.ended.json").write_text(json.dumps(end))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one category, with everything that a run's folder has."""
    folder = tmp_path / "a run"
    add_category(folder, "nut")
    (folder / "config.toml").write_text("[trainer]\nseed = 1234\nsamples = 64\n")
    (folder / "deepspeed.json").write_text('{"zero_optimization": {"stage": 1}}')
    (folder / "code.json").write_text('{"commit": "abc123", "torch": "2.14"}')
    log = folder / "log" / "20261124-120000-abcdef"
    log.mkdir(parents=True)
    launch = {
        "event": "launch",
        "time": 1.0,
        "ranks": 2,
        "groups": [[0, 1]],
        "hosts": ["node-a"],
        "categories": ["nut"],
    }
    worked = {"event": "worked", "category": "nut", "waited": 0.0, "startup": 10.0, "seconds": 130.0}
    (log / "rank-00000.jsonl").write_text(json.dumps(launch) + "\n" + json.dumps(worked) + "\n")
    return folder


class Page(HTMLParser):
    """Text, attributes and tables of a page, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, first: str) -> list[str]:
        """The first table row that begins with this."""
        return next(row for row in self.rows if row and row[0] == first)


def page_of(run: Path) -> Page:
    return Page(render(read_run(run)))


# --- one file ----------------------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing(run: Path) -> None:
    page, text = page_of(run), render(read_run(run))
    assert not page.tags & {"script", "link", "iframe", "object", "base", "form"}
    assert not re.search(r"https?:|url\(|@import", text)
    assert all(value.startswith("data:image/") for name, value in page.attributes if name == "src")
    assert all(value.startswith("#category-") for name, value in page.attributes if name == "href")
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert any("default-src 'none'" in value for _, value in page.attributes)


def test_links_lead_to_sections(run: Path) -> None:
    add_category(run, "bolt")
    page = page_of(run)
    targets = {value[1:] for name, value in page.attributes if name == "href"}
    assert len(targets) == 2 and targets <= {value for name, value in page.attributes if name == "id"}


def test_names_and_reasons_are_text(run: Path) -> None:
    evil = "<img src=x onerror=alert(1)>&\"'"
    add_category(run, evil)  # which cannot name one, and is not shown
    add_attempt(run, "bolt", 1, 1, f"<script>alert(2)</script>{evil}")
    page = page_of(run)
    assert "script" not in page.tags and "onerror" not in {name for name, _ in page.attributes}
    assert page.text.count(evil) == page.text.count(f"<script>alert(2)</script>{evil}") > 0


def test_fifteen_categories_stay_below_five_megabytes(tmp_path: Path) -> None:
    for name in paper.MVTEC:
        add_category(tmp_path, name, tile=bytes(range(256)) * 32)  # 8 KB, 40 of them a category
    path = write_report(tmp_path)
    assert path.stat().st_size < 5_000_000
    page = Page(path.read_text())
    captions = [word for word in page.words if re.match(r"(best|median|worst): ", word)]
    # Where not all of them have room, every rank has one.
    assert 4 * 15 <= len(captions) < 8 * 15
    assert {word.split(":")[0] for word in captions} == {"best", "median", "worst"}


def test_a_report_needs_no_torch() -> None:
    program = "import sys, wads_dist.reporting.report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env=environment(), check=True)


# --- numbers -----------------------------------------------------------------------------------------------------


def test_a_row_of_scores_for_each_category_and_mean(tmp_path: Path) -> None:
    for name, auroc in (("carpet", 0.8), ("wood", 0.9), ("bottle", 0.7)):
        add_category(tmp_path, name, pixel_auroc=auroc)
    add_attempt(tmp_path, "zipper", 1, 6, "")
    page = page_of(tmp_path)
    assert page.row("carpet")[1:5] == ["0.800", "0.915", "0.600", "0.500"]
    assert page.row("mean, textures")[1] == "0.850"
    assert page.row("mean, objects (1 of 2)")[1] == "0.700" and page.row("mean, all (3 of 4)")[1] == "0.800"
    assert page.row("zipper (failed)")[1:] == ["–", "0.738", *["–"] * 6]
    assert ["carpet", "0.700", "0.750", "0.650"] in page.rows


def test_a_score_that_some_lack_is_the_mean_of_the_others(tmp_path: Path) -> None:
    add_category(tmp_path, "a", pixel_aupro=None)
    add_category(tmp_path, "b", pixel_aupro=0.25)
    means = as_json(read_run(tmp_path))["means"]
    assert means["all"]["pixel_aupro"] == 0.25 and list(means) == ["all"]
    assert means["all"]["over"]["pixel_aupro"] == 1 and means["all"]["over"]["pixel_auroc"] == 2
    assert page_of(tmp_path).row("mean, all")[5] == "0.250 (1)"


def test_a_mean_is_over_the_categories_that_have_the_score(tmp_path: Path) -> None:
    """Not over those that are done, and beside a mean of 14 stands the paper's of the same 14."""
    for name in paper.MVTEC[1:]:
        add_category(tmp_path, name)
    add_category(tmp_path, paper.MVTEC[0], pixel_auroc=None)
    row = page_of(tmp_path).row("mean, all (14 of 15)")
    of_14 = (15 * 0.9292 - paper.PIXEL_AUROC[paper.MVTEC[0]]) / 14
    assert (
        row[1:3] == ["0.900", f"{of_14:.3f}"]
        and row[4] == "0.500 (15)"
        and "printed 0.930" not in page_of(tmp_path).text
    )


def test_a_model_below_the_trivial_score_is_marked(run: Path) -> None:
    add_category(run, "bolt", pixel_auroc=0.55)
    assert page_of(run).row("bolt")[1] == "0.550 ▼" and page_of(run).row("nut")[1] == "0.900"
    add_category(run, "gear", pixel_ap=0.3)  # as good is not better
    assert page_of(run).row("gear")[1:5] == ["0.900", "0.600", "0.300 ▼", "0.300"]


def test_each_expert_has_columns_of_its_own(run: Path) -> None:
    assert "bank AUROC" not in render(read_run(run))
    each = {"pixel_auroc": 0.912, "pixel_ap": 0.345, "pixel_aupro": None}
    add_category(run, "bolt", experts=dict.fromkeys(("segmenter", "error", "bank"), each))
    text = render(read_run(run))
    assert "bank AUROC" in text and "segmenter AUPRO" in text and text.count("0.912") >= 3


@pytest.mark.parametrize("early", [True, False])
def test_early_stopping_is_told_and_drawn(run: Path, early: bool) -> None:
    assert "Pixel AP of synthetic anomalies" not in render(read_run(run))
    stopping = {"samples": 16, "score": 0.75, "scores": 3, "early": early, "source": "images held out"}
    folder = add_category(run, "bolt", stopping=stopping)
    scores = [{"event": "score", "step": n, "samples": 8 * n, "score": n / 4} for n in (1, 2, 3)]
    write_events(folder, {"event": "start", "step": 0, "samples": 0}, *(step(n) for n in (1, 2, 3)), *scores)
    text = render(read_run(run))
    assert f"{'Stopped' if early else 'Not stopped'} early: the weights are those after 16 samples" in text
    assert "the best of 3 scores (0.750) of synthetic anomalies on images held out." in text
    assert "Pixel AP of synthetic anomalies over samples" in text


def test_the_trivial_score_is_that_of_the_detector_that_is_better_at_it(run: Path) -> None:
    """Earlier versions took all metrics of the one with the better AUROC."""
    each = {"blur": {"pixel_auroc": 0.6, "pixel_ap": 0.3}, "mean_image": {"pixel_auroc": 0.5, "pixel_ap": 0.6}}
    add_category(run, "bolt", trivial={**each["blur"], "name": "blur", "each": each})
    assert page_of(run).row("bolt")[1:5] == ["0.900", "0.600", "0.500 ▼", "0.600"]


@pytest.mark.parametrize(
    ("metrics", "rule", "said"),
    [
        ({}, "nearest", "by nearest."),  # of a run of before there was a choice
        ({"mask_rule": "area", "small_components": 0}, "area", "by area."),
        ({"mask_rule": "area", "small_components": 3}, "area", "by area; of their components, 3 cover no pixel by half"),
        ({"mask_rule": "nearest", "small_components": 1}, "nearest", "by nearest; of their components, 1 under no pixel"),
    ],
)  # fmt: skip
def test_how_masks_were_resized_is_said(run: Path, metrics: dict[str, Any], rule: str, said: str) -> None:
    add_category(run, "bolt", **metrics)
    record = read_run(run)
    assert as_json(record)["categories"]["bolt"]["mask_rule"] == rule
    assert f"Masks at the network&#39;s resolution: {said}" in render(record)


def test_a_score_from_a_histogram_is_shown_with_its_bounds(run: Path) -> None:
    add_category(run, "bolt", pixel_auroc=0.5, bounds={"pixel_auroc": [0.0, 1.0], "pixel_ap": [0.4999, 0.5001]})
    page = page_of(run)
    assert page.row("bolt")[1] == "0.500 ± 0.500 ▼" and page.row("bolt")[3] == "0.500"
    assert page.row("mean, all")[1] == "0.700 ± 0.250" and "± 0.250, mean of 2" in page.text


def test_a_threshold_that_cannot_do_what_was_asked_says_so(run: Path) -> None:
    path = run / "nut" / "threshold.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warning": "No image is ever anomalous."}))
    assert "No image is ever anomalous." in page_of(run).text


def test_defects_without_a_mask_are_shown_as_such(run: Path) -> None:
    path = run / "nut" / "examples" / "examples.json"
    content = json.loads(path.read_text())
    content["examples"] = [content["examples"][0] | {"ap": None}]
    del content["examples"][0]["tiles"]["truth"]
    path.write_text(json.dumps(content))
    page = page_of(run)
    assert "best: 1 of 8 defects without a mask" in page.text
    assert [value for name, value in page.attributes if name == "alt"] == [
        "input", "reconstruction", "prediction", "mask"
    ]  # fmt: skip


def test_decisions_effort_and_settings_are_shown(run: Path) -> None:
    page = page_of(run)
    assert ["nut", "0.400", "0.123"] in [row[:3] for row in page.rows]
    assert ["nut", "64", "10.0", "1.5 min", "2", "–", "0", "0", "0"] in page.rows
    assert page.row("20261124-120000-abcdef")[1:5] == ["node-a", "2", "1", "2.0 min"]
    assert page.row("seed")[1] == "1,234" and page.row("code")[1] == "abc123"
    assert "seed = 1234" in page.text and '"stage": 1' in page.text


# --- the paper ---------------------------------------------------------------------------------------------------


def test_other_data_has_no_column_of_the_paper(run: Path) -> None:
    page = page_of(run)
    assert "paper" not in page.row("category") and "none of these categories is one of MVTec AD" in page.text


def test_the_warning_comes_with_the_column(tmp_path: Path) -> None:
    add_category(tmp_path, "carpet")
    page = page_of(tmp_path)
    assert page.row("category")[2] == "paper" and paper.WARNING in page.text and paper.DOI in page.text


def test_a_mean_that_the_paper_prints_is_shown_with_that_of_its_values(tmp_path: Path) -> None:
    for name in paper.MVTEC:
        add_category(tmp_path, name)
    page = page_of(tmp_path)
    assert page.row("mean, all")[2] == "0.9292 (printed 0.930)" and "paper 0.9292 (printed 0.930)" in page.text
    assert page.row("mean, textures")[2] == "0.9446 (printed 0.945)"
    assert page.row("mean, objects")[2].endswith("(printed 0.922)") and paper.MEANS in page.text
    assert as_json(read_run(tmp_path))["means"]["all"]["paper_printed"] == 0.93


def test_a_category_that_the_paper_has_not_leaves_the_mean_without_its_number(tmp_path: Path) -> None:
    for name in ("carpet", "wood", "brick"):
        add_category(tmp_path, name)
    page = page_of(tmp_path)
    assert [page.row(name)[2] for name in ("carpet", "wood", "brick")] == ["0.915", "0.945", "–"]
    assert page.row("mean, textures")[2] == "0.930" and page.row("mean, all")[2] == "–"


# --- what is missing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("nut/curves.json", "No curves of nut"),
        ("nut/threshold.json", "No thresholds of nut"),
        ("nut/examples/examples.json", "No pictures of nut"),
        ("nut/events.jsonl", "No losses of nut"),
        ("nut/metrics.json", "nut is not done: waiting"),
        ("config.toml", "config.toml is not in the run's folder"),
        ("deepspeed.json", "deepspeed.json is not in the run's folder"),
        ("code.json", "code.json is not in the run's folder"),
        ("log/20261124-120000-abcdef/rank-00000.jsonl", "No log of a launch"),
    ],
)
def test_what_is_missing_is_said(run: Path, file: str, said: str) -> None:
    assert not list(missing(read_run(run)))
    (run / file).unlink()
    assert said in page_of(run).text


@pytest.mark.parametrize(
    "content", [b"", b"[1, 2]", b"\xff\xfe", b'{"examples": 5}', b'{"examples": [5, {"tiles": [1]}]}']
)
@pytest.mark.parametrize(
    "file",
    [
        "nut/curves.json",
        "nut/threshold.json",
        "nut/examples/examples.json",
        "nut/events.jsonl",
        "config.toml",
        "code.json",
    ],
)
def test_a_damaged_file_is_as_good_as_none(run: Path, file: str, content: bytes) -> None:
    (run / file).write_bytes(content)
    assert page_of(run).row("nut")[1] == "0.900"


def test_curves_with_wrong_numbers_draw_what_they_can(run: Path) -> None:
    curves = {
        "roc": {"fpr": [0, 0.5, "x", None, 1], "tpr": [0, 0.5, 0.5, 0.7, float("nan")]},
        "pro": 5,
        "pr": {"recall": []},
    }
    (run / "nut" / "curves.json").write_text(json.dumps(curves))
    roc = Chart("ROC", "false positive rate", [Series("", [0, 0.5], [0, 0.5])]).svg()
    assert len(points(roc)) == 1 and roc in render(read_run(run))


def test_an_old_run_lacks_the_new_scores(run: Path) -> None:
    metrics = {
        key: value for key, value in METRICS.items() if key not in ("pixel_aupro", "pixel_f1_max", "pixel_iou_max")
    }
    (run / "nut" / "metrics.json").write_text(json.dumps(metrics))
    assert "No AUPRO, F1-max, IoU-max of nut: not defined there, or of an earlier version." in page_of(run).text


def test_a_tile_that_is_gone_leaves_the_others(run: Path) -> None:
    (run / "nut" / "examples" / "00-input.jpg").unlink()
    sources = [value for name, value in page_of(run).attributes if name == "src"]
    assert len(sources) == 8 * 5 - 1


def test_only_files_of_the_folder_are_embedded(run: Path) -> None:
    (run / "nut" / "secret.jpg").write_bytes(b"secret")
    path = run / "nut" / "examples" / "examples.json"
    path.write_text(path.read_text().replace("00-input.jpg", "../secret.jpg"))
    assert base64.b64encode(b"secret").decode() not in render(read_run(run))


def test_failed_attempts_and_rejected_steps_are_told(run: Path) -> None:
    rejected = [{"event": "rejected", "time": 1.0, "step": k, "reason": "the loss is a spike"} for k in range(1, 6)]
    write_events(run / "bolt", *rejected, step(6))
    add_attempt(run, "bolt", 1, 137, "ended by signal 9")
    add_attempt(run, "bolt", 2, 6, "20 steps in a row")
    text = page_of(run).text
    assert "bolt is not done: failed at 48 samples, exit code 6: 20 steps in a row" in text
    assert "Attempt 1 on node-a ended with exit code 137 after 1.0 min: ended by signal 9." in text
    assert "Step 1 was rejected: the loss is a spike." in text and "2 more steps were rejected" in text


def test_an_empty_folder_has_a_report_too(tmp_path: Path) -> None:
    assert "No category has left a trace yet." in page_of(tmp_path).text


# --- losses and charts -------------------------------------------------------------------------------------------


def test_steps_done_again_after_a_resume_replace_the_old_ones(tmp_path: Path) -> None:
    resume = {"event": "resume", "time": 2000.0, "step": 2, "samples": 16}
    old = [step(k, total=1.0) for k in (1, 2, 3, 4)] + [{"event": "rejected", "step": 3, "reason": "spike"}]
    history = read_history(write_events(tmp_path, *old, resume, *(step(k, total=9.0) for k in (3, 4))))
    assert [(e["step"], e["total"]) for e in history.steps] == [(1, 1.0), (2, 1.0), (3, 9.0), (4, 9.0)]
    assert history.rejected == [] and history.resumes == [16]


def test_resumes_that_were_undone_count_no_more(tmp_path: Path) -> None:
    resumes = [{"event": "resume", "step": k, "samples": 8 * k} for k in (2, 4, 3)]
    assert read_history(write_events(tmp_path, *resumes)).resumes == [16, 24]


def test_a_start_from_nothing_undoes_all(tmp_path: Path) -> None:
    history = read_history(
        write_events(tmp_path, step(1), step(2), {"event": "start", "step": 0, "samples": 0}, step(1))
    )
    assert [e["step"] for e in history.steps] == [1]


def test_a_line_that_a_crash_has_cut_is_left_out(tmp_path: Path) -> None:
    path = write_events(tmp_path, step(1), step(2))
    path.write_text(path.read_text()[:-9] + "\n" + json.dumps(step(3)) + "\n")
    assert [e["step"] for e in read_history(path).steps] == [1, 3]


def test_losses_are_means_over_the_finite_steps(tmp_path: Path) -> None:
    events = [step(k, total=value) for k, value in enumerate([1.0, 3.0, None, 5.0, None, None, 7.0], start=1)]
    history = read_history(write_events(tmp_path, *events))
    assert history.losses("total", 4) == ([16, 32, 48, 56], [2.0, 5.0, None, 7.0])
    assert history.losses("no such", 100)[1] == [None] * 7


def points(svg: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'points="([^"]*)"', svg)
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())] for text in found]


def test_a_line_runs_from_corner_to_corner() -> None:
    (line,) = points(Chart("t", "x", [Series("a", [0.0, 1.0], [0.0, 1.0])]).svg())
    assert line == [(48.0, 186.0), (312.0, 8.0)]


def test_what_is_not_a_number_interrupts_a_line() -> None:
    series = Series("a", [0.0, 0.1, 0.2, 0.3, 0.4], [0.1, 0.2, None, float("inf"), 0.5])
    assert [len(line) for line in points(Chart("t", "x", [series]).svg())] == [2, 1]


def test_a_line_is_cut_where_the_axis_ends() -> None:
    (line,) = points(Chart("t", "x", [Series("a", [0.0, 0.2, 0.4, 1.0], [0.0, 0.5, 1.0, 1.0])], x_max=0.3).svg())
    assert line[-1] == pytest.approx((312.0, 186 - 0.75 * 178), abs=0.1) and len(line) == 3


def test_decades_are_equally_far_apart() -> None:
    (line,) = points(Chart("t", "x", [Series("a", [0.0, 0.5, 1.0], [0.001, 0.01, 0.1])], log=True).svg())
    (_, a), (_, b), (_, c) = line
    assert a - b == pytest.approx(b - c, abs=0.2) and a > b > c


def test_a_loss_of_zero_lies_on_the_lower_edge() -> None:
    (line,) = points(Chart("t", "x", [Series("a", [0.0, 1.0], [1.0, 0.0])], log=True).svg())
    assert line[-1][1] == 186.0


def test_titles_of_charts_are_escaped() -> None:
    assert "<b>" not in Chart("<b>", "<b>", [Series("<b>", [0], [0])]).svg()


def test_numbers_on_axes_are_short() -> None:
    assert [compact(value) for value in (0, 0.15, 4000, 14_000_000, 12_500)] == ["0", "0.15", "4,000", "14M", "12.5k"]


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_writes_into_the_runs_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert f"{run / 'report.html'}: 0.0" in capsys.readouterr().out
    assert Page((run / "report.html").read_text()).row("nut")


def test_numbers_for_machines(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "elsewhere" / "r.html"
    assert main([str(run), "--json", "--out", str(out)]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["categories"]["nut"]["pixel_auroc"] == 0.9 and numbers["complete"] is True
    assert out.is_file() and not (run / "report.html").exists()


@pytest.mark.parametrize("where", [lambda p: p / "none", lambda p: p])
def test_a_folder_without_a_run_is_refused(
    where: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(where(tmp_path))]) == 3
    assert "no run in this folder" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_an_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--out", str(run / "nut")]) == 1
    assert "cannot be written" in capsys.readouterr().err
