#!/usr/bin/env bash
# What a GPU has to say, the most valuable first: two parts of seven minutes each, installing nothing. Every step has a limit of its
# own and keeps no later one from running; measurements write after each row, tests when they end. The exit status tells of those
# that failed.
#
#   benchmarks/gpu.sh [PYTHON [PART [FOLDER]]]
#     PYTHON  an interpreter with torch, deepspeed and the rest (python3); packages in PYTHONPATH are kept
#     PART    1: are the kernels right, how fast, what does a step cost; 2: real training, torch.compile, sharing a GPU; default: both
#     FOLDER  for all results (benchmarks/results/gpu)
#   WADS_REAL_DATA=DIR  the folder of hazelnut_toy/ and cookies/; without it part 2 trains the demo's categories
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
unset TRITON_INTERPRET DS_ACCELERATOR
python=$(command -v "${1:-python3}") || { echo "there is no ${1:-python3}" >&2; exit 1; }
parts=${2:-1 2}
out=${3:-benchmarks/results/gpu}
case $parts in 1 | 2 | "1 2") ;; *) echo "PART is 1 or 2, not '$parts'" >&2; exit 1 ;; esac
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "torch sees no GPU here")' || exit 1
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT || exit 1
export WADS_RESULTS=$out
# What was compiled before, perhaps on a machine without a GPU and taken along, is not compiled again.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.triton-cache} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/.triton-cache/inductor}
export PATH="$(dirname "$python"):$PATH" # torch's extension builder looks for ninja there
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 COLUMNS=150

minutes=7 failed=() began=$SECONDS
step() { # NAME SECONDS COMMAND...: no longer than what is left of the part's time
  local start=$SECONDS code=0 left=$((began + minutes * 60 - SECONDS))
  [ "$left" -ge 10 ] || { echo "== $1: no time left" | tee -a "$log"; failed+=("$1 (no time left)"); return; }
  left=$((left < $2 ? left : $2))
  echo "== $1 (at $((start - began)) s, limit $left s)" | tee -a "$log"
  timeout -s "${signal:-TERM}" -k 5 "$left" "${@:3}" >"$work/step.log" 2>&1 || code=$?
  cat "$work/step.log" >>"$log"
  tail -n 45 "$work/step.log" | cut -c1-170
  echo "-- $1: exit status $code, $((SECONDS - start)) s" | tee -a "$log"
  [ "$code" -eq 0 ] || failed+=("$1 (exit status $code)")
}
kernels() { # NAME SECONDS BATCH... CONTESTANT...
  local name=$1 seconds=$2 batches=()
  shift 2
  while [[ $1 =~ ^[0-9]+$ ]]; do batches+=("$1"); shift; done
  step "kernels: $name" "$seconds" "$python" launch/profile_kernels.py --kernel "${name%%,*}" --dtype fp32 bf16 --batch "${batches[@]}" \
    --layout channels_last contiguous --seconds 0.15 --no-compiled --json "$out/kernels-${name//, /-}.json" \
    --csv "$out/kernels-${name//, /-}.csv" --only "$@"
}
train() { # NAME SECONDS ARGUMENT...
  step "train $1" "$2" "$python" -m deepspeed.launcher.runner launch/train.py --run.dir "$work/runs/$1" "${@:3}"
  (cd "$work/runs" && find "$1" \( -name metrics.json -o -name summary.json -o -name events.jsonl -o -name samples.png \
    -o -name report.html -o -name config.toml -o -name code.json \) -print0 | tar czf "$out/$1.tgz" --null -T -)
}

tests() { # NAME SECONDS EXPRESSION: pytest ends itself, and so writes what it knows
  # One after the other, Triton's compilations alone would take minutes; processes share the GPU where pytest-xdist is there.
  "$python" -c "import xdist, pytest_timeout" 2>/dev/null && local many="-n 6 --timeout $2" || local many=
  signal=INT step "$1" "$2" "$python" -m pytest -q -m gpu -k "$3" $many -p no:cacheprovider --durations 8 \
    --junitxml "$out/${1// /-}.xml" tests
}

part_1() {
  command -v nvidia-smi >/dev/null && step "device" 20 nvidia-smi \
    --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.sm,power.limit --format=csv
  step "versions" 40 "$python" -c 'import json; from wads_dist.runs.record import code_version; print(json.dumps(code_version()))'
  tests "tests" 150 "not compile"
  # What kernels compile to needs no GPU, and compiled PyTorch is a peer for part 2.
  kernels "objective" 110 64 256 triton "triton, two rows" "triton, bands of 64" "triton, two rows, bands of 64" torch fussim \
    "pytorch-msssim + torchvision"
  step "step of ResNet-50" 75 "$python" launch/profile_step.py --config configs/mvtec.toml --data.shards none --steps 15 \
    --trainer.global_batch_size 256 --json "$out/step-resnet50.json"
  kernels "synthesis" 60 64 256 triton torch
  # What binds a kernel: issue slots, L1, L2 writes, or waiting?
  command -v ncu >/dev/null && step "counters" 75 ncu --clock-control none -k "regex:objective_.*|_prepare_kernel|_pixel_kernel|group_norm_.*" \
    --set full --csv --page details --log-file "$out/counters.csv" "$python" benchmarks/each_kernel_once.py
}

part_2() {
  if [ -d "${WADS_REAL_DATA:-}" ]; then
    # Two sets at once on one GPU: accuracy at a budget that no CPU can pay.
    train photographs 200 --config configs/hazelnut.toml --data.root "$WADS_REAL_DATA" --data.categories hazelnut_toy,cookies \
      --parallel.categories_per_gpu 2 --trainer.samples 200000 --trainer.global_batch_size 64
  else
    step "demo shards" 60 "$python" -m shards demo --out "$work/demo" --categories 2
    train demo 150 --config configs/demo.toml --data.shards "$work/demo" --data.cache "$work/cache"
  fi
  for batch in 256 64; do
    step "step beside plain PyTorch, batch $batch" 120 "$python" benchmarks/training_step.py --backbones resnet50 --batch $batch \
      --rounds 8 --compile graph default --json "$out/training-step-$batch.json"
  done
  step "one and four categories" 75 "$python" benchmarks/categories_per_gpu.py --samples 1600 --at-once 4 1 \
    --json "$out/categories.json"
  tests "compiled tests" 120 "compile"
  kernels "objective, compiled" 60 256 triton torch.compile
}

for part in $parts; do
  log=$out/log-$part.txt
  : >"$log"
  began=$SECONDS
  "part_$part"
  echo "== part $part: $((SECONDS - began)) s, results in $out" | tee -a "$log"
done
[ ${#failed[@]} -eq 0 ] && exit 0
printf '== failed: %s\n' "${failed[@]}" >&2
exit 1
