#!/bin/bash
# The daemon as a job of Slurm, on one node with four GPUs:  sbatch slurm.sh
# `scancel --batch --signal=TERM JOB` ends it in order, as the end of its time does. (Without
# --batch every process gets the signal, and not only the daemon's first, which stops the others.)
#SBATCH --job-name=ptycho-stream
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:4
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@60
set -euo pipefail
config=${1:-cluster.toml}
ptycho-stream config check "$config"
exec ptycho-streamd --config "$config"
