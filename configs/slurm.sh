#!/bin/bash
# The daemon as a job of Slurm, on one node with four GPUs:  sbatch slurm.sh
# `scancel --signal=TERM JOB` ends it in order: a running scan is kept and goes on at the next start.
#SBATCH --job-name=ptycho-stream
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:4
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
set -euo pipefail
config=${1:-cluster.toml}
ptycho-stream config check "$config"
# Under srun, so that the signal above reaches the daemon and not only this shell.
exec srun --cpu-bind=none ptycho-streamd --config "$config"
