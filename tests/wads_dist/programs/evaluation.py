"""``evaluate`` as real ranks: arguments are the shards and, for each evaluation, "exact|histogram
[FROZEN_NETWORK]"; prints a line of JSON for each, floats to the last bit."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist

from tests.wads_dist.programs.common import leave, small_config
from wads_dist.common.ranks import Ranks
from wads_dist.evaluation.calibration import fit_experts
from wads_dist.evaluation.evaluate import evaluate
from wads_dist.model.features import load_network
from wads_dist.model.networks import Wads
from wads_dist.shards.source import Dataset

if __name__ == "__main__":
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    for setting in sys.argv[2:]:
        metrics, *frozen = setting.split()
        config = small_config(
            *(
                f"--model.features {frozen[0]} --features.size 64 --features.patches 200 --experts.error 1".split()
                if frozen
                else ()
            ),
            *f"--evaluation.metrics {metrics} --evaluation.batch_size 3".split(),
            *"--evaluation.bins 64 --evaluation.pixel_false_positive_rate 0.2".split(),
        )
        torch.manual_seed(0)
        model = Wads(config.model, 64).eval()
        dataset, ranks = Dataset.open(sys.argv[1]), Ranks.from_environment()
        if frozen:
            network = None if frozen == ["none"] else load_network(frozen[0])[0]
            model.experts = fit_experts(model, network, config, dataset, "demo_biscuit", ranks)
        result = evaluate(model, config, dataset, "demo_biscuit", ranks)
        shown = [result.test.keys, result.predictions.code.tolist(), result.predictions.probability.sum().item()]
        print(
            json.dumps(
                {
                    "metrics": result.metrics,
                    "curves": result.curves,
                    "threshold": asdict(result.threshold) if result.threshold else None,
                    "shown": shown if result.test.keys else [],
                }
            )
        )
    leave()
