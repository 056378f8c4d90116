#!/usr/bin/env bash
# A run on Slurm, which queues itself again whenever its time is up or it is preempted, until it is finished.
#
#   sbatch --nodes 4 scripts/slurm.sh runs/8b --config llama3_8b --data.source texts/ --data.tokenizer tokenizer/
#
# To be submitted from the repository's root; that, and the run directory, are on a file system that all nodes share.
# The first argument is the run directory, the others go to titan-train. `scancel --batch --signal=TERM JOB` saves and
# ends the run for good; a plain scancel leaves it only KillWait seconds (30, usually) to save.
#
#   MIN_NODES=3 sbatch --nodes 4 …    loses a node, and goes on with three; other settings: scripts/node.sh
#
#SBATCH --job-name=titan
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
. scripts/wait_for.sh || exit 1

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export ENDPOINT="$first:${PORT:-29500}" RUN_ID="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
export NNODES="${MIN_NODES:-$SLURM_NNODES}:$SLURM_NNODES"
export SIGNALS_REACH_ALL=1
srun --no-kill --kill-on-bad-exit=0 --wait=0 --cpu-bind=none scripts/node.sh "$@" &
srun=$!
# USR1: Slurm wants the nodes back (--signal above, and PreemptParameters=send_user_signal). TERM: a user ends the run.
# Slurm's own TERM before a preemption goes to the nodes only. What srun is sent, all processes of the nodes get.
signalled=''
ended=''
# shellcheck disable=SC2329  # the traps call it
forward() {
  interrupted=1
  [ -n "$signalled" ] || kill -USR1 "$srun"
  signalled=1
}
trap forward USR1
trap 'ended=1; forward' TERM
wait_for "$srun"
code=$?
if [ "$code" = 75 ] && [ -z "$ended" ]; then
  echo "Preempted; queued again."
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
