#!/usr/bin/env bash
# A run on machines that are reached by SSH, listed in a file with a host in each line; they meet on the first.
#
#   scripts/ssh.sh hosts.txt runs/8b --config llama3_8b --data.source texts/ --data.tokenizer tokenizer/
#
# The repository is at the same path on all hosts, and so is the run directory, which they share; SSH asks for no
# password. Ctrl-C or SIGTERM saves and ends the run, with 75; so does whatever ends this script or its connections, so
# that no processes are left behind. Exit codes: those of scripts/node.sh; 255 if no host is reached.
#
#   MIN_NODES=3 scripts/ssh.sh …      loses a host of four, and goes on with three; other settings: scripts/node.sh
set -uo pipefail
mapfile -t hosts < <(grep -Ev '^[[:space:]]*(#|$)' "${1:?the file of hosts is missing}")
cd "$(dirname "$0")/.." || exit 1
. scripts/wait_for.sh || exit 1
shift

first=${hosts[0]:?the file of hosts lists none}
settings=(NNODES="${MIN_NODES:-${#hosts[@]}}:${#hosts[@]}" ENDPOINT="${first#*@}:${PORT:-29500}" END_WITH_STDIN=1)
settings+=(RUN_ID="$(date +%s)-$$")
for name in NPROC MAX_RESTARTS SHUTDOWN_TIMEOUT; do
  if [ -n "${!name:-}" ]; then settings+=("$name=${!name}"); fi
done
remote="cd $(printf %q "$PWD") && exec env $(printf '%q ' "${settings[@]}" scripts/node.sh "$@")"

# All hosts read from a pipe into which only this process could write: however it ends, they come to the pipe's end.
pipe=$(mktemp -u)
mkfifo "$pipe"
exec 8<>"$pipe"
exec 9<"$pipe"
rm "$pipe"
nodes=()
for host in "${hosts[@]}"; do
  ssh -o BatchMode=yes -o ServerAliveInterval=15 "$host" "$remote" <&9 8>&- 9>&- &
  nodes+=($!)
done
trap 'interrupted=1; exec 8>&-' INT TERM HUP USR1

codes=()
for node in "${nodes[@]}"; do
  wait_for "$node"
  codes+=($?)
done
for code in 75 1 0; do  # the run was ended, has failed, or is finished on the hosts that are left
  case " ${codes[*]} " in *" $code "*) exit "$code" ;; esac
done
exit "${codes[0]}"
