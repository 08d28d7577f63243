#!/usr/bin/env bash
# Evaluate: bash mdp/run_eval.sh [mini|small|paper] [flags of mdp.eval_seg]
# RUN names a fine-tuning folder; `--protocol prototype --checkpoint PATH` needs no fine-tuning. DATA_ROOT: the data.
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
case "$tier" in
  mini)
    # Nearest-prototype segmentation of both pretraining sets' validation images, straight from the pretraining
    # checkpoint; half a minute on two CPU cores.
    "$PYTHON" -m shared_utils.lab.mini segmentation
    flags=(
      --protocol prototype
      --checkpoint "${CHECKPOINT:-$runs/mdp/pretrain/mini/checkpoint.pth}"
      --data-root data/mini/segmentation
    )
    ;;
  small)
    # CamVid's 233 test images with a network fine-tuned by run_finetune.sh small; half a minute.
    flags=(
      --run "${RUN:-$runs/mdp/finetune/camvid/small-seed0}"
      --split test
      --data-root "${DATA_ROOT:-data}"
    )
    ;;
  paper)
    # VOC 2012 val, single scale, no flip; expected 77.79 mIoU after VOC+ADE20K+COCO (authors' rebuttal draft).
    flags=(
      --run "${RUN:-$runs/mdp/finetune/voc12aug/paper-seed0}"
      --split val
      --data-root "${DATA_ROOT:-data}"
      --workers 4
    )
    ;;
esac

exec "$PYTHON" -m mdp.eval_seg "${flags[@]}" "$@"
