# shellcheck shell=bash
# Sourced from the repository root by every run_*.sh and by tests/run.sh; sets and exports PYTHON.
#
#   source shared_utils/env.sh          what training needs (requirements.txt)
#   source shared_utils/env.sh tests    and what the tests need (tests/requirements.txt)
#
# The Python of the active environment is taken when it serves. Otherwise a virtual environment is made once,
# in .venv or in $VENV, and made again when the requirement files change. SKIP_ENV=1 takes $PYTHON as it is.

_env_say() { printf '%s\n' "env: $*" >&2; }
_env_fail() {
  printf '%s\n' "error: $*" >&2
  return 2
}

# Prints what interpreter $1 lacks for $2 (run|tests), nothing when it serves. Reads metadata only: torch is not imported.
_env_lacks() {
  "$1" -I - "$2" 2>/dev/null <<'PY' || printf 'a working Python 3.10-3.13'
import sys
from importlib.metadata import PackageNotFoundError, version

def have(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None

lacks = []
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    lacks.append("Python 3.10-3.13")
torch = have("torch")
if torch is None or not (2, 11) <= tuple(int(n) for n in torch.split("+")[0].split(".")[:2]) < (2, 16):
    lacks.append("torch 2.11-2.15")
names = ["torchvision", "timm", "opencv-python", "numpy", "scipy", "tqdm", "tensorboard", "scikit-learn", "av", "pillow", "safetensors", "matplotlib"]
if sys.argv[1] == "tests":
    names += ["pytest", "pytest-xdist", "hypothesis", "mypy", "PyYAML"]
    for line in open("tests/requirements.txt", encoding="utf-8"):  # the formatter's output changes with its version
        if line.startswith("ruff==") and have("ruff") != line.split("==")[1].strip():
            lacks.append(line.strip())
lacks += [name for name in names if have(name) is None]
if have("onedl-mmsegmentation") is None and have("mmsegmentation") is None:
    lacks.append("mmsegmentation")
print(", ".join(lacks), end="")
PY
}

# The first interpreter that can make a virtual environment; prints its path.
_env_base() {
  local candidate no_venv=""
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3.10 python3 python; do
    [ -n "$candidate" ] || continue
    "$candidate" -I -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 || continue
    if "$candidate" -I -c 'import ensurepip, venv' >/dev/null 2>&1; then
      # not a virtual environment's own link, which making .venv anew may remove
      "$candidate" -I -c 'import os, sys; print(sys.executable if sys.prefix == sys.base_prefix else os.path.realpath(sys.executable))'
      return 0
    fi
    no_venv=${no_venv:-$candidate}
  done
  if [ -n "$no_venv" ]; then
    _env_fail "$no_venv cannot make virtual environments (modules venv and ensurepip are missing): apt-get install python3-venv"
  else
    _env_fail "no Python 3.10, 3.11, 3.12 or 3.13 found on PATH: install one, or name it with PYTHON=/path/to/python3"
  fi
}

# Makes or updates the virtual environment $1 for $2 (run|tests). Its .state file is the hash of the requirement files
# after a complete installation and `installing` during one, so an interrupted one is recognised and made anew.
_env_install() {
  local venv=$1 what=$2 files=(-r requirements.txt) base state started
  [ "$what" = tests ] && files+=(-r tests/requirements.txt)
  state=$(cat "$venv/.state" 2>/dev/null)
  if ! { [ -n "$state" ] && [ "$state" != installing ] && "$venv/bin/python" -I -m pip --version >/dev/null 2>&1; }; then
    base=$(_env_base) || return 2
    _env_say "making a virtual environment in $venv with $base"
    "$base" -I -m venv --clear "$venv" >&2 || { _env_fail "$base -m venv $venv failed (see above)" || return 2; }
  fi
  _env_say "installing the requirements into $venv: about 6.3 GB, 1-3 minutes with a fast network, once"
  started=$SECONDS
  echo installing >"$venv/.state" || return 2
  "$venv/bin/python" -I -m pip install --disable-pip-version-check --no-warn-script-location --prefer-binary "${files[@]}" >&2 ||
    { _env_fail "pip could not install the requirements into $venv (see above); the same command tries again" || return 2; }
  _env_say "first import (compiles, about 20 s)"
  "$venv/bin/python" -I -c 'import cv2, torch, torchvision, mmseg' >&2 2>"$venv/.import.log" || {
    tail -n 1 "$venv/.import.log" >&2
    _env_fail "the installed packages do not import; where a system library such as libGL.so.1 is missing: apt-get install libgl1 libglib2.0-0 libxcb1"
    return 2
  }
  [ "$what" = tests ] && _env_hash tests >"$venv/.state-tests"
  _env_hash run >"$venv/.state"
  _env_say "ready after $((SECONDS - started)) s: $venv (delete this folder to undo; for python -m ...: source $venv/bin/activate)"
}

_env_hash() {
  if [ "$1" = tests ]; then cat requirements.txt tests/requirements.txt; else cat requirements.txt; fi | cksum
}

_env_ready() { # is the virtual environment $1 complete for $2?
  [ -x "$1/bin/python" ] && [ "$(cat "$1/.state" 2>/dev/null)" = "$(_env_hash run)" ] &&
    { [ "$2" = run ] || [ "$(cat "$1/.state-tests" 2>/dev/null)" = "$(_env_hash tests)" ]; }
}

_env_main() {
  local what=run venv=${VENV:-$PWD/.venv} candidate lacks first_lacks="" rc
  [ "${1:-}" = tests ] && what=tests
  [ -f requirements.txt ] || { _env_fail "source shared_utils/env.sh from the root of the repository, not from $PWD" || return 2; }
  if [ -n "${SKIP_ENV:-}" ]; then
    export PYTHON=${PYTHON:-python3}
    return 0
  fi
  case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
  for candidate in "${PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" python3 python; do
    # Our own environment, active or not, is judged by its .state below: its requirements may have changed.
    case $(command -v "${candidate:-}" 2>/dev/null) in "" | "$venv"/*) continue ;; esac
    lacks=$(_env_lacks "$candidate" "$what")
    if [ -z "$lacks" ]; then
      PYTHON=$("$candidate" -I -c 'import sys; print(sys.executable)') || return 2
      export PYTHON
      return 0
    fi
    first_lacks=${first_lacks:-"$candidate lacks $lacks"}
  done
  if ! _env_ready "$venv" "$what"; then
    [ -n "$first_lacks" ] && _env_say "$first_lacks"
    mkdir -p "$venv" 2>/dev/null && [ -w "$venv" ] || { _env_fail "cannot write $venv: name another place with VENV=/path" || return 2; }
    # Two runs at once: the second waits for the first and finds the environment complete. pip inherits the lock, so that
    # one that outlives its killed run is waited for too.
    if command -v flock >/dev/null 2>&1; then
      exec 9>"$venv.lock"
      flock -n 9 || { _env_say "another run is preparing $venv, waiting for it" && flock 9; }
    fi
    rc=0
    _env_ready "$venv" "$what" || _env_install "$venv" "$what" || rc=$?
    if command -v flock >/dev/null 2>&1; then exec 9>&-; fi
    [ "$rc" = 0 ] || return "$rc"
  fi
  export PYTHON=$venv/bin/python
}

_env_main "$@" || return $?

# How a script starts Python: one process, or GPUS of them by torchrun. PET_NNODES and the other PET_ variables of
# torchrun name several nodes; without them a free port is taken, so that two runs on a machine do not meet.
launch=("$PYTHON")
if [ "${GPUS:-1}" -gt 1 ] || [ -n "${PET_NNODES:-}" ]; then
  launch+=(-m torch.distributed.run --nproc-per-node "${GPUS:-1}")
  if [ -z "${PET_NNODES:-}" ]; then launch+=(--standalone); fi
  # After a worker was lost, processes meet in a new store. In the agents' own one they look below the number of their
  # agent's failures, which differs between nodes that saw the loss and nodes that were told of it: they wait for ever.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

# Prints the job that comes next, with what was set for this one. A next job that is told of no checkpoint knows nothing
# of data and folders that flags of this one have named: the run has printed what goes on from them.
case " $* " in *" --data_dir"* | *" --data-dir"* | *" --output-dir"* | *" --output_dir"*) elsewhere=1 ;; *) elsewhere= ;; esac
next_job() {
  local line="next:" name
  if [ -n "$elsewhere" ] && [ $# -le 2 ]; then return 0; fi
  for name in RUNS DATA_ROOT SET LABELS PERCENT GPUS; do
    if [ -n "${!name:-}" ]; then line+=" $name=$(printf %q "${!name}")"; fi
  done
  printf '%s\n' "$line bash $*"
}

# why FOLDER ARM SEED: what ended this arm, for people: the last error in its log.
why() { grep -h '^error:' "$1/$2-seed$3.log" | tail -n 1 | sed 's/.*/(&)/' || true; }
