"""The names in a run's folder; README's table says what they are."""

CONFIG, DEEPSPEED, SUMMARY, CODE = "config.toml", "deepspeed.json", "summary.json", "code.json"
QUEUE, LOG = "queue", "log"
METRICS, EVENTS, REJECTED = "metrics.json", "events.jsonl", "rejected.jsonl"
WEIGHTS, THRESHOLD = "weights.safetensors", "threshold.json"
EXAMPLES, EXAMPLES_FILE = "examples", "examples.json"
