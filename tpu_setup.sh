#!/usr/bin/env bash
# Runs experiments on every worker of a Cloud TPU VM slice, at one commit. `./tpu_setup.sh --help` explains.
set -euo pipefail
exec </dev/null # nothing here may wait for an answer

usage() {
  cat <<'TEXT'
Usage: ./tpu_setup.sh [OPTION]... COMMAND [ARGUMENT]...

Runs experiments on every worker of a Cloud TPU VM slice, at one commit. Needs bash, git, tar and a logged-in gcloud.

Commands
  create TYPE RUNTIME [GCLOUD FLAG]...   make the slice and wait until it is ready; nothing to do if it is there
                                         (RUNTIME: see `gcloud compute tpus tpu-vm versions list`)
  install [COMMIT]                       put this repository at COMMIT (default HEAD) and its environment on all workers
  check                                  print commit, JAX version and devices of every worker; fails without a TPU
  run experiments/FILE.py [FLAG]...      run it on all workers, and end with its exit status; the same command again
                                         resumes it (several workers need a --workdir that they share: gs://...)
  stop                                   ask the running experiment to save and end, and wait for it: cutting off `run`
                                         ends the log here, not the experiment there
  fetch SOURCE [DESTINATION]             copy a file or folder back, from gs:// or from worker 0 (default: to .)
  delete                                 delete the slice; nothing to do if it is gone

Options
  --name NAME        the slice                              [default: $TPU_NAME]
  --zone ZONE        its zone                               [default: $TPU_ZONE]
  --project PROJECT  its project                            [default: $TPU_PROJECT, then gcloud's own]
  --attempts N       how often a step that failed is tried  [default: 5]; `run` and `check` are tried once
  --pause SECONDS    before the second try, doubled after   [default: 5]
  --dry-run          print every command and call none
  --help             print this

Example
  export TPU_NAME=pod TPU_ZONE=us-central2-b
  ./tpu_setup.sh create v4-32 tpu-ubuntu2204-base --spot
  ./tpu_setup.sh install && ./tpu_setup.sh check
  ./tpu_setup.sh run experiments/vision/lenet.py --dataset digits --workdir gs://bucket/lenet
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
  printf '+ %s\n' "$(quote "$@")" >&3
  "$dry" || "$@"
}

# tpu VERB ARGUMENT...: one gcloud call about the slice.
tpu() { call gcloud compute tpus tpu-vm "$@" --zone="$zone" ${project:+"--project=$project"} --quiet; }

# on_all SCRIPT: runs it on all workers at once; gcloud ends with the status of the first worker that failed.
on_all() { tpu ssh "$name" --worker=all --command="$1"; }

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

# state: READY, CREATING, ...; MISSING where there is no such slice; nothing in a dry run.
state() {
  local problem
  { problem=$(tpu describe "$name" --format='value(state)' 2>&1 >&4) && return; } 4>&1
  if [[ $problem == *NOT_FOUND* ]]; then
    echo MISSING
  else
    say "$problem"
    return 1
  fi
}

ensure_created() { # TYPE RUNTIME [FLAG]...
  local now
  now=$(state) || return
  case $now in
    MISSING | "") # "": a dry run
      tpu create "$name" --accelerator-type="$1" --version="$2" "${@:3}"
      ;;
    READY) say "$name is ready" ;;
    CREATING | STARTING | RESTARTING | REPAIRING)
      say "$name is $now"
      return 1
      ;;
    *) die "$name is $now and cannot be used; run: ./tpu_setup.sh --name $name --zone $zone delete" ;;
  esac
}

ensure_deleted() {
  local now
  now=$(state) || return
  case $now in
    MISSING) say "$name does not exist" ;;
    *) tpu delete "$name" ;;
  esac
}

# What the workers run. Under ~/dl_jax there: src (the commit), venv, tools (uv), run.pid, and what experiments write.

remote_enter() {
  cat <<'TEXT'
cd dl_jax 2>/dev/null || { echo "nothing is installed on $(hostname); run: ./tpu_setup.sh install" >&2; exit 2; }
pid=$(cat run.pid 2>/dev/null || echo none)
alive() { grep -qs experiments/ "/proc/$pid/cmdline"; }
TEXT
}

# Two experiments cannot share a TPU, and sources must not change below a running one.
remote_idle() {
  cat <<'TEXT'
if alive; then echo "an experiment is running on $(hostname); wait for it, or end it: ./tpu_setup.sh stop" >&2; exit 2; fi
TEXT
}

