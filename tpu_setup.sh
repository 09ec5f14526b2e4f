#!/usr/bin/env bash
# Runs experiments on every worker of a Cloud TPU VM slice, at one commit. `./tpu_setup.sh --help` explains.
# shellcheck disable=SC2016 # what the workers run is quoted here and expanded there
set -euo pipefail
exec </dev/null # nothing here may wait for an answer

usage() {
  cat <<'TEXT'
Usage: ./tpu_setup.sh [OPTION]... COMMAND [ARGUMENT]...

Rents a Cloud TPU slice and runs experiments on all of its workers, at one commit. Needs bash, git, tar, a logged-in
gcloud, and an ssh-agent that holds gcloud's key. docs/pods.md goes through it.

Commands
  launch TYPE [GCLOUD FLAG]... experiments/FILE.py [FLAG]...
                                  create, install and run; then start the run again when it is cut off, and make a slice
                                  anew that was pre-empted, until the run ends with status 0, 2 or 3
  create TYPE [GCLOUD FLAG]...    request the slice (v4-32, v5litepod-16, v5p-32, v6e-16) and wait until it is ready;
                                  nothing to do if it is there. Flags are those of `gcloud compute tpus queued-resources
                                  create`: --spot, --valid-until-duration=6h, --runtime-version, ...
  install [COMMIT]                put this repository at COMMIT (default HEAD) and its environment on all workers;
                                  nothing to do if it is there
  check                           print commit, JAX version and devices of every worker; fails without a TPU
  run experiments/FILE.py [FLAG]...
                                  run it on all workers, print the log of worker 0, and end with its exit status. The run
                                  does not need the connection: the same command follows it again, or resumes it if it
                                  has ended (several workers need a --workdir that they share: gs://...)
  stop                            ask the running experiment to save and end, and wait for it
  fetch SOURCE [DESTINATION]      copy a file or folder back, from gs:// or from worker 0 (default: to .)
  status                          print what exists, whether it is billed, and how to delete it
  delete                          delete slice and request; nothing to do if they are gone

Options
  --name NAME        the slice, and its queued resource     [default: $TPU_NAME]
  --zone ZONE        its zone                               [default: $TPU_ZONE]
  --project PROJECT  its project                            [default: $TPU_PROJECT, then gcloud's own]
  --internal-ip      connect to the workers' internal addresses, from a machine in their network
  --env NAME[=VALUE] set it for the experiment, VALUE being its value here if left out; may be repeated
  --data gs://...    `install` copies this folder of prepared data sets to every worker, and runs read them from there
  --restarts N       how often `launch` starts a run again  [default: 10]
  --attempts N       how often a step that failed is tried  [default: 5]; `run` and `check` are tried once
  --pause SECONDS    before the second try, doubled after   [default: 5]
  --dry-run          print every command and call none; without a COMMAND, those of a launch
  --help             print this

Example
  export TPU_NAME=pod TPU_ZONE=us-east1-d
  ./tpu_setup.sh launch v6e-16 --spot experiments/vision/lenet.py --dataset digits --workdir gs://bucket/lenet
  ./tpu_setup.sh fetch gs://bucket/lenet/result.json results/lenet.json
  ./tpu_setup.sh delete

Exit status: 0 done; 2 wrong use, or something that must be mended first; otherwise that of the command that failed.
TEXT
}

say() { printf 'tpu_setup: %s\n' "$*" >&2; }

die() {
  say "$@"
  exit 2
}

# quote WORD...: the words as any shell reads them back. Easier to read than printf %q, and not for bash alone.
quote() {
  local word separator="" escaped="'\\''"
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//\'/$escaped}'" ;;
    esac
    printf '%s%s' "$separator" "$word"
    separator=" "
  done
}

# call COMMAND...: prints the command, and calls it unless this is a dry run.
call() {
  begun=true
  printf '+ %s\n' "$(quote "$@")" >&3
  "$dry" || "$@"
}

# note TEXT: in a dry run, when the commands below it are called.
note() { ! "$dry" || printf '# %s\n' "$*" >&3; }

# tpu GROUP VERB ARGUMENT...: one gcloud call about the slice.
tpu() { call gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"} --quiet; }

# on WORKERS SCRIPT: runs it on a worker, or on all at once; gcloud ends with the status of the first that failed. A
# worker that vanishes closes no connection, so ssh has to ask whether it is there.
on() {
  tpu tpu-vm ssh "$name" --worker="$1" --command="$2" --ssh-flag="-o ServerAliveInterval=30 -o ConnectTimeout=30" \
    ${internal:+"$internal"}
}

# copy ARGUMENT...: scp from or to workers.
copy() { tpu tpu-vm scp "$@" ${internal:+"$internal"}; }

# gcloud's ssh to several workers at once cannot ask for a passphrase; without the agent it stalls.
require_agent() {
  local key=$HOME/.ssh/google_compute_engine held mine
  held=$(call ssh-add -l 2>/dev/null) || held=
  ! "$dry" || return 0
  mine=$(ssh-keygen -lf "$key" 2>/dev/null) || die "gcloud has no ssh key; make it: ssh-keygen -t rsa -f $key && ssh-add $key"
  mine=${mine#* }
  [[ " $held " == *" ${mine%% *} "* ]] ||
    die "ssh-agent does not hold gcloud's key; run: eval \"\$(ssh-agent)\" && ssh-add $key"
}

# retry COMMAND...: again after a growing pause; gives the last status. Status 2 is wrong use, there as here: no retry.
retry() {
  local attempt=1 wait=$pause status
  until "$@"; do
    status=$?
    if ((attempt >= attempts || status == 2)); then
      say "gave up after attempt $attempt (status $status): $1"
      return "$status"
    fi
    say "attempt $attempt of $attempts failed (status $status); again in $wait s"
    sleep "$wait"
    attempt=$((attempt + 1)) wait=$((wait * 2))
  done
}

# state GROUP FIELD: what gcloud describes; MISSING where there is no such thing; nothing in a dry run.
state() {
  local problem
  { problem=$(tpu "$1" describe "$name" --format="value($2)" 2>&1 >&4) && return 0; } 4>&1
  if [[ $problem == *NOT_FOUND* ]]; then
    echo MISSING
  else
    say "$problem"
    return 1
  fi
}

# look: sets queue and node to the states of the queued resource and of the slice that it became.
look() {
  begun=true
  queue=$(state queued-resources state.state) && node=$(state tpu-vm state)
}

# require_there: ends where what was there is deleted, and not by us: who deletes a slice does not want another.
require_there() {
  case $queue/$node in
    MISSING/MISSING | DELETING/*) ! "$seen" || die "$name was deleted meanwhile; the same command requests it anew" ;;
    *) seen=true ;;
  esac
}

# lost: whether what was requested will never be of use, or never again.
lost() {
  case $queue/$node in
    FAILED/* | SUSPENDING/* | SUSPENDED/* | DELETING/* | ACTIVE/MISSING) ;;
    */PREEMPTED | */TERMINATED | */STOPPING | */STOPPED | */DELETING) ;;
    *) return 1 ;;
  esac
}

# bill: one line on what exists, whether it is billed, and how to end that.
bill() {
  local how
  how="./tpu_setup.sh --name $name --zone $zone ${project:+--project $project }delete"
  if ! look; then
    echo "$name: cannot tell whether it is billed; to be sure, run: $how"
    return 1
  fi
  case $queue/$node in
    /) ;; # a dry run
    MISSING/MISSING) echo "$name: no queued resource, no slice: nothing is billed" ;;
    */MISSING) echo "$name: queued resource $queue, no slice: nothing is billed now; to delete it, run: $how" ;;
    */PREEMPTED | */TERMINATED) echo "$name: queued resource $queue, slice $node: nothing is billed any more; to delete it, run: $how" ;;
    *) echo "$name: queued resource $queue, slice $node: billed until it is deleted: $how" ;;
  esac
}

