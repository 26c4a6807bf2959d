#!/usr/bin/env bash
# Fit a tuned model's Transform Matrix on parallel prompts; the model with it goes to OUTPUT_DIR.
#     sbatch --export=ALL,MODEL=outputs/70b,DATA=data/pairs.jsonl slurm/fit_transform.sh --num_pairs 1000
# What follows the script's name goes to tools/fit_transform.py.
#SBATCH --job-name=cc-fit
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

MODEL=${MODEL:-outputs/8b}
DATA=${DATA:-data/pairs.jsonl}
OUTPUT_DIR=${OUTPUT_DIR:-$MODEL-with-transform}

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
start_job
run_once "$PYTHON" tools/fit_transform.py --model "$MODEL" --data "$DATA" --output "$OUTPUT_DIR" "$@"
