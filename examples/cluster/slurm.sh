#!/bin/bash
#SBATCH --job-name=visling
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

# A visling command on several machines of a Slurm cluster, one torchrun on each:
#
#   sbatch examples/cluster/slurm.sh pretrain --recipe lxmert-two-phase-qa --data DATA --store REGIONS --out RUN
#
# RUN is on a file system that all machines share. Two minutes before the time is over Slurm sends SIGTERM to this
# script, which passes it on: the run saves its state and ends, and the job is queued again. A job that has been queued
# again, for this reason or because a machine failed, resumes the run. torchrun gives the processes 30 seconds to save.
#
# PROCESSES: of each machine; as many as it has GPUs. VISLING: folder of the virtual environment on every machine.
# PORT: of the first machine, which the others must be able to reach. On machines without GPUs, take the line with
# --gpus-per-node out and add --device cpu.
set -euo pipefail

PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
TORCHRUN=${VISLING:+$VISLING/bin/}torchrun
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}

# The run's folder is what follows --out.
out=
for word in "$@"; do
  if [ "${previous:-}" = --out ]; then out=$word; fi
  previous=$word
done
is_finished() { grep -q '"status": "finished"' "$out/run.json"; }

resume=()
if [ -e "$out/run.json" ]; then
  if is_finished; then
    echo "$out has finished"
    exit
  fi
  resume=(--resume)
fi

# Every torchrun gets the same arguments: who is there, and who is the first, is settled where they meet.
srun "$TORCHRUN" \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$PROCESSES" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
  -m visling "$@" "${resume[@]}" &
step=$!

asked=
trap 'asked=yes; kill -TERM "$step"' TERM
status=0
wait "$step" || status=$?
if [ -n "$asked" ]; then
  # The signal ended the first wait; the run is still saving
  status=0
  wait "$step" || status=$?
  if [ -e "$out/run.json" ] && ! is_finished; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
