#!/usr/bin/env bash
# Ask a model the questions of tasks, rows shared by one rank per GPU; scores and answers go to OUTPUT_DIR/TASK.json.
#     sbatch --export=ALL,MODEL=outputs/8b-with-transform,TASK="XNLI MKQA" slurm/evaluate.sh
#     sbatch --export=ALL,MODEL=outputs/8b-with-transform,TASK=mine,DATA=data/test.jsonl slurm/evaluate.sh --mode transform
# What follows the script's name goes to tools/evaluate.py. Each mode needs an OUTPUT_DIR of its own. A job that ended
# early goes on when it is submitted again, or requeued by SLURM: what was answered is kept in OUTPUT_DIR/TASK.answers.
#SBATCH --job-name=cc-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

MODEL=${MODEL:-outputs/8b-with-transform}
TASK=${TASK:-atlas}   # one or more names, spaces between
DATA=${DATA:-}        # a file or folder of rows; empty: the tasks bring their own
OUTPUT_DIR=${OUTPUT_DIR:-$MODEL/evaluation}

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
start_job
# shellcheck disable=SC2086
run_ranks "$PYTHON" tools/evaluate.py --model "$MODEL" --task $TASK ${DATA:+--data "$DATA"} \
    --output_dir "$OUTPUT_DIR" "$@"
cat "$logs"/rank0-*.log
exit "$code"
