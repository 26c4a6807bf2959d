# What every job script here shares; sourced, not run. Reads the settings at the top of each script (all of them can be
# given to sbatch too: sbatch --export=ALL,NAME=value ...), and gives it:
#
#     start_job            where ranks meet, where logs go, a health check of the nodes
#     run_ranks CMD...     one task per rank, in the background; signals reach the ranks; sets $code
#     finish_training      go on after a preemption or a crash (requeue), or end
#
# What a training ended with is read from OUTPUT_DIR/run_state.json (cc_ds/run_state.py), not from srun's exit code:
# srun reports the highest code of its tasks, which after a failure is that of a rank it killed itself.

set -uo pipefail

# The batch shell gets USR1 (--signal=B:USR1@N) at any moment of the job, and only takes note of it: unhandled, it would
# end this shell, and a requeue from inside a trap would kill the ranks while they save. See run_ranks.
asked=
trap 'asked=1' USR1

: "${PYTHON:=}"                       # the interpreter; default: .venv/bin/python here, else python3 on the PATH
: "${MODULES:=}"                      # "cuda/13.0 python/3.11": loaded before anything else
: "${VENV:=}"                         # a virtual environment to activate
: "${CONTAINER_IMAGE:=}"              # run everything in this image ...
: "${CONTAINER_RUNTIME:=pyxis}"       # ... with pyxis (srun --container-image) or apptainer
: "${CONTAINER_MOUNTS:=}"             # "/data,/scratch": beside the repository
: "${MAX_RESTARTS:=100}"              # starts of this job beyond the first
: "${MAX_CRASHES:=2}"                 # crashes in a row without a new checkpoint, after which the job ends
: "${HEALTH_CHECK:=1}"                # 0: none
: "${EXPECT_GPUS:=${SLURM_GPUS_ON_NODE:-0}}"   # per node
: "${MIN_MEMORY_GIB:=1}"              # available, per node
: "${MIN_DISK_GIB:=1}"                # free in OUTPUT_DIR
: "${LOOK_EVERY:=10}"                 # seconds between looks whether USR1 has come

say() { echo "$(date '+%F %T') $*"; }

start_job() {
    [ -n "${SLURM_JOB_ID:-}" ] || { echo "submit this with sbatch, from the repository's root" >&2; exit 2; }
    cd "${SLURM_SUBMIT_DIR}" || exit 2
    [ -f cc_ds/train.py ] || { echo "submit from the repository's root (no cc_ds/train.py in $PWD)" >&2; exit 2; }

    if [ -n "$MODULES" ]; then
        # shellcheck disable=SC2086
        module load $MODULES || exit 2
    fi
    if [ -n "$VENV" ]; then
        # shellcheck disable=SC1091
        source "$VENV/bin/activate" || exit 2
    fi
    if [ -z "$PYTHON" ]; then
        PYTHON=python3
        [ -z "$VENV$CONTAINER_IMAGE" ] && [ -x "$PWD/.venv/bin/python" ] && PYTHON="$PWD/.venv/bin/python"
    fi

    restarts=${SLURM_RESTART_COUNT:-0}
    # A requeued job goes on from its own newest checkpoint, not from the one that it was told to begin with.
    if [ "$restarts" -eq 0 ]; then RESUME=${RESUME:-latest}; else RESUME=latest; fi
    attempt="$SLURM_JOB_ID.$restarts"
    # Below the range that kernels hand out, another one after each restart, the same on every node.
    export MASTER_ADDR MASTER_PORT
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((10000 + (SLURM_JOB_ID * 7 + restarts) % 20000))
    export NODE_NAMES
    NODE_NAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}   # srun does not take it over from sbatch by itself
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
    export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}

    logs="$OUTPUT_DIR/logs/job-$attempt"
    mkdir -p "$logs" || exit 2
    say "job $SLURM_JOB_ID, start $restarts, nodes $SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT, logs in $logs"
    check_health
}

# The options of every srun, and the container if there is one.
launch() {
    local options=("$@") inside=()
    while [ "${options[0]}" != -- ]; do inside+=("${options[0]}"); options=("${options[@]:1}"); done
    local command=("${options[@]:1}") mounts="$PWD"
    [ -n "$CONTAINER_MOUNTS" ] && mounts="$mounts,$CONTAINER_MOUNTS"
    if [ -n "$CONTAINER_IMAGE" ] && [ "$CONTAINER_RUNTIME" = pyxis ]; then
        local where=() mount
        for mount in ${mounts//,/ }; do where+=("$mount:$mount"); done
        inside+=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD"
                 --container-mounts="$(IFS=,; echo "${where[*]}")")
    elif [ -n "$CONTAINER_IMAGE" ]; then
        command=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER_IMAGE" "${command[@]}")
    fi
    # --wait and --kill-on-bad-exit: a rank that ends badly ends the step, rather than leaving the others waiting for it.
    exec srun --kill-on-bad-exit=1 --wait=60 --export=ALL "${inside[@]}" -- "${command[@]}"
}

