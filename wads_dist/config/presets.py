"""Starting values by name, as data; docs/recipe.md says what each is worth."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "wads": {},
    "wads_plus": {
        "model.smoothing": 1.0,
        "experts.error": 0.5,
    },
    "wads_features": {
        "model.features": "efficientnet_lite0",
        "model.smoothing": 1.0,
        "experts.error": 1.0,
    },
    "paper_literal": {
        "objective.focal.gamma": 0.1,
        "objective.kl.form": "pixel",
        "objective.kl.weight": 1.0,
        "objective.kl.rho": 0.1,
        "objective.latent.detach": False,
        "objective.reconstruction.target": "input",
        "trainer.learning_rate": 1e-4,
        "trainer.samples": 14_000_000,  # 700 epochs of 20,000
        "evaluation.holdout": 0.0,  # it trains on all normal images
    },
}
