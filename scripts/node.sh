#!/usr/bin/env bash
# One node's part of a run: what slurm.sh, ssh.sh, skypilot.yaml and kubernetes.yaml start on each of them.
#
#   NNODES=2 ENDPOINT=node-a:29500 scripts/node.sh runs/8b --config llama3_8b --data.source texts/ --data.tokenizer tokenizer/
#
# The first argument is the run directory, the others go to titan-train. What titan needs is in .venv or on the PATH.
# SIGTERM, SIGUSR1, SIGINT and SIGHUP save and end the run on all nodes. Exit codes: 0 finished, 75 preempted (the same
# command goes on), 1 failed.
#
#   NNODES            nodes, or MIN:MAX: with fewer than MAX it goes on from the newest checkpoint, on those that are left
#   ENDPOINT          HOST:PORT where the nodes meet, on one of them
#   RUN_ID            what they ask for there; another one for each start
#   NPROC             processes on this node; default: one a GPU, or one without a GPU
#   MAX_RESTARTS      how often the processes are started again after a failure; default: 3
#   SHUTDOWN_TIMEOUT  seconds that a step and a save may take once a signal has come; default: 600
#   END_WITH_STDIN    if set, the end of standard input counts as a signal
#   SIGNALS_REACH_ALL if set, whoever signals this script signals torchrun too, as Slurm does
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
. scripts/wait_for.sh || exit 1
# shellcheck source=/dev/null
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
run=${1:?the run directory is missing, e.g. scripts/node.sh runs/8b --config llama3_8b}
shift

if [ -z "${NPROC:-}" ]; then
  NPROC=$(python -c "import torch; print(max(1, torch.cuda.device_count()))") || exit 1
fi
before=$(cat "$run/status.json" 2>/dev/null)
# A second signal ends torchrun while its workers still save, so it is told once: it gets a process group of its own,
# since a terminal signals the whole group of this script.
set -m
python -m torch.distributed.run --nnodes "${NNODES:?}" --nproc-per-node "$NPROC" \
  --max-restarts "${MAX_RESTARTS:-3}" --shutdown-timeout "${SHUTDOWN_TIMEOUT:-600}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --rdzv-backend c10d --rdzv-endpoint "${ENDPOINT:?}" --rdzv-id "${RUN_ID:-titan}" \
  -m titan_train --output "$run" "$@" </dev/null &
torchrun=$!
set +m
signalled=''
listener=''
# shellcheck disable=SC2329  # the trap calls it
end() {
  interrupted=1
  [ -n "$signalled${SIGNALS_REACH_ALL:-}" ] || kill -TERM "$torchrun" 2>/dev/null
  signalled=1
}
trap end TERM USR1 INT HUP
if [ -n "${END_WITH_STDIN:-}" ]; then
  exec 3<&0
  (while read -r _; do :; done <&3; kill -TERM $$) >/dev/null 2>&1 &
  listener=$!
fi
wait_for "$torchrun"
code=$?
[ -z "$listener" ] || kill "$listener" 2>/dev/null

# torchrun ends with 1 if it was signalled, and with 0 where the signal came to another node: the run itself says how
# it ended, if it has said anything in this start.
after=$(cat "$run/status.json" 2>/dev/null)
case "$([ "$after" = "$before" ] || grep -o '"status": "[a-z]*"' <<<"$after")" in
  *finished*) exit 0 ;;
  *preempted*) exit 75 ;;
  *failed*) exit 1 ;;
esac
[ -z "$signalled" ] || exit 75
exit "$code"
