#!/usr/bin/env bash
# Linear evaluation: bash kscl/run_lincls.sh [mini|small|medium|paper] [flags of kscl.main_lincls]
# CHECKPOINT names the pretrained weights, DATA_ROOT the folder of the data sets (paper: of train/ and val/), SET the
# small one, GPUS the processes, RUNS the folder of the outputs (runs).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | medium | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small, medium or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

runs=${RUNS:-runs}
where=$tier
case "$tier" in
  mini)
    # The linear protocol at toy size: a classifier on the pooled features of run_pretrain.sh mini; 30 epochs over
    # features of unaugmented images (--cached_train), seconds on two CPU cores.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    flags=(
      --data_dir data/mini/images --img_size 32 --cached_train
      --init_lr 0.3 --schedule 18,24 --end_epoch 30 --batch_size 64
    )
    ;;
  small)
    # CIFAR-10 at 400 images a class, the cheap probe; under a minute on two CPU cores. A comparison of arms, not the
    # full protocol: see run_arms.sh.
    set_name=${SET:-cifar10}
    where=small/$set_name
    flags=(
      --data_dir "${DATA_ROOT:-data}/$set_name" --img_size 32 --per_class 400 --cached_train
      --init_lr 0.3 --schedule 60,80 --end_epoch 100 --batch_size 256
    )
    ;;
  medium)
    # The network of run_pretrain.sh medium on the whole of CIFAR-10: augmented images, 100 epochs, one GPU. lr 30 as MoCo's
    # CIFAR-10 notebook recommends. Never run to its end here: no GPU was at hand.
    flags=(
      --data_dir "${DATA_ROOT:-data}/cifar10_full" --img_size 32 --init_lr 30 --decay_method cos --end_epoch 100
      --batch_size 512 --workers 0 --log-every 50
    )
    ;;
  paper)
    # ImageNet, ResNet-50, block 17: lr 30, batch 256, 100 epochs, x .1 at 60 and 80, best and last top-1 (the authors'
    # MoCo code). MoCo v2: 67.5. 500,400 steps of 256 images, one forward pass each; never run here, so no time.
    flags=(
      --data_dir "${DATA_ROOT:-data}" --init_lr 30 --schedule 60,80 --end_epoch 100
      --batch_size 256 --workers 8 --log-every 100
    )
    ;;
esac
checkpoint=${CHECKPOINT:-$runs/kscl/pretrain/$where/checkpoint.pth}

"${launch[@]}" -m kscl.main_lincls --pretrained "$checkpoint" "${flags[@]}" "$@"