# The base image's Python may be too old for us, so uv brings one. Downloads that fail give 1: worth another attempt.
remote_install() {
  cat <<'TEXT'
set -eu
mkdir -p dl_jax
TEXT
  remote_enter
  remote_idle
  cat <<'TEXT'
rm -rf src && tar -xzf ../dl_jax.tar.gz && ln -sfn src/experiments experiments
test -x tools/bin/uv || python3 -m pip install --quiet --target tools uv || exit 1
uv() { tools/bin/uv "$@" --quiet || exit 1; }
uv venv --allow-existing --python 3.12 venv
uv pip install --python venv/bin/python --constraint src/constraints-py312-latest.txt --editable "./src[tpu]"
TEXT
}

remote_run() { # experiments/FILE.py [FLAG]...
  remote_enter
  remote_idle
  printf 'echo $$ > run.pid\nexec env PYTHONUNBUFFERED=1 venv/bin/python %s --cluster\n' "$(quote "$@")"
}

remote_stop() {
  remote_enter
  cat <<'TEXT'
alive || { echo "nothing runs on $(hostname)"; exit 0; }
kill -TERM "$pid"
timeout 300 tail --pid="$pid" -f /dev/null || { echo "process $pid is still running on $(hostname)" >&2; exit 1; }
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

create() { # TYPE RUNTIME [FLAG]...
  (($# >= 2)) || die "create needs an accelerator type and a runtime version: create v4-32 tpu-ubuntu2204-base"
  retry ensure_created "$@"
}

install() { # [COMMIT]
  local commit
  commit=$(git -C "$root" rev-parse --verify --quiet "${1:-HEAD}^{commit}") || die "no commit '${1:-HEAD}' in $root; commit first, or name one that exists"
  [[ -z $(git -C "$root" status --porcelain) ]] || say "warning: changes that are not committed are not installed"
  # A checkout rather than an archive, so that results record a commit that was looked up, not asserted.
  call git init --quiet "$scratch/src"
  call git -C "$scratch/src" fetch --quiet --depth=1 "$root" "$commit"
  call git -C "$scratch/src" checkout --quiet --detach FETCH_HEAD
  call tar -C "$scratch" -czf "$scratch/dl_jax.tar.gz" src
  retry tpu scp "$scratch/dl_jax.tar.gz" "$name:dl_jax.tar.gz" --worker=all
  retry on_all "$(remote_install)"
  say "$commit is installed on all workers of $name"
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

run() { # experiments/FILE.py [FLAG]...
  if [[ ${1:-} != experiments/*.py ]] || ! stays_inside "$1"; then
    die "run needs an experiment's file first, not '${1:-}': run experiments/vision/lenet.py ..."
  fi
  on_all "$(remote_run "$@")"
}

fetch() { # SOURCE [DESTINATION]
  (($# >= 1 && $# <= 2)) || die "fetch needs a source and at most one destination: fetch gs://bucket/lenet results"
  case $1 in
    gs://*) retry call gcloud storage cp --recursive "$1" "${2:-.}" ${project:+"--project=$project"} --quiet ;;
    *) retry tpu scp --recurse "$name:dl_jax/$1" "${2:-.}" --worker=0 ;;
  esac
}

name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-}
attempts=5 pause=5 dry=false
root=$(dirname "$(realpath "${BASH_SOURCE[0]}")")

while (($#)); do
  case $1 in
    --help | -h)
      usage
      exit
      ;;
    --dry-run) dry=true ;;
    --name | --zone | --project | --attempts | --pause)
      (($# >= 2)) || die "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    -*) die "unknown option '$1'; see ./tpu_setup.sh --help" ;;
    *) break ;;
  esac
  shift
done
(($#)) || die "which command? see ./tpu_setup.sh --help"
command=$1
shift

if "$dry"; then name=${name:-name} zone=${zone:-zone}; fi # to look at, they need not exist
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name '$name', expected the slice's name: lower-case letters, digits and hyphens"
[[ $zone =~ ^[a-z0-9-]+$ ]] || die "--zone '$zone', expected a zone such as us-central2-b"
[[ $attempts =~ ^[1-9][0-9]*$ ]] || die "--attempts '$attempts', expected a whole number from 1"
[[ $pause =~ ^[0-9]+$ ]] || die "--pause '$pause', expected whole seconds"

if "$dry"; then
  scratch=${TMPDIR:-/tmp}/dl_jax
  exec 3>&1
else
  command -v gcloud >/dev/null || die "gcloud is not on the PATH; install the Google Cloud CLI and run: gcloud auth login"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  exec 3>&2
fi

case $command in
  create | install | run | fetch) "$command" "$@" ;;
  check | stop | delete)
    (($# == 0)) || die "$command takes no arguments, not '$1'"
    case $command in
      check) on_all "$(remote_check)" ;;
      stop) on_all "$(remote_stop)" ;;
      delete) retry ensure_deleted ;;
    esac
    ;;
  *) die "unknown command '$command'; expected create, install, check, run, stop, fetch or delete" ;;
esac
