#!/usr/bin/env bash
# Evaluate a run: bash sscl/run_eval.sh [mini|small|paper] [flags of sscl.eval_features]
# CHECKPOINT names the run, otherwise that of run_train.sh; DATA_ROOT, LABELS, PERCENT, RUNS as there. SET=mine at the
# small tier: test images with labels, $DATA_ROOT/mine/test/CLASS/*.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

runs=${RUNS:-runs}
where=$tier
loading=(--workers 0 --threads 1)
more=()
pseudo=(--pseudo)
case "$tier" in
  mini)
    # Class head of both copies, pseudo-labels before and after the calibration; kNN, linear probe, few-shot, episodes
    # on the generated few-shot classes. Half a minute on two CPU cores; chance is 10 % (5-way episodes: 20 %).
    "$PYTHON" -m shared_utils.lab.mini images fewshot >/dev/null
    data=(--data_dir data/mini/images --cache --img_size 32)
    more=(--protocols "knn,linear,fewshot,episodes" --novel_dir data/mini/fewshot/test)
    ;;
  small)
    # The same on CIFAR-10, episodes on the 20 test classes of CIFAR-FS, which CIFAR-10 does not have; a minute.
    where=small/cifar10-${LABELS:-25}
    data=(--data_dir "${DATA_ROOT:-data}/cifar10" --per_class 800 --cache --img_size 32)
    if [ -d "${DATA_ROOT:-data}/cifarfs/test" ]; then
      more=(--protocols "knn,linear,fewshot,episodes" --novel_dir "${DATA_ROOT:-data}/cifarfs/test")
    fi
    if [ "${SET:-}" = mine ]; then
      where=small/mine
      data=(--val_dir "${DATA_ROOT:-data}/mine/test")
      more=(--protocols "knn,linear")
      pseudo=()
    fi
    ;;
  paper)
    # Top-1 of the class head is what the paper reports: 60.2 (1 %), 72.1 (10 %). The linear probe keeps the features of
    # all images in memory, 10.5 GB. Never run here, so no time is given.
    where=paper/${PERCENT:-1}percent
    data=(--data_dir "${DATA_ROOT:-data}")
    loading=(--workers 8)
    ;;
esac
checkpoint=${CHECKPOINT:-$runs/sscl/train/$where/checkpoint.pth}

"$PYTHON" -m sscl.eval_cls --pretrained "$checkpoint" "${data[@]}" "${loading[@]}" "${pseudo[@]}"
"$PYTHON" -m sscl.eval_features --pretrained "$checkpoint" "${data[@]}" "${loading[@]}" "${more[@]}" "$@"
