#!/usr/bin/env bash
# Nearest-neighbour test: bash sage/run_knn.sh [mini|small|paper] [flags of sage.main_knn]
# CHECKPOINT, DATA_ROOT, GPUS, RUNS as in run_lincls.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

runs=${RUNS:-runs}/sage
where=$tier
case "$tier" in
  mini)
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    # 1, 20 and 200 neighbours among the 1,000 generated images; seconds. Chance is 10 per cent.
    flags=(--data_dir data/mini/images --img_size 32 --workers 0)
    ;;
  small)
    # CIFAR-10, 4,000 images as the bank; seconds.
    where=small/cifar10
    flags=(--data_dir "${DATA_ROOT:-data}/cifar10" --img_size 32 --per_class 400 --workers 0 --threads 1)
    ;;
  paper)
    # ImageNet: 1.28 M features of 2,048 are 10.5 GB; --feature_dir keeps them on disk. The paper's number is not known.
    flags=(--data_dir "${DATA_ROOT:-data}" --feature_dir "$runs/knn/paper" --workers 8)
    ;;
esac
checkpoint=${CHECKPOINT:-$runs/pretrain/$where/checkpoint.pth}

"${launch[@]}" -m sage.main_knn --pretrained "$checkpoint" "${flags[@]}" "$@"
