#!/usr/bin/env bash
# Tune a 70B model on 8 nodes of 8 GPUs.
#     sbatch slurm/train_70b.sh
#     sbatch --nodes=4 --time=12:00:00 slurm/train_70b.sh --learning_rate 2e-5     (what follows goes to cc_ds/train.py)
#     sbatch --export=ALL,CONFIG=mine.yaml,OUTPUT_DIR=outputs/mine slurm/train_70b.sh
# RESUME=outputs/mine/checkpoint-000500 begins with that checkpoint (by default, the newest).
# USR1 before the time limit, or a node that fails: it saves where it can, is requeued and goes on from the newest whole
# checkpoint. To ask a running job for a checkpoint: touch OUTPUT_DIR/save_now; to end it after one: touch
# OUTPUT_DIR/stop_now, or scancel.
#SBATCH --job-name=cc-70b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

CONFIG=${CONFIG:-configs/70b.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/70b}

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
start_job
run_ranks "$PYTHON" cc_ds/train.py --config "$CONFIG" --output_dir "$OUTPUT_DIR" \
    --resume_from_checkpoint "$RESUME" --disable_tqdm true "$@"
finish_training