# USR1 is ignored until Python listens: its default is to kill.
as_rank='trap "" USR1; export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'

check_health() {
    [ "$HEALTH_CHECK" = 0 ] && return
    (launch --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --output="$logs/health.log" -- \
        bash -c "$as_rank" rank "$PYTHON" tools/health_check.py --gpus "$EXPECT_GPUS" --disk "$OUTPUT_DIR" \
        --min_memory_gib "$MIN_MEMORY_GIB" --min_disk_gib "$MIN_DISK_GIB") && return
    local bad=$?
    cat "$logs/health.log"
    say "the health check failed (code $bad): see the nodes named above; sbatch --exclude=NODE goes on without one"
    exit 3
}

run_ranks() {
    [ -n "$asked" ] && { say "USR1 before the ranks started"; requeue; }
    (launch --output="$logs/rank%t-%N.log" -- bash -c "$as_rank" rank "$@") &
    srun_pid=$!
    trap 'say "TERM: waiting for the ranks to save and end"' TERM   # this shell must outlive them
    # Asked by USR1, the ranks agree on a step, save and end. One that is still starting ignores it, so all are asked
    # again; and a USR1 that comes between the look at $asked and the wait is seen at the next look.
    local said=
    while kill -0 "$srun_pid" 2>/dev/null; do
        if [ -n "$asked" ]; then
            [ -z "$said" ] && say "USR1: asking the ranks to save and end"
            said=1
            scancel --signal=USR1 "$SLURM_JOB_ID"
        fi
        sleep "$LOOK_EVERY" &
        wait -n "$srun_pid" $!
    done
    wait "$srun_pid"
    code=$?
    say "the ranks ended with code $code"
}

# The state this very start of the job left, or "crashed".
state_of_run() {
    local file="$OUTPUT_DIR/run_state.json"
    if grep -qs "\"attempt\": \"$attempt\"" "$file"; then
        sed -n 's/.*"state": "\([a-z]*\)".*/\1/p' "$file" | sed 's/running/crashed/'
    else
        echo crashed
    fi
}

newest_checkpoint() { find "$OUTPUT_DIR" -maxdepth 1 -name 'checkpoint-*' ! -name '*.*' -printf '%f\n' | sort | tail -n 1; }

finish_training() {
    local state
    state=$(state_of_run)
    [ "$state" = crashed ] && [ "$code" = 2 ] && state=error
    case $state in
        finished | stopped)
            say "$state"
            exit 0 ;;
        preempted)
            requeue ;;
        terminated)
            # TERM to a job that SLURM still counts as running is no scancel: a node that comes back from a failure ends
            # what it finds of the job, and that can be its next start.
            [ "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')" = RUNNING ] && requeue
            say "terminated"
            exit 0 ;;
        error)
            tail -qn 5 "$logs"/rank*.log
            say "the run ended with an error that another start would repeat: not requeued"
            exit "$((code ? code : 2))" ;;
        *)
            tail -qn 5 "$logs"/rank*.log
            count_crash
            requeue ;;
    esac
}

# A crash that comes again and again before a new checkpoint is not bad luck.
count_crash() {
    local file="$OUTPUT_DIR/crashes" newest count=1
    newest=$(newest_checkpoint)
    [ "$(sed -n 1p "$file" 2>/dev/null)" = "after ${newest:-no checkpoint}" ] && count=$(($(sed -n 2p "$file") + 1))
    printf 'after %s\n%d\n' "${newest:-no checkpoint}" "$count" >"$file"
    say "crash $count after ${newest:-no checkpoint}"
    if [ "$count" -ge "$MAX_CRASHES" ]; then
        say "$count crashes without a new checkpoint in between: not requeued"
        exit "$((code ? code : 1))"
    fi
}

requeue() {
    if [ "$restarts" -ge "$MAX_RESTARTS" ]; then
        say "$restarts restarts are enough (MAX_RESTARTS): not requeued; sbatch it again to go on"
        exit "$((code ? code : 1))"
    fi
    say "requeueing"
    scontrol requeue "$SLURM_JOB_ID" || exit "$((code ? code : 1))"
    sleep 120   # the requeue ends this shell
    exit 1
}
