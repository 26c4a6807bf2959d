#!/usr/bin/env bash
# Ask a model the questions of a task; scores and answers go to OUTPUT_DIR/TASK.json.
#     sbatch --export=ALL,MODEL=outputs/8b-with-transform,TASK=mine,DATA=data/test.jsonl slurm/evaluate.sh --mode transform
# What follows the script's name goes to tools/evaluate.py.
#SBATCH --job-name=cc-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

MODEL=${MODEL:-outputs/8b-with-transform}
TASK=${TASK:-atlas}
DATA=${DATA:-}   # a file or folder of rows; empty: the task brings its own
OUTPUT_DIR=${OUTPUT_DIR:-$MODEL/evaluation}

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
start_job
run_once "$PYTHON" tools/evaluate.py --model "$MODEL" --task "$TASK" ${DATA:+--data "$DATA"} \
    --output "$OUTPUT_DIR/$TASK.json" "$@"