# runtime TYPE [FLAG]...: the image for this generation, as a flag; nothing if the flags choose one.
runtime() {
  local flag
  for flag in "${@:2}"; do
    [[ $flag != --runtime-version* ]] || return 0
  done
  case $1 in
    v2-* | v3-* | v4-*) echo --runtime-version=tpu-ubuntu2204-base ;;
    v5litepod-*) echo --runtime-version=v2-alpha-tpuv5-lite ;;
    v5p-*) echo --runtime-version=v2-alpha-tpuv5 ;;
    v6e-*) echo --runtime-version=v2-alpha-tpuv6e ;;
    *) die "slice type '$1', expected v4-N, v5litepod-N, v5p-N or v6e-N; for TPU7x and later see docs/pods.md" ;;
  esac
}

remove() {
  if [[ $queue != MISSING ]]; then
    tpu queued-resources delete "$name" --force
  elif [[ $node != MISSING ]]; then # it was made without a queue
    tpu tpu-vm delete "$name"
  else
    say "$name does not exist"
  fi
}

ensure_created() { # TYPE [FLAG]...
  local wait=$pause image
  image=$(runtime "$@") || return
  look || return
  require_there
  if lost || { "$dry" && "$recreate"; }; then
    "$recreate" || die "$name is lost (queued resource $queue, slice $node); run: ./tpu_setup.sh --name $name --zone $zone delete"
    "$dry" || say "$name is lost (queued resource $queue, slice $node); making it anew"
    note "if it has failed or was pre-empted:"
    seen=false
    remove || return
    "$dry" || queue=MISSING node=MISSING
    note "if there is none:"
  fi
  if "$dry" || [[ $queue/$node == MISSING/MISSING ]]; then
    tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$1" ${image:+"$image"} "${@:2}" || return
    note "until it is ACTIVE and READY:"
    look || return
  fi
  until [[ $node == READY ]] || "$dry"; do
    ! lost || return 1
    say "$name: queued resource $queue, slice $node"
    sleep "$wait"
    wait=$((wait < 30 ? wait * 2 : 60))
    look || return
    require_there
  done
  "$dry" || say "$name is ready"
}

