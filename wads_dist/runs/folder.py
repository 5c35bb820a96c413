"""The names in a run's folder; README's table says what they are (``tests/wads_dist/runs/test_folder.py``)."""

# Of the run
CONFIG, DEEPSPEED, CODE, SUMMARY = "config.toml", "deepspeed.json", "code.json", "summary.json"
REPORT, QUEUE, LOG, MONITOR = "report.html", "queue", "log", "monitor"

# Of a category
METRICS, EVENTS, REJECTED, BATCH_SIZE = "metrics.json", "events.jsonl", "rejected.jsonl", "batch_size.json"
WEIGHTS, THRESHOLD, CURVES, CHECKPOINTS = "weights.safetensors", "threshold.json", "curves.json", "checkpoints"
SAMPLES, EXAMPLES, EXAMPLES_FILE = "samples.png", "examples", "examples.json"
