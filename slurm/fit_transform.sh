#!/usr/bin/env bash
# Fit a tuned model's Transform Matrix on parallel prompts, which one rank per GPU reads; the model with it goes to
# OUTPUT_DIR.
#     sbatch --export=ALL,MODEL=outputs/8b,DATA=data/pairs.jsonl slurm/fit_transform.sh --num_pairs 1000
#     sbatch --export=ALL,MODEL=outputs/70b slurm/fit_transform.sh --deepspeed ds_configs/zero3.json
# Each rank holds the whole model; with --deepspeed all of them hold it together. What follows the script's name goes to
# tools/fit_transform.py. A job that ended early goes on when it is submitted again, or requeued by SLURM: what was read
# is kept in ACTIVATIONS, which every node must see; OUTPUT_DIR.activations, the default, only until the fit is done.
#SBATCH --job-name=cc-fit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

MODEL=${MODEL:-outputs/8b}
DATA=${DATA:-data/pairs.jsonl}
OUTPUT_DIR=${OUTPUT_DIR:-$MODEL-with-transform}
ACTIVATIONS=${ACTIVATIONS:-$OUTPUT_DIR.activations}

source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"
start_job
run_ranks "$PYTHON" tools/fit_transform.py --model "$MODEL" --data "$DATA" --output "$OUTPUT_DIR" \
    --activations "$ACTIVATIONS" "$@"
cat "$logs"/rank0-*.log
[ "$code" = 0 ] && rm -rf "$OUTPUT_DIR.activations"
exit "$code"