ensure_deleted() { look && remove; }

# What the workers run. Under ~/dl_jax there: src (the commit), venv, tools (uv), data, installed (the commit, once all is
# there), run.sh, run.pid, run.log (earlier ones: run.log.1, ...), run.status, and what experiments write. A connection
# may be cut anywhere, and gcloud then sends the same script again: each has to bear that.

remote_enter() {
  cat <<'TEXT'
cd dl_jax 2>/dev/null || { echo "nothing is installed on $(hostname); run: ./tpu_setup.sh install" >&2; exit 2; }
pid=$(cat run.pid 2>/dev/null || echo none)
alive() { grep -qs run.sh "/proc/$pid/cmdline"; }
end() { pkill -TERM -P "$pid"; for _ in {1..600}; do alive || return 0; sleep 0.5; done; return 1; }
TEXT
}

# Two experiments cannot share a TPU, and sources must not change below a running one.
remote_idle() {
  cat <<'TEXT'
if alive; then echo "an experiment is running on $(hostname); wait for it, or end it: ./tpu_setup.sh stop" >&2; exit 2; fi
TEXT
}

remote_installed() { # MARK
  printf '[ "$(cat dl_jax/installed 2>/dev/null)" = %s ]\n' "$(quote "$1")"
}

# The base image's Python may be too old for us, so uv brings one. Downloads that fail give 1: worth another attempt.
remote_install() { # MARK
  cat <<'TEXT'
set -eu
mkdir -p dl_jax
TEXT
  remote_enter
  remote_idle
  cat <<'TEXT'
exec 9> install.lock
flock 9
rm -rf src installed
tar -xzf ../dl_jax.tar.gz || exit 1
ln -sfn src/experiments experiments
test -x tools/bin/uv || python3 -m pip install --quiet --target tools uv || exit 1
uv() { tools/bin/uv "$@" --quiet || exit 1; }
uv venv --allow-existing --python 3.12 venv
uv pip install --python venv/bin/python --constraint src/constraints-py312-latest.txt --editable "./src[tpu]"
TEXT
  [[ -z $data ]] || printf 'mkdir -p data\ngcloud storage rsync --recursive %s data || exit 1\n' "$(quote "$data")"
  printf 'echo %s > installed\n' "$(quote "$1")"
}

