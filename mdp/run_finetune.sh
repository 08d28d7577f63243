#!/usr/bin/env bash
# Fine-tune pretrained weights with mmsegmentation: bash mdp/run_finetune.sh [mini|small|paper] [flags of mdp.finetune]
# CHECKPOINT names the pretrained weights (none: from scratch); DATA_ROOT and GPUS as in run_pretrain.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

case "$tier" in
  mini)
    # The unseen third taxonomy of the mini data (Cityscapes layout), 60 labelled scenes, 200 iterations, then the same
    # from scratch. Two minutes on two CPU cores; prints both mIoUs and their difference: far
    # ahead after a tenth of the schedule (29.8 against 14.9), level at its end.
    "$PYTHON" -m shared_utils.lab.mini segmentation
    flags=(
      --config mini
      --data-root data/mini/segmentation
      --lr 0.05
      --checkpoint "${CHECKPOINT:-${RUNS:-runs}/mdp/pretrain/mini/checkpoint.pth}"
      --compare scratch
    )
    ;;
  small)
    # CamVid, which pretraining never sees: 367 images, narrow ResNet-18, 300 iterations, early validation after 30.
    # About a minute on two CPU cores. --config labelmefacade: 100 training images of a set that pretraining saw.
    # The learning rate is the better one of 0.01 and 0.05 for training from scratch (CamVid, seed 0, at both ends).
    flags=(
      --config "${CONFIG:-camvid}"
      --data-root "${DATA_ROOT:-data}"
      --lr 0.05
      --checkpoint "${CHECKPOINT:-${RUNS:-runs}/mdp/pretrain/small/checkpoint.pth}"
    )
    ;;
  paper)
    # ResNet-50-D8 DeepLabV3, no auxiliary head, batch 16 (Cityscapes 8), 40k iterations on VOC and 80k elsewhere;
    # never run here, so no time is given. Expected final mIoU (authors' rebuttal draft; VOC+ADE20K+COCO, 200 epochs):
    #   --config voc12aug 77.79   ade20k 42.69   cityscapes 80.64   coco_stuff164k 38.37
    # The supervised baseline: --checkpoint imagenet:torchvision (VOC 75.63, ADE20K 39.36, COCO-Stuff 35.25).
    flags=(
      --config "${CONFIG:-voc12aug}"
      --data-root "${DATA_ROOT:-data}"
      --checkpoint "${CHECKPOINT:-${RUNS:-runs}/mdp/pretrain/paper/checkpoint.pth}"
      --workers 4
    )
    ;;
esac

exec "${launch[@]}" -m mdp.finetune "${flags[@]}" "$@"
