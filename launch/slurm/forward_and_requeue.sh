# shellcheck shell=bash
# Sourced by the job scripts: runs a command to its end, passes signals on to it, and puts the job back into the queue
# when the command says that the run can go on later.

run_and_requeue() {
    local pid code interrupted
    "$@" &
    pid=$!
    trap 'interrupted=yes; kill -USR1 "$pid"' USR1
    trap 'interrupted=yes; kill -TERM "$pid"' TERM
    # A trapped signal ends `wait` while the command still runs; bash keeps the exit code until it is asked for again.
    while true; do
        interrupted=
        code=0
        wait "$pid" || code=$?
        [[ -z "$interrupted" ]] && break
    done
    echo "$(date --iso-8601=seconds) job $SLURM_JOB_ID: exit code $code"
    # 75: saved and stopped; 138: ended by the notice (SIGUSR1) without a save, to go on from its last checkpoint;
    # 69: stuck, on a machine or link that may be gone by now: three times, since the fault may be the run's own.
    if [[ "$code" == 75 || "$code" == 138 || ("$code" == 69 && "${SLURM_RESTART_COUNT:-0}" -lt 3) ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
