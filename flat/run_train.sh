#!/usr/bin/env bash
# Train on base classes: bash flat/run_train.sh [mini|small|paper] [flags of flat.train]
# DATA_ROOT names the folder of the data sets, SET the small tier's (cifarfs5, cifarfs5fit, cifarfs,
# cifarfs_full), GPUS the processes, RUNS the folder of the outputs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

out=${RUNS:-runs}/flat/train/$tier
case "$tier" in
  mini)
    "$PYTHON" -m shared_utils.lab.mini fewshot >/dev/null
    # 24 generated base classes of digits in several styles (8 validation, 8 novel ones), 25 images each, Conv4 of half
    # the width at 32 pixels, 225 steps; the loss falls from about 4.5 to 2.2 in half a minute on two CPU cores.
    flags=(
      --dataset folder --data_dir data/mini/fewshot --cache --image_size 32 --width 32 --method cosine --num_classes 24
      --batch_size 64 --train_aug
      --crop padded --decoder mlp --holdout 5 --stop_epoch 25 --val_freq 5 --workers 1 --log-every 5
    )
    ;;
  small)
    # CIFAR-FS, 120 training images and 30 held-out ones of each base class; run_arms.sh trains every arm of README.md's
    # table with these flags. cifarfs5: 5 of the 64 base classes, 540 steps; cifarfs: all of them, 1,200 steps; one to
    # four minutes on one core. cifarfs5fit: 30 training images of each of 5 base classes, 240 epochs (480 steps), so that
    # the base classes are over-fitted, as the paper assumes. cifarfs_full: the data set itself, $DATA_ROOT/cifarfs_full
    # with 600 images of each of 64 base classes, Conv4 of 64 channels, 9,000 steps; a quarter of an hour to half an hour
    # on one core (estimated from its first steps). bf16 is fast on CPUs with AMX or AVX512-BF16 only;
    # elsewhere --amp none.
    set_name=${SET:-cifarfs5}
    out=$out/$set_name
    flags=(
      --dataset cifarfs --data_dir "${DATA_ROOT:-data}" --cache --width 32 --method cosine --mean_std cifar
      --batch_size 64 --train_aug --crop padded --decoder mlp --holdout 30 --per_class 120 --amp bf16 --workers 0
      --threads 1
    )
    if [ "$set_name" = cifarfs5 ]; then
      flags+=(--base_classes 5 --num_classes 5 --stop_epoch 60 --val_freq 20)
    elif [ "$set_name" = cifarfs5fit ]; then
      flags+=(--base_classes 5 --num_classes 5 --per_class 30 --stop_epoch 240 --val_freq 80 --amp none)
    elif [ "$set_name" = cifarfs_full ]; then
      flags+=(
        --data_dir "${DATA_ROOT:-data}/cifarfs_full" --width 64 --holdout 0 --per_class 0 --num_classes 64
        --recipe cosine --stop_epoch 15 --log-every 100
      )
    elif [ "$set_name" = cifarfs ]; then
      flags+=(--num_classes 64 --stop_epoch 10 --val_freq 5)
    else
      echo "error: unknown SET '$set_name'; choose cifarfs5, cifarfs5fit, cifarfs or cifarfs_full" >&2
      exit 2
    fi
    ;;
  paper)
    # mini-ImageNet, CloserLookFewShot's protocol: Adam 1e-3, batch 16, 400 epochs of 38,400 images, lambda 1
    # (inferred). ResNet18 takes 224 pixels: --model ResNet18; CUB: --dataset CUB (200 epochs). The paper's numbers are
    # not known; baseline++ reaches 48.24 / 66.43 with Conv4, 51.87 / 75.68 with ResNet18. 960,000 steps, never run
    # here, so no time is given.
    flags=(--dataset miniImagenet --data_dir "${DATA_ROOT:-data}" --train_aug --workers 8 --log-every 100)
    ;;
esac

"${launch[@]}" -m flat.train --output-dir "$out" "${flags[@]}" "$@"
# A run in another folder than the tier's has named its next command.
next_job flat/run_eval.sh "$tier"
