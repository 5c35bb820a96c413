"""The names in a run's folder; README's table says what they are."""

METRICS, QUEUE = "metrics.json", "queue"


CONFIG, DEEPSPEED, SUMMARY, CODE = "config.toml", "deepspeed.json", "summary.json", "code.json"


EXAMPLES, EXAMPLES_FILE = "examples", "examples.json"


EVENTS = "events.jsonl"


WEIGHTS, THRESHOLD = "weights.safetensors", "threshold.json"


REJECTED = "rejected.jsonl"


LOG = "log"
