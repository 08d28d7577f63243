#!/usr/bin/env bash
# A teacher of our own (MoCo v2): bash bingo/run_teacher.sh [mini|small|paper] [flags of bingo.main_teacher]
# DATA_ROOT holds the data sets (SET picks one in the small tier), GPUS is the number of processes, RUNS the outputs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

out=${RUNS:-runs}/bingo/teacher/$tier
case "$tier" in
  mini)
    # MoCo v2 at toy size: 1,000 generated images, ResNet-10 of half the width, 32 pixels, 120 steps.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    flags=(
      --data_dir data/mini/images --cache --img_size 32 --arch resnet10 --width 32 --stem cifar_pool --log-every 5
      --batch_size 64 --bn_splits 2 --moco_k 512 --moco_m 0.99 --init_lr 0.03 --end_epoch 8 --workers 1
    )
    ;;
  small)
    # The teacher of the small tier: all 20,000 images of CIFAR-10, or all 10,000 of the 50 Tiny-ImageNet classes, at 32
    # pixels, 4,056 steps. A teacher of the students' 4,000 images and 2,480 steps was no better than they (NOTES.md).
    # --bn_splits with the keys shuffled over them: in one batch norm the keys know their queries (MoCo, shuffle-BN).
    # A queue of 16 steps: with 64 steps and m = 0.99 keys and queue drift apart and embeddings collapse (feat/std 0.03).
    # bf16 is fast on CPUs with AMX or AVX512-BF16 only; elsewhere --amp none.
    set_name=${SET:-cifar10} kept=(--cache)
    case "$set_name" in
      cifar10) epochs=13 ;;
      tiny_imagenet50) epochs=26 ;;
      *) epochs=50 kept=() ;; # images of your own, not decoded in memory
    esac
    out=$out/$set_name
    flags=(
      --data_dir "${DATA_ROOT:-data}/$set_name" "${kept[@]}" --img_size 32
      --arch resnet18 --width 32 --stem cifar_pool --amp bf16
      --batch_size 64 --bn_splits 2 --moco_k 1024 --moco_m 0.99 --init_lr 0.03 --end_epoch "$epochs"
      --workers 0 --threads 1
    )
    ;;
  paper)
    # MoCo v2 on ImageNet, 200 epochs, 8 GPUs x 32: 67.4 % linear top-1. The paper takes published weights instead.
    # One GPU: --bn_splits 8, or the keys know their queries by one batch norm.
    flags=(--data_dir "${DATA_ROOT:-data}" --arch resnet50 --end_epoch 200 --workers 4 --save-every 1000 --log-every 100)
    ;;
esac

"${launch[@]}" -m bingo.main_teacher --output-dir "$out" "${flags[@]}" "$@"
next_job bingo/run_knn.sh "$tier"
