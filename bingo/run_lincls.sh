#!/usr/bin/env bash
# Linear evaluation: bash bingo/run_lincls.sh [mini|small|paper] [flags of bingo.main_lincls]
# CHECKPOINT names the pretrained weights, DATA_ROOT the folder of the data sets (paper: of train/ and val/), SET the
# small one, GPUS the processes, RUNS the folder of the outputs (runs).
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
case "$tier" in
  mini)
    # Section 4 of the paper at toy size: a classifier on the frozen student of run_pretrain.sh mini, mini images;
    # 30 epochs over features of unaugmented images (--cached_train), seconds on two CPU cores.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    flags=(
      --data_dir data/mini/images --img_size 32 --cached_train
      --init_lr 0.3 --decay_method cos --end_epoch 30 --batch_size 64
    )
    ;;
  small)
    # CIFAR-10 at 400 images a class (SET=tiny_imagenet50: 80 a class), the cheap probe; under a minute on two CPU cores.
    # A comparison of arms, not the paper's protocol: see run_arms.sh.
    set_name=${SET:-cifar10} per_class=400
    where=small/$set_name
    if [ "$set_name" = tiny_imagenet50 ]; then per_class=80; fi
    flags=(
      --data_dir "${DATA_ROOT:-data}/$set_name" --img_size 32 --per_class "$per_class" --cached_train
      --init_lr 0.3 --decay_method cos --end_epoch 100 --batch_size 256
    )
    ;;
  paper)
    # Table of linear evaluation, ImageNet, ResNet-18 from ResNet-50x2: expected 65.5 top-1, 87.0 top-5 (release README).
    # The release's Res.sh: lr 30, cosine, 120 epochs. EfficientNet-B0 (Eff.sh): --init_lr 3 --min_lr 0.001.
    # 600,480 steps of 256 images, one forward pass each; never run here, so no time is given.
    flags=(
      --data_dir "${DATA_ROOT:-data}" --init_lr 30 --decay_method cos --end_epoch 120
      --batch_size 256 --workers 8 --log-every 100
    )
    ;;
esac
checkpoint=${CHECKPOINT:-$runs/bingo/pretrain/$where/checkpoint.pth}

"${launch[@]}" -m bingo.main_lincls --pretrained "$checkpoint" "${flags[@]}" "$@"
