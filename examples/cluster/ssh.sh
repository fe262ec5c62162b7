#!/bin/bash
# A visling command on several machines that can be reached by ssh, one torchrun on each:
#
#   HOSTS="first second" examples/cluster/ssh.sh \
#     pretrain --recipe lxmert-two-phase-qa --data DATA --store REGIONS --out RUN
#
# All paths are the same on all machines, and RUN is on a file system that they share. The first of HOSTS is the one
# whose address the others connect to. Ctrl-C, or SIGTERM to this script, closes the connections, which ends all of
# them at once: --resume continues from the last state that was saved.
#
# PROCESSES: of each machine; as many as it has GPUs. VISLING: folder of the virtual environment on every machine.
# PORT: of the first machine, which the others must be able to reach.
set -euo pipefail

read -r -a hosts <<<"$HOSTS"
TORCHRUN=${VISLING:+$VISLING/bin/}torchrun

# ssh joins its words with blanks and gives them to a shell: quoted, they arrive as they are. -tt ends the command
# there when the connection ends here.
started=()
for number in "${!hosts[@]}"; do
  command=(
    "$TORCHRUN" --nnodes "${#hosts[@]}" --node-rank "$number" --nproc-per-node "${PROCESSES:-1}"
    --master-addr "${hosts[0]}" --master-port "${PORT:-29500}" -m visling "$@"
  )
  ssh -tt "${hosts[$number]}" "cd $(printf %q "$PWD") && exec $(printf '%q ' "${command[@]}")" </dev/null &
  started+=($!)
done
trap 'kill -TERM "${started[@]}" 2>/dev/null' INT TERM

status=0
for process in "${started[@]}"; do
  wait "$process" || status=$?
done
exit "$status"
