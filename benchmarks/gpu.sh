#!/usr/bin/env bash
# Everything that needs a GPU, installing nothing: the GPU tests, the kernels' throughput beside the peers that are installed,
# and short training runs. A step that fails does not keep the later ones from running; the exit status tells of it.
#
#   benchmarks/gpu.sh [PYTHON]    PYTHON: an interpreter with torch, deepspeed and the rest (python3)
#   WADS_REAL_DATA=DIR            trains on DIR/hazelnut_toy as well
set -uo pipefail
cd "$(dirname "$0")/.."
unset TRITON_INTERPRET DS_ACCELERATOR
python=$(command -v "${1:-python3}") || { echo "there is no ${1:-python3}" >&2; exit 1; }
export PATH="$(dirname "$python"):$PATH" # torch's extension builder looks for ninja there

device=$("$python" - <<'END'
import re, sys, torch
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU here")
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))
END
) || exit 1

failed=()
step() { # NAME COMMAND...
  echo "== $1"
  "${@:2}" || failed+=("$1 (exit status $?)")
}
train() { # NAME ARGUMENT...: into an empty folder
  rm -rf "runs/gpu-$1"
  step "train $1" "$python" -m deepspeed.launcher.runner launch/train.py --run.dir "runs/gpu-$1" "${@:2}"
}

mkdir -p benchmarks/results
step "tests" "$python" -m pytest -m gpu tests
step "kernels" "$python" launch/profile_kernels.py --json "benchmarks/results/$device.json" --plot "benchmarks/results/$device.png"
for backbone in resnet18 resnet50; do
  step "step of $backbone" "$python" launch/profile_step.py --config configs/mvtec.toml --model.backbone $backbone \
    --trainer.global_batch_size 256 --json "benchmarks/results/$device-step-$backbone.json"
done
PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" step "step beside plain PyTorch" "$python" benchmarks/training_step.py --batch 128 --rounds 20 \
  --compile default reduce-overhead \
  --json "benchmarks/results/$device-training-step.json"
step "demo shards" "$python" -m shards demo --out .data/demo --categories 2
train demo --config configs/demo.toml
# PYTHONPATH: the checkout is not installed there.
PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" step "categories on one GPU" "$python" benchmarks/categories_per_gpu.py --samples 8000 \
  --json "benchmarks/results/$device-categories.json"
if [ -d "${WADS_REAL_DATA:-}" ]; then
  train hazelnut --config configs/hazelnut.toml --data.root "$WADS_REAL_DATA"
fi

[ ${#failed[@]} -eq 0 ] && { echo "== all steps passed"; exit 0; }
printf '== failed: %s\n' "${failed[@]}" >&2
exit 1
