#!/usr/bin/env bash
# Trains on this machine with one process a GPU (or as many as NPROC says); every argument goes to titan-train.
#
#   scripts/run_train.sh --config llama3_8b --data.source texts/ --data.tokenizer tokenizer/
#   NPROC=2 scripts/run_train.sh --training.steps 20
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${NPROC:-}" ]; then
  NPROC=$(uv run python -c "import torch; print(max(1, torch.cuda.device_count()))")
fi
# Told to end, torchrun kills workers that have not ended by themselves: they need time for a step and a save.
exec uv run torchrun --shutdown-timeout "${SHUTDOWN_TIMEOUT:-600}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --standalone \
  --nproc-per-node "$NPROC" -m titan_train "$@"
