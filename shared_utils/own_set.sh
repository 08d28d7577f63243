# shellcheck shell=bash
# Sourced by run_arms.sh after env.sh.
#
#   own_set DIR     images of one's own in the small tier. Arms are compared by labels, so DIR or DIR/train has to hold
#                   two class folders at the least, or the script ends before anything is trained. Sets last=knn where
#                   DIR has neither val nor test: the nearest neighbours leave one image out at a time, a linear probe
#                   cannot.
own_set() {
  local root=$1
  if [ -d "$1/train" ]; then root=$1/train; fi
  if [ ! -d "$root" ]; then
    echo "error: $1: no such folder; DATA_ROOT names the folder that holds SET" >&2
    exit 2
  fi
  if [ "$(find -L "$root" -mindepth 1 -maxdepth 1 -type d ! -name '.*' | wc -l)" -lt 2 ] ||
    [ -n "$(find -L "$root" -mindepth 1 -maxdepth 1 -type f \( -iname '*.jp*g' -o -iname '*.png' \) -print -quit)" ]; then
    echo "error: $root: arms are compared by labels; expected two class folders at the least, $root/CLASS/*.jpg" >&2
    exit 2
  fi
  if [ ! -d "$1/val" ] && [ ! -d "$1/test" ]; then last=knn; fi
}