# What run.sh is to hold.
run_script() { # experiments/FILE.py [FLAG]...
  printf '[ ! -d data ] || export TFDS_DATA_DIR="$PWD/data"\nexec env %s venv/bin/python %s --cluster' \
    "$(quote PYTHONUNBUFFERED=1 ${environment[@]+"${environment[@]}"})" "$(quote "$@")"
}

# Before a run that the user asks for: one that goes on already is the one, if it is the same.
remote_adopt() { # experiments/FILE.py [FLAG]...
  remote_enter
  printf 'if alive && [ "$(cat run.sh)" = %s ]; then exit 0; fi\n' "$(quote "$(run_script "$@")")"
  remote_idle
  echo 'rm -f run.pid run.status run.stopped'
}

# Before a run that is started again: nothing of the last may be left on any worker.
remote_again() {
  remote_enter
  cat <<'TEXT'
if [ -e run.stopped ]; then echo "the run was ended with ./tpu_setup.sh stop; the same command resumes it" >&2; exit 2; fi
if alive && ! end; then echo "process $pid is still running on $(hostname)" >&2; exit 1; fi
rm -f run.pid run.status
TEXT
}

# Starts the run unless it was started, with its end recorded by a shell that outlives what may end the experiment.
remote_start() { # experiments/FILE.py [FLAG]...
  remote_enter
  cat <<'TEXT'
(set -C; : > run.pid) 2>/dev/null || exit 0
if [ -e run.log ]; then mv run.log "run.log.$(find . -maxdepth 1 -name 'run.log*' | wc -l)"; fi
TEXT
  printf 'printf "%%s\\n" %s > run.sh\n' "$(quote "$(run_script "$@")")"
  cat <<'TEXT'
setsid bash -c 'trap : HUP INT TERM; bash run.sh; echo $? > run.status' > run.log 2>&1 < /dev/null &
echo $! > run.pid
TEXT
}

remote_follow() {
  remote_enter
  cat <<'TEXT'
while alive; do sleep 0.5; done &
tail -n 100 -s 0.2 --pid=$! -f run.log
[ -s run.status ] || { echo "the run on $(hostname) was cut off; its host has probably been restarted" >&2; exit 75; }
exit "$(cat run.status)"
TEXT
}

remote_stop() {
  remote_enter
  cat <<'TEXT'
: > run.stopped
alive || { echo "nothing runs on $(hostname)"; exit 0; }
end || { echo "process $pid is still running on $(hostname)" >&2; exit 1; }
echo "stopped on $(hostname)"
TEXT
}

remote_check() {
  remote_enter
  cat <<'TEXT'
echo "$(hostname): commit $(git -C src rev-parse --short HEAD)"
venv/bin/python -c '
import jax
jax.distributed.initialize()
kind = jax.devices()[0].device_kind
print(f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} of {jax.device_count()} devices, {kind}, jax {jax.__version__}")
raise SystemExit(0 if jax.default_backend() == "tpu" else "no TPU")
'
TEXT
}

