# shellcheck shell=bash
# Sourced by the launchers: waiting for a child while signals come.

# wait_for PID: the exit code of a child. A trap that runs meanwhile sets `interrupted`, since it ends `wait` early.
wait_for() {
  local code
  while :; do
    interrupted=''
    wait "$1"
    code=$?
    [ -n "$interrupted" ] || return "$code"
  done
}
