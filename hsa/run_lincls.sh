#!/usr/bin/env bash
# Linear evaluation: bash hsa/run_lincls.sh [mini|small|medium|paper] [flags of hsa.main_lincls]
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
    # Section 4 of the paper at toy size: classifiers on layer3 and layer4 of the frozen network of run_pretrain.sh mini;
    # 30 epochs over features of unaugmented images (--cached_train), seconds on two CPU cores.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    flags=(
      --data_dir data/mini/images --img_size 32 --cached_train
      --init_lr 0.3 --schedule 18,24 --end_epoch 30 --batch_size 64
    )
    ;;
  small)
    # CIFAR-10 at 400 images a class (SET=tiny_imagenet50: 80 a class), the cheap probe of layer3 and layer4; under a
    # minute on two CPU cores. A comparison of arms, not the paper's protocol: see run_arms.sh.
    set_name=${SET:-cifar10} kept=()
    where=small/$set_name
    case "$set_name" in
      cifar10) kept=(--per_class 400 --img_size 32) ;;
      tiny_imagenet50) kept=(--per_class 80 --img_size 32) ;;
    esac
    flags=(
      --data_dir "${DATA_ROOT:-data}/$set_name" "${kept[@]}" --cached_train
      --init_lr 0.3 --schedule 60,80 --end_epoch 100 --batch_size 256
    )
    ;;
  medium)
    # The network of run_pretrain.sh medium on the whole of CIFAR-10: augmented images, 100 epochs, one GPU. lr 30 as MoCo's
    # CIFAR-10 notebook recommends. Never run to its end here: no GPU was at hand.
    flags=(
      --data_dir "${DATA_ROOT:-data}/cifar10_full" --img_size 32 --selected_feat_id layer3,last
      --init_lr 30 --decay_method cos --end_epoch 100 --batch_size 512 --workers 0 --log-every 50
    )
    ;;
  paper)
    # ImageNet, ResNet-50: 76.4 top-1 of the first abstract after a long multi-crop run; blocks 14 and 17 at once (the
    # release: 17). lr 30, batch 256, 100 epochs, x .1 at 60 and 80 (release scripts/lincls/single_crop_200ep.sh).
    # 500,400 steps of 256 images, one forward pass each; never run here, so no time is given.
    flags=(
      --data_dir "${DATA_ROOT:-data}" --selected_feat_id 14,17 --init_lr 30 --schedule 60,80 --end_epoch 100
      --batch_size 256 --workers 8 --log-every 100
    )
    ;;
esac
checkpoint=${CHECKPOINT:-$runs/hsa/pretrain/$where/checkpoint.pth}

"${launch[@]}" -m hsa.main_lincls --pretrained "$checkpoint" "${flags[@]}" "$@"
