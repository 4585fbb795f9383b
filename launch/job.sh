# shellcheck shell=bash
# Sourced by every script of this folder: the site, and how a job runs, stops and continues.
launch=${MEGAARCH_LAUNCH:-launch}
if [[ ! -f $launch/site.sh ]]; then
  echo "$launch/site.sh does not exist: copy $launch/site.example.sh there and fill it in" >&2
  exit 2
fi

# A job inherits what was set where it was submitted: in another job's step, that step's size, place
# and binding; in a shell, where ranks once met, how its owner likes squeue's answers, and
# SBATCH_EXPORT=NONE, after which srun would give the ranks no environment.
unset "${!SLURM_STEP@}" "${!SLURM_CPU_BIND@}" "${!SQUEUE_@}" SLURM_EXPORT_ENV SRUN_CPUS_PER_TASK
unset PMI_RANK PMI_SIZE PMI_JOBID PMI_FD RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR

# ended: notes the exit code as `record`.code, where a script names one. Where site.sh ends this shell
# (exit, or a command that fails) the job would end with its code, and 0 would count as done.
ended() {
  local code=$?
  if [[ -z ${site_is_read:-} ]] && ((code <= 128)); then
    echo "$launch/site.sh ends the job (code $code): it must come to its end, without exit, and its" \
      "last command must succeed" >&2
    trap - EXIT
    code=2
  fi
  [[ -z ${record:-} ]] || echo "$code" >"$record.code"
  [[ -n ${site_is_read:-} ]] || exit "$code"
}
trap ended EXIT
trap 'exit 143' TERM # of a job that is cancelled or out of time; else $? is of the command before
set +u # modules and environments of others (conda's, Lmod's) read variables that nobody has set
# shellcheck source=launch/site.example.sh
source "$launch/site.sh"
set -u
site_is_read=1
# srun does not take it over from sbatch; where it is not given, --cpus-per-gpu or the node's may be
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
: "${MAX_LOSSES:=3}"
[[ -v SRUN_OPTIONS ]] || SRUN_OPTIONS=()
if [[ ! $MAX_LOSSES =~ ^[0-9]+$ ]]; then
  echo "$launch/site.sh: MAX_LOSSES must be a number from 0, not '$MAX_LOSSES'" >&2
  exit 2
fi

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "$0 is a batch script: give it to sbatch" >&2
  exit 2
fi

# This task, as SLURM's commands take it: the id alone of an array's last task means all of them.
task=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
: "${losses:=slurm-$task.losses}" # a line for each start that lost a rank since a step was saved
export MEGAARCH_LOSSES=$losses    # which a checkpoint removes

# ranks COMMAND...: the command as the job's tasks, one a rank.
# Ranks end within seconds of each other; one that is alone for longer than --wait has lost the
# others. --mpi=none: ranks meet by SLURM's variables, and those of a site's default MPI would say
# something else.
ranks() {
  srun --mpi=none --kill-on-bad-exit=0 --wait=120 "${SRUN_OPTIONS[@]}" "${CONTAINER[@]}" "$@"
}

# train COMMAND...: ranks that continue. Told to stop (SIGUSR1 ahead of the
# time limit, SIGTERM at a preemption), the ranks finish their step, save and end with code 75; the
# job then goes back to the queue, and the same command continues. It also goes back, but MAX_LOSSES
# times in a row at most, where no step is known to be saved: SIGUSR1 outside training (at the start,
# while a trained model is scored) ends the ranks at once, code 138; a rank is lost (69; or, above
# 128, killed by a signal).
train() {
  local code=0 why="a rank was lost"
  trap : USR1 TERM # they are the ranks' to answer; this shell waits until they have saved
  ranks "$@" || code=$?
  if ((code == 75)); then
    rm -f "$losses"
    again "told to stop (code $code)"
  elif ((code == 69 || code > 128)); then
    ((code != 138)) || why="told to stop outside training"
    echo "$(date +%FT%T) code $code on $SLURM_JOB_NODELIST" >>"$losses"
    if (($(wc -l <"$losses") <= MAX_LOSSES)); then
      again "$why (code $code)"
    else
      echo "$why (code $code), and that is once more than the $MAX_LOSSES times in a row for which" \
        "the job goes back to the queue (MAX_LOSSES in $launch/site.sh); $losses lists them;" \
        "where the start or the scoring takes longer than the time limit, give a longer one" >&2
    fi
  fi
  return "$code"
}

# again WHY: back to the queue; not where the job is being ended by others than its time limit
# (scancel, a lost node, an administrator), after which SLURM knows what to do.
again() {
  local state try
  for try in 1 2 3; do # a busy controller may not answer at once
    state=$(squeue --noheader --jobs="$task" --format="%T %r") && break
    state="RUNNING, for squeue did not answer"
    sleep "$((10 * try))"
  done
  if [[ $state != RUNNING* && $state != *TimeLimit ]]; then
    echo "$1: job $task is ended from outside ($state)"
  elif scontrol requeue "$task"; then
    echo "$1: job $task goes back to the queue"
  else
    echo "$1: job $task cannot go back to the queue: submit it again, and it continues" >&2
  fi
}
