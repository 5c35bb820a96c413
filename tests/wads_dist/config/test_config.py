"""Configuration: precedence, refusals, the record of a run, and what is handed to DeepSpeed."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from wads_dist.common.errors import ConfigError
from wads_dist.config.deepspeed import deepspeed_config, resolve_precision, with_monitors, without_monitors
from wads_dist.config.load import config_difference, load_config, recorded_config
from wads_dist.config.presets import PRESETS
from wads_dist.config.schema import Config, all_settings, resolve_batches

REPOSITORY = Path(__file__).resolve().parents[3]


def problems_of(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    return str(caught.value)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# --- precedence ---


def test_command_line_over_file_over_preset_over_default(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.toml", 'preset = "paper_literal"\n[objective.kl]\nrho = 0.2\n[trainer]\nseed = 3\nlog_every = 7\n'
    )
    config = load_config(["--config", file, "--trainer.seed", "5"])
    assert config.trainer.seed == 5  # command line
    assert config.trainer.log_every == 7  # file
    assert config.objective.kl.rho == 0.2  # file, over the preset's 0.1
    assert config.objective.kl.form == "pixel"  # preset
    assert config.checkpoint.keep == 2  # default


def test_preset_on_the_command_line_replaces_the_files(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", 'preset = "paper_literal"\n')
    assert load_config(["--config", file, "--preset", "wads"]).objective.focal.gamma == 2.0


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_real_settings(preset: str) -> None:
    config = load_config(["--preset", preset])
    for path, value in PRESETS[preset].items():
        node = config
        for name in path.split("."):
            node = getattr(node, name)
        assert node == value


def test_forms_of_a_value() -> None:
    config = load_config(
        "--trainer.seed=4 --data.categories a,b --synthesis.scale [0.5,0.9] --trainer.deterministic "
        "--model.segmenter_gradient false --trainer.threads none --trainer.learning-rate 2e-3 --local_rank=1".split()
    )
    assert config.trainer.seed == 4
    assert config.data.categories == ["a", "b"]
    assert config.synthesis.scale == (0.5, 0.9)
    assert config.trainer.deterministic is True
    assert config.model.segmenter_gradient is False
    assert config.trainer.threads is None
    assert config.trainer.learning_rate == 2e-3


@pytest.mark.parametrize("argv", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"], ["--local-rank", "1"]])
def test_the_launchers_local_rank_is_ignored(argv: list[str]) -> None:
    assert load_config(argv) == Config()


def test_none_clears_what_the_file_sets(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", "[checkpoint]\nevery_steps = 5\n")
    assert load_config(["--config", file, "--checkpoint.every_steps", "none"]).checkpoint.every_steps is None


@pytest.mark.parametrize(
    "in_file, given, cleared", [("root", "data.shards", "root"), ("shards", "data.root", "shards")]
)
def test_a_data_source_on_the_command_line_replaces_the_files(
    tmp_path: Path, in_file: str, given: str, cleared: str
) -> None:
    file = write(tmp_path / "c.toml", f'[data]\n{in_file} = "x"\n')
    config = load_config(["--config", file, f"--{given}", "y"])
    assert getattr(config.data, cleared) is None
    config.require_data()


@pytest.mark.parametrize("named", ["resolved", "of a run"])
def test_what_was_written_before_a_setting_existed_means_what_was_trained(tmp_path: Path, named: str) -> None:
    """Eq 3.6 was the reverse of what is printed; a person's file that leaves it out gets today's default."""
    text = "".join(line for line in Config().to_toml().splitlines(True) if not line.startswith("direction"))
    assert recorded_config(text).objective.kl.direction == "reverse"
    if named == "of a run":  # of a version that did not yet write ``resolved``
        text = text.replace("resolved = true\n", "")
        write(tmp_path / "code.json", "{}")
    file = write(tmp_path / "config.toml", text)
    assert load_config(["--config", file]).objective.kl.direction == "reverse"
    assert load_config(["--config", file, "--objective.kl.direction", "printed"]).objective.kl.direction == "printed"
    own = write(tmp_path / "own.toml", "[objective.kl]\nrho = 0.1\n")
    assert load_config(["--config", own]).objective.kl.direction == "printed"


def test_a_setting_that_is_gone_is_read_past_in_a_record_and_refused_of_a_person(tmp_path: Path) -> None:
    record = Config().to_toml().replace("[evaluation]", '[evaluation]\nthreshold = "synthetic"')
    assert recorded_config(record) == load_config(["--config", write(tmp_path / "config.toml", record)]) == Config()
    with pytest.raises(
        ConfigError, match=r"evaluation\.threshold: unknown setting; a threshold comes from normal images"
    ):
        load_config(["--evaluation.threshold", "normal"])


def test_presets_and_eq_3_6() -> None:
    assert {load_config(["--preset", preset]).objective.kl.direction for preset in PRESETS} == {"printed"}


# --- refusals ---


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--trainer.globl_batch_size 5", "trainer.globl_batch_size: unknown setting; did you mean trainer.global_b"),
        ("--trainer.gamma 5", "trainer.gamma: unknown setting; did you mean objective.focal.gamma?"),
        ("--zzz", "zzz: unknown setting; --help lists the settings (command line)"),
        ("--trainer.precision fp8", "trainer.precision: got 'fp8'; allowed: auto, bf16, fp16, fp32 (command line)"),
        ("--trainer.seed x", "trainer.seed: got 'x'; allowed: a whole number, at least 0"),
        ("--trainer.seed", "trainer.seed: needs a value"),
        ("--trainer 5", "trainer: is a section"),
        ("--trainer.seed.x 5", "trainer.seed: got {'x': '5'}"),
        ("stray", "stray: unexpected argument"),
        ("--preset best", "preset: got 'best'; allowed: wads, paper_literal, wads_plus"),
        ("--data.image_size 96", "data.image_size: got '96'; must be a power of two"),
        ("--data.categories all,a", "data.categories: got 'all,a'; \"all\" cannot be mixed with names"),
        ("--data.categories a,a", "given more than once: a"),
        ("--data.categories ,", "give category names"),
        ("--model.weights x.bin", "ends in .pth or .safetensors"),
        ("--evaluation.score_window 4", "evaluation.score_window: got '4'; must be odd"),
        ("--trainer.betas 0.5,1", "trainer.betas: got '0.5,1'; both betas"),
        ("--trainer.learning_rate nan", "trainer.learning_rate: got 'nan'"),
        ("--trainer.ema 1", "trainer.ema: got '1'; allowed: a number, at least 0, below 1"),
        # contradictions
        ("--data.root a --data.shards b", "give one of them, not both"),
        ("--data.store_size 64", "data.image_size 128 is larger than data.store_size 64"),
        ("--trainer.micro_batch_size 128", "trainer.micro_batch_size 128: does not divide trainer.global_batch_size"),
        ("--trainer.micro_batch_size 7", "trainer.micro_batch_size 7: does not divide trainer.global_batch_size 64"),
        ("--model.freeze_batchnorm", "model.freeze_batchnorm true: needs loaded statistics, but model.weights is ran"),
        ("--synthesis.scale 0.9,0.8", "synthesis.scale 0.9,0.8: must be min,max"),
        ("--synthesis.scale 0,0.8", "must be min,max"),
        ("--synthesis.scale 0.5,1.1", "must be min,max"),
        ("--trainer.samples 63", "trainer.samples 63: less than one step"),
        ("--evaluation.score_window 129", "larger than data.image_size 128"),
    ],
)
def test_refused(argv: str, expected: str) -> None:
    assert expected in problems_of(*argv.split())


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", "[trainer]\nsede = 1\nsamples = -1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", file, "stray", "--model.latent", "x"])
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert f"trainer.sede: unknown setting; did you mean trainer.seed? ({file})" in text
    assert "model.latent: got 'x'" in text


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    assert f"cannot read {tmp_path / 'no.toml'}" in problems_of("--config", str(tmp_path / "no.toml"))


def test_a_file_that_is_not_toml_is_named_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "bad.toml", "[trainer]\nseed = 1\nsamples = = 2\n")
    text = problems_of("--config", file)
    assert file in text and "line 3" in text


def test_no_data_is_refused_only_when_it_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"give --data\.root"):
        load_config([]).require_data()


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Config().trainer.seed = 1  # type: ignore[misc]


# --- help ---


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--help", "--nonsense"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert len(all_settings()) > 50
    for path, field in all_settings().items():
        assert f"--{path} " in text
        assert field.description and field.description.split()[0] in text
    assert max(map(len, text.splitlines())) <= 120


# --- the record of a run ---


def test_written_configuration_reads_back(tmp_path: Path) -> None:
    config = load_config(
        ["--preset", "paper_literal", "--data.root", 'odd "name" \\ \t Grün\x7f', "--trainer.learning_rate", "1.5e-07"]
        + ["--data.categories", "a,b", "--trainer.micro_batch_size", "8", "--objective.focal.gamma", "3"]
    )
    file = write(tmp_path / "config.toml", config.to_toml())
    assert tomllib.loads(config.to_toml())["trainer"]["micro_batch_size"] == 8
    assert load_config(["--config", file]) == config


def test_a_record_does_not_follow_its_preset(tmp_path: Path) -> None:
    """A setting that a preset was given later is none of the run's; on the command line the preset means today's."""
    written = load_config(["--preset", "wads_plus"]).to_toml()
    older = write(tmp_path / "config.toml", re.sub("smoothing = .*\n", "", written))
    assert load_config(["--config", older]).model.smoothing == 0
    assert load_config(["--config", older]).experts.error > 0
    assert load_config(["--config", older, "--preset", "wads_plus"]).model.smoothing > 0
    own = write(tmp_path / "own.toml", 'preset = "wads_plus"\n')
    assert load_config(["--config", own]).model.smoothing > 0


def test_settings_that_may_be_absent_are_absent_by_default() -> None:
    # to_toml leaves None out, so a default or preset other than None would come back on reading.
    config = Config()
    for path, field in all_settings().items():
        if "None" in str(field.annotation):
            assert field.default is None, path
            assert all(path not in preset for preset in PRESETS.values())
    assert config_difference(config, load_config([])) == []


def test_difference_names_path_and_both_values() -> None:
    other = load_config("--trainer.seed 1 --data.categories a,b --trainer.threads 2".split())
    assert config_difference(Config(), other) == [
        "data.categories: all → a,b",
        "trainer.seed: 0 → 1",
        "trainer.threads: none → 2",
    ]


# --- batches ---


@pytest.mark.parametrize(
    "total, micro, world, expected",
    [(64, None, 1, (64, 1)), (64, None, 4, (16, 1)), (64, 8, 2, (8, 4)), (48, 16, 3, (16, 1)), (64, 64, 1, (64, 1))],
)
def test_batches(total: int, micro: int | None, world: int, expected: tuple[int, int]) -> None:
    config = load_config([f"--trainer.global_batch_size={total}", f"--trainer.micro_batch_size={micro}"])
    assert resolve_batches(config.trainer, world) == expected


@pytest.mark.parametrize("micro, world", [("none", 3), ("32", 4), ("64", 2)])
def test_batches_that_do_not_divide(micro: str, world: int) -> None:
    config = load_config(["--trainer.micro_batch_size", micro])
    with pytest.raises(ConfigError, match="global_batch_size"):
        resolve_batches(config.trainer, world)


# --- the files we ship ---


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_shipped_file_loads(path: Path) -> None:
    config = load_config(["--config", str(path)])
    assert resolve_batches(config.trainer, 2)[1] == 1
    assert deepspeed_config(config.trainer, 2)["zero_optimization"]["stage"] in (0, 1)


def test_paper_literal_file_uses_its_preset() -> None:
    config = load_config(["--config", str(REPOSITORY / "configs/mvtec_paper_literal.toml")])
    assert config == load_config(["--preset", "paper_literal", "--run.dir", "runs/mvtec_paper_literal"])


# --- DeepSpeed ---


@pytest.mark.parametrize("stage", range(4))
def test_shipped_deepspeed_file(stage: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # found in the repository from anywhere
    config = load_config(
        f"--trainer.deepspeed configs/deepspeed/zero{stage}.json --trainer.micro_batch_size 8".split()
        + ["--trainer.gradient_clipping", "0.5"]
    )
    settings = deepspeed_config(config.trainer, 2)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["train_batch_size"] == 64
    assert settings["train_micro_batch_size_per_gpu"] == 8
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.5
    # Precision is the networks' and the trainer's: a block here would scale the loss twice, or convert BatchNorm.
    assert not {"optimizer", "bf16", "fp16", "torch_autocast"} & settings.keys()


@pytest.mark.parametrize("of_file", range(4))
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_another_stage_than_the_files_may_be_asked_for(of_file: int, stage: int) -> None:
    config = load_config(["--trainer.deepspeed", f"configs/deepspeed/zero{of_file}.json"])
    zero = deepspeed_config(config.trainer, 1, stage)["zero_optimization"]
    assert zero["stage"] == stage
    assert zero.get("compute_grad_norm") is (False if stage == 1 else None)  # where DeepSpeed takes it


def test_clipping_is_always_written_because_deepspeeds_default_is_not_off() -> None:
    assert deepspeed_config(Config().trainer, 1)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("stage", "clipping", "off"), [(1, "0", True), (2, "0", True), (1, "0.5", False), (3, "0", False)]
)
def test_no_norm_is_computed_that_nobody_uses(stage: int, clipping: str, off: bool) -> None:
    """DeepSpeed would wait for it; it refuses to go without where it clips, and at ZeRO-3."""
    file = f"configs/deepspeed/zero{stage}.json"
    config = load_config(["--trainer.deepspeed", file, "--trainer.gradient_clipping", clipping])
    assert (deepspeed_config(config.trainer, 2)["zero_optimization"].get("compute_grad_norm") is False) == off


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"train_batch_size": 32}, "train_batch_size is 32, but trainer.global_batch_size makes it 64"),
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu is 2"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but trainer.gradient_clipping makes it 0.0"),
        ({"optimizer": {"type": "Adam"}}, "optimizer does not belong here"),
        ({"scheduler": {}}, "scheduler does not belong here"),
        ({"fp16": {"enabled": True}}, "fp16.enabled does not belong here: use trainer.precision"),
        ({"bf16": {"enabled": True}}, "bf16.enabled does not belong here"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled does not belong here"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4"),
        ({"zero_optimization": 1}, "zero_optimization is 1; must be an object"),
        (
            {"zero_optimization": {"stage": 3, "compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm is false",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer is not supported",
        ),
        ([], "must hold a JSON object"),
    ],
)
def test_deepspeed_file_that_contradicts(content: object, expected: str, tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(load_config(["--trainer.deepspeed", file]).trainer, 2)
    assert expected in str(caught.value) and file in str(caught.value)


def test_deepspeed_is_not_told_to_clip_by_a_norm_it_may_not_take(tmp_path: Path) -> None:
    zero = {"stage": 1, "compute_grad_norm": False}
    file = write(tmp_path / "ds.json", json.dumps({"zero_optimization": zero}))
    assert deepspeed_config(load_config(["--trainer.deepspeed", file]).trainer, 2)["zero_optimization"] == zero
    with pytest.raises(ConfigError, match=r"ds\.json: zero_optimization\.compute_grad_norm is false"):
        deepspeed_config(load_config(["--trainer.deepspeed", file, "--trainer.gradient_clipping", "1"]).trainer, 2)


def test_deepspeed_file_that_agrees(tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", json.dumps({"train_batch_size": 64, "fp16": {"enabled": False}}))
    assert deepspeed_config(load_config(["--trainer.deepspeed", file]).trainer, 2)["train_batch_size"] == 64


def test_deepspeed_file_that_is_not_json_is_named_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", '{\n"a": 1,\n}')
    with pytest.raises(ConfigError, match=r"ds\.json line 3"):
        deepspeed_config(load_config(["--trainer.deepspeed", file]).trainer, 1)


def test_deepspeed_file_that_is_absent() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.deepspeed: no file none\.json"):
        deepspeed_config(load_config(["--trainer.deepspeed", "none.json"]).trainer, 1)


def test_precision_on_a_cpu() -> None:
    assert resolve_precision("auto", "cpu") in ("bf16", "fp32")
    assert resolve_precision("fp32", "cpu") == "fp32"
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        resolve_precision("fp16", "cpu")


def test_every_category_has_monitors_of_its_own(tmp_path: Path) -> None:
    settings = {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True, "output_path": "elsewhere"}, "x": 1}
    mine = with_monitors(settings, tmp_path / "monitor", "nut")
    assert mine["tensorboard"] == {"enabled": True, "output_path": str(tmp_path / "monitor"), "job_name": "nut"}
    assert mine["csv_monitor"] == {"enabled": True, "output_path": "elsewhere", "job_name": "nut"}
    assert with_monitors({"csv_monitor": {"enabled": False}}, tmp_path, "nut") == {"csv_monitor": {"enabled": False}}
    assert without_monitors(settings) == {"x": 1} and "job_name" not in settings["tensorboard"]


def test_shipped_files_are_found_from_any_folder_and_ones_own_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(["--config", "configs/demo.toml", "--data.shards", "x"])
    assert config.data.image_size == 64
    assert deepspeed_config(config.trainer, 2)["zero_optimization"]["stage"] in (0, 1, 2, 3)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.toml").write_text("[data]\nimage_size = 128\n")
    assert load_config(["--config", "configs/demo.toml"]).data.image_size == 128
    with pytest.raises(ConfigError, match=r"cannot read configs/none\.toml"):
        load_config(["--config", "configs/none.toml"])
