# supervise STOP COMMAND...: run COMMAND; on SIGTERM, SIGINT or SIGUSR1 evaluate STOP, which asks it to end (`$child` is
# its process), and go on waiting. Returns COMMAND's exit code, and sets `stopped` to 1 where a signal came.
supervise() {
  local stop="$1" code=0
  shift
  stopped=0
  "$@" &
  child=$!
  trap 'stopped=1; eval "'"$stop"'" || true' TERM INT USR1
  while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true # a signal ends the wait, not the command
  done
  wait "$child" || code=$?
  trap - TERM INT USR1
  return "$code"
}
