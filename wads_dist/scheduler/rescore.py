"""A finished run scored again: ``launch/evaluate.py``, in one process."""

import json
from pathlib import Path

from rich.console import Console

from wads_dist.common.errors import ExitCode, ModelFileError, ResumeError
from wads_dist.common.files import write_text
from wads_dist.common.ranks import Ranks
from wads_dist.config.load import config_difference
from wads_dist.config.schema import Config, EvaluationConfig
from wads_dist.data.locate import chosen_categories, locate_shards
from wads_dist.evaluation.evaluate import evaluate
from wads_dist.model.weights import load_model, trained_config
from wads_dist.reporting.results import save_results
from wads_dist.runs.folder import CONFIG, METRICS
from wads_dist.runs.record import FREE_TO_CHANGE, Outcome, check_fingerprint, refuse_links
from wads_dist.scheduler.run import conclude
from wads_dist.shards.source import Dataset


def evaluate_run(config: Config) -> int:
    """Scores the finished categories of ``config.run.dir`` again, in this process, and rewrites their numbers.

    Raises:
        ModelFileError, ResumeError: a category that was named has no weights, or was trained with other settings or on other
            data; nothing is rewritten then.
        ConfigError: as ``refuse_links``.
    """
    config.require_data()
    dataset = Dataset.open(locate_shards(config.data), cache=config.data.cache)
    device = Ranks.from_environment().device
    categories = chosen_categories(config.data, dataset)
    if config.data.categories == ["all"]:
        categories = [c for c in categories if (config.run.dir / c / METRICS).is_file()]
    if not categories:
        raise ModelFileError(f"{config.run.dir}: no category has finished training; train it first")
    settings = {category: scoring_settings(config.run.dir / category, config) for category in categories}
    refuse_links(config.run.dir, categories)
    console = Console()
    for category in categories:
        check_fingerprint(config.run.dir / category / METRICS, dataset.manifest(category).fingerprint)
    for category, of in settings.items():
        path = config.run.dir / category / METRICS
        console.print(
            f"{category}: masks by {of.evaluation.mask_rule} (evaluation.mask_rule)", highlight=False, markup=False
        )
        model = load_model(path.parent, of, device)
        evaluation = evaluate(model, of, dataset, category, Ranks(0, 1, 0, 1, device))
        save_results(path.parent, category, evaluation, of.evaluation)
        metrics = json.loads(path.read_text())
        for key in ("bounds", "undefined", "no_threshold"):  # which an evaluation has or has not
            metrics.pop(key, None)
        write_text(path, json.dumps(metrics | evaluation.metrics, indent=1))
    conclude(config.run.dir, Outcome(), categories, console)
    return ExitCode.OK


def scoring_settings(folder: Path, config: Config) -> Config:
    """What to score a trained category with: ``config``, if it says how the model is scored only. Where it does not give
    ``evaluation.mask_rule``, masks are resized as they were for that model.

    Raises:
        ModelFileError: the category has no weights that this version reads.
        ResumeError: the settings would be of another model, or take images that it was trained on for ones held out.
    """
    trained = trained_config(folder)
    # An earlier version knew no holdout; its runs' settings, read today, have one that was not.
    if trained.evaluation.holdout == 0 or "holdout" not in trained.evaluation.model_fields_set:
        trained, config = (
            c.model_copy(update={"evaluation": c.evaluation.model_copy(update={"holdout": 0.0})})
            for c in (trained, config)
        )
    # Numbers of a run stay comparable: those of before the setting existed were by nearest.
    if "mask_rule" not in config.evaluation.model_fields_set:
        as_it_was = {"mask_rule": trained.evaluation.mask_rule}
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=as_it_was)})
    if config.trainer.find_batch_size:
        found = {"find_batch_size": False, "micro_batch_size": trained.trainer.micro_batch_size}
        config = config.model_copy(update={"trainer": config.trainer.model_copy(update=found)})
    free = (*FREE_TO_CHANGE, *(f"evaluation.{name}:" for name in EvaluationConfig.model_fields if name != "holdout"))
    changed = [line for line in config_difference(trained, config) if not line.startswith(free)]
    if changed:
        raise ResumeError(
            f"{folder} was trained with other settings (its value → yours):\n  "
            + "\n  ".join(changed)
            + f"\nGive those of {folder.parent / CONFIG}; of evaluation, all but holdout may be changed."
        )
    return config