require_type() { # TYPE [FLAG]...
  local flag
  (($# >= 1)) || die "a slice type comes first: create v6e-16 --spot"
  for flag in "${@:2}"; do
    case ${flag%%=*} in
      --zone | --project | --node-id | --node-count | --node-prefix | --accelerator-type)
        die "'$flag' after $command, but that is for every call; say it before, with --zone, --project or --name, or by the type" ;;
    esac
  done
  runtime "$@" >/dev/null
}

create() { # TYPE [FLAG]...
  require_type "$@"
  retry ensure_created "$@"
}

require_commit() { # COMMIT
  commit=$(git -C "$root" rev-parse --verify --quiet "$1^{commit}") || die "no commit '$1' in $root; commit first, or name one that exists"
  [[ -z $(git -C "$root" status --porcelain) ]] || say "warning: changes that are not committed are not installed"
}

# A checkout rather than an archive, so that results record a commit that was looked up, not asserted.
pack() {
  call git init --quiet "$scratch/src" &&
    call git -C "$scratch/src" fetch --quiet --depth=1 "$root" "$commit" &&
    call git -C "$scratch/src" checkout --quiet --detach FETCH_HEAD &&
    call tar -C "$scratch" -czf "$scratch/dl_jax.tar.gz" src
}

ensure_installed() {
  local mark="$commit${data:+ $data}"
  if on all "$(remote_installed "$mark")" && ! "$dry"; then
    return
  fi
  note "if that was not so on all workers:"
  pack &&
    retry copy "$scratch/dl_jax.tar.gz" "$name:dl_jax.tar.gz" --worker=all &&
    retry on all "$(remote_install "$mark")" || return
  "$dry" || say "$commit is installed on all workers of $name"
}

install() { # [COMMIT]
  require_commit "${1:-HEAD}"
  require_agent
  ensure_installed
}

# stays_inside PATH: whether no .. on the path leads out of its first folder.
stays_inside() {
  local rest=${1#*/}/ depth=0
  while [[ -n $rest ]]; do
    case ${rest%%/*} in
      "" | .) ;;
      ..) depth=$((depth - 1)) ;;
      *) depth=$((depth + 1)) ;;
    esac
    ((depth >= 0)) || return 1
    rest=${rest#*/}
  done
}

require_experiment() { # experiments/FILE.py [FLAG]...
  if [[ ${1:-} != experiments/*.py ]] || ! stays_inside "$1"; then
    die "$command needs an experiment's file, not '${1:-}': experiments/vision/lenet.py ..."
  fi
}

run() { # experiments/FILE.py [FLAG]...
  local status=0
  require_experiment "$@"
  require_agent
  on all "$(remote_adopt "$@")" && on all "$(remote_start "$@")" || return
  on 0 "$(remote_follow)" || status=$?
  ((status != 255)) || say "the connection was lost; the run goes on, and the same command follows it again"
  return "$status"
}

# one_round EXPERIMENT [FLAG]...: all that has to be done, and was not yet, for the run to end; its status.
# How it begins is known from the round before: adopt, attach (it was started, the connection lost) or again.
one_round() {
  local status=0
  retry ensure_created "${slice[@]}" && ensure_installed || return
  if "$dry" || [[ $begin == adopt ]]; then
    note "the first time:"
    on all "$(remote_adopt "$@")" || return
  fi
  if "$dry" || [[ $begin == again ]]; then
    note "after a run that has ended:"
    on all "$(remote_again)" || return
  fi
  note "always, to start what was not started and to follow it:"
  on all "$(remote_start "$@")" || return
  begin=attach
  on 0 "$(remote_follow)" || status=$?
  ((status == 255)) || begin=again
  return "$status"
}

launch() { # TYPE [FLAG]... experiments/FILE.py [FLAG]...
  local slice=() begin=adopt recreate=true restart status
  while (($#)) && [[ $1 != experiments/* ]]; do
    slice+=("$1")
    shift
  done
  require_type ${slice[@]+"${slice[@]}"}
  require_experiment "$@"
  require_commit HEAD
  require_agent
  for ((restart = 1; ; restart++)); do
    note "until the run ends with 0, 2 or 3, and $restarts times after any other status (143, 255, 75, ...):"
    status=0
    one_round "$@" || status=$?
    case $status in 0 | 2 | 3) return "$status" ;; esac
    if ((restart > restarts)); then
      say "gave up after $restarts restarts (status $status)"
      return "$status"
    fi
    say "restart $restart of $restarts after status $status, in $pause s"
    sleep "$pause"
  done
}

fetch() { # SOURCE [DESTINATION]
  (($# >= 1 && $# <= 2)) || die "fetch needs a source and at most one destination: fetch gs://bucket/lenet results"
  case $1 in
    gs://*) retry call gcloud storage cp --recursive "$1" "${2:-.}" ${project:+"--project=$project"} --quiet ;;
    *) retry copy --recurse "$name:dl_jax/$1" "${2:-.}" --worker=0 ;;
  esac
}

# The last line says what is billed: after every failure, and after a run, whose slice is still there.
finish() {
  local status=$1 line
  if "$begun" && [[ $status != 0 && $command != status || $command == run || $command == launch ]]; then
    note "at the end, and after a failure:"
    line=$(bill) || true
    "$dry" || say "$line"
  fi
  "$dry" || rm -rf "$scratch"
}

name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-}
attempts=5 pause=5 restarts=10 internal="" data="" environment=() dry=false begun=false recreate=false seen=false
root=$(dirname "$(realpath "${BASH_SOURCE[0]}")")

while (($#)); do
  case $1 in
    --help | -h)
      usage
      exit
      ;;
    --dry-run) dry=true ;;
    --internal-ip) internal=$1 ;;
    --env)
      [[ ${2:-} =~ ^[A-Za-z_][A-Za-z0-9_]*(=|$) ]] || die "--env '${2:-}', expected NAME=VALUE, or NAME of a variable that is set"
      if [[ $2 != *=* && -z ${!2+set} ]]; then die "--env $2, but no such variable is set here; expected --env $2=VALUE"; fi
      if [[ $2 == *=* ]]; then environment+=("$2"); else environment+=("$2=${!2}"); fi
      shift
      ;;
    --name | --zone | --project | --data | --restarts | --attempts | --pause)
      (($# >= 2)) || die "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    -*) die "unknown option '$1'; see ./tpu_setup.sh --help" ;;
    *) break ;;
  esac
  shift
done
if "$dry" && (($# == 0)); then set -- launch v6e-16 --spot experiments/vision/lenet.py --workdir gs://bucket/lenet; fi
(($#)) || die "which command? see ./tpu_setup.sh --help"
command=$1
shift

if "$dry"; then name=${name:-name} zone=${zone:-zone}; fi # to look at, they need not exist
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name '$name', expected the slice's name: lower-case letters, digits and hyphens"
[[ $zone =~ ^[a-z0-9-]+$ ]] || die "--zone '$zone', expected a zone such as us-central2-b"
[[ -z $data || $data =~ ^gs://[^/]+ ]] || die "--data '$data', expected a folder in a bucket: gs://bucket/tfds"
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || die "--restarts '$restarts', expected a whole number from 0"
[[ $attempts =~ ^[1-9][0-9]*$ ]] || die "--attempts '$attempts', expected a whole number from 1"
[[ $pause =~ ^(0|[1-9][0-9]*)$ ]] || die "--pause '$pause', expected whole seconds"

if "$dry"; then
  scratch=${TMPDIR:-/tmp}/dl_jax
  exec 3>&1
else
  command -v gcloud >/dev/null || die "gcloud is not on the PATH; install the Google Cloud CLI and run: gcloud auth login"
  scratch=$(mktemp -d)
  exec 3>&2
fi
trap 'finish $?' EXIT
trap 'exit 130' INT # also where gcloud, which a terminal interrupts too, ends with a status of its own

case $command in
  launch | create | install | run | fetch) "$command" "$@" ;;
  check | stop | status | delete)
    (($# == 0)) || die "$command takes no arguments, not '$1'"
    case $command in
      check) require_agent && on all "$(remote_check)" ;;
      stop) require_agent && on all "$(remote_stop)" ;;
      status) bill ;;
      delete) retry ensure_deleted ;;
    esac
    ;;
  *) die "unknown command '$command'; expected launch, create, install, check, run, stop, fetch, status or delete" ;;
esac
