#!/bin/bash
# A Ray of the length of one Slurm job, one node with one GPU each, and one command on it. From the repository root, on a file system of all nodes:
#   sbatch --nodes=4 docs/cluster/slurm.sh python -m jobs.train recipes/v8r.yaml run.root=/shared/runs cluster.workers=4 cluster.resources.train=1 \
#     evaluation.reader.base_url=http://READER:8200/v1
# It starts no reader: READER is a machine on which one runs (docs/cluster.md).
#SBATCH --job-name=stairstep --ntasks-per-node=1 --exclusive --gpus-per-node=1 --time=12:00:00 --signal=B:TERM@900
set -euo pipefail
export PATH=$PWD/.venv/bin:$PATH PYTHONPATH=$PWD:$PWD/platform RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/slurm-$SLURM_JOB_ID
unset RAY_AUTH_TOKEN
mkdir -p "$HOME/.ray"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"; kill $(jobs -p) 2> /dev/null || true; wait' EXIT
(umask 077; python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs of others may share nothing but the machine
start=(ray start --block --disable-usage-stats --resources='{"train": 1}')
srun --nodes=1 --ntasks=1 --nodelist="$head" "${start[@]}" --head --port="$port" --dashboard-host=127.0.0.1 &
until ray status --address "$head:$port" > /dev/null 2>&1; do
    kill -0 %1 # the head has ended: its own lines say why
    sleep 2
done
if [ "$SLURM_NNODES" -gt 1 ]; then
    srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" "${start[@]}" --address="$head:$port" &
fi
# Slurm's SIGTERM, 15 minutes before the end, reaches the command: it stops with a checkpoint, and the same job goes on with it.
RAY_ADDRESS=$head:$port "$@" &
command=$!
trap 'kill -TERM $command' TERM
wait $command || wait $command
