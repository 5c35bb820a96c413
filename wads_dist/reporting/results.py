"""What is written of an evaluation besides its numbers: pictures, curves, and the threshold beside and in the weights."""

import json
from pathlib import Path

from wads_dist.common.files import write_text
from wads_dist.config.schema import EvaluationConfig
from wads_dist.evaluation.evaluate import Evaluation, save_threshold
from wads_dist.reporting.figures import save_examples, save_samples
from wads_dist.runs.folder import CURVES, SAMPLES


def save_results(folder: Path, category: str, evaluation: Evaluation, settings: EvaluationConfig) -> None:
    """Writes all of it into the category's folder, replacing that of an earlier evaluation."""
    save_samples(folder / SAMPLES, category, evaluation)
    save_examples(folder, category, evaluation, settings.score_window)
    save_threshold(folder, evaluation.threshold, settings)
    write_text(folder / CURVES, json.dumps(evaluation.curves))
