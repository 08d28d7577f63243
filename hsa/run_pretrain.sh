#!/usr/bin/env bash
# Pretrain: bash hsa/run_pretrain.sh [mini|small|medium|paper] [flags of hsa.main_moco]
# DATA_ROOT names the folder of the data sets, SET the small tier's, GPUS the processes, RUNS the folder of the outputs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | medium | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small, medium or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

out=${RUNS:-runs}/hsa/pretrain/$tier
case "$tier" in
  mini)
    # The release's loss at toy size: 1,000 generated images of coloured digits, ResNet-10 of a quarter of the width,
    # 150 steps, neighbours renewed once; the loss falls from 5.9, once the queue is full, to 5.1.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    flags=(
      --data_dir data/mini/images --cache --img_size 32 --arch resnet10 --width 16 --stem cifar_pool --bn_splits 2
      --batch_size 64 --moco_k 512 --moco_m 0.99 --init_lr 0.06 --end_epoch 10 --cluster_freq 5
      --warmup_epochs 3 --workers 1 --log-every 5
    )
    ;;
  small)
    # bf16 is fast on CPUs with AMX or AVX512-BF16 only; elsewhere --amp none.
    # 4,000 real images at 32 pixels, 620 steps, 3 minutes on one core (MoCo v2: 80 s); run_arms.sh trains every
    # arm with these flags. --bn_splits 2 with the keys shuffled: two shares of 32 images, as on the
    # release's GPUs; within one batch norm the keys know their queries.
    set_name=${SET:-cifar10} kept=()
    case "$set_name" in
      cifar10) kept=(--per_class 400 --cache) ;;
      tiny_imagenet50) kept=(--per_class 80 --cache) ;;
      *) own=1 ;; # images of your own: all of them, and not decoded in memory
    esac
    out=$out/$set_name
    flags=(
      --data_dir "${DATA_ROOT:-data}/$set_name" "${kept[@]}" --img_size 32
      --arch resnet10 --width 16 --stem cifar_pool --bn_splits 2 --batch_size 64 --moco_k 1024 --moco_m 0.99
      --init_lr 0.06 --end_epoch 10 --warmup_epochs 3 --cluster_freq 3 --amp bf16 --workers 0 --threads 1
    )
    ;;
  medium)
    # One GPU: the whole of CIFAR-10 in its memory, ResNet-18 with the CIFAR stem, 200 epochs of 97 steps. The settings of
    # MoCo's own CIFAR-10 notebook (facebookresearch/moco, colab): with --mode moco its 82.6 by 200 nearest neighbours is
    # the anchor; it has a linear head and no blur, MoCo v2 an MLP and blur. DATA_ROOT holds cifar10_full/train,test/CLASS.
    # Never run to its end here: no GPU was at hand.
    flags=(
      --data_dir "${DATA_ROOT:-data}/cifar10_full" --cache --img_size 32 --arch resnet18 --stem cifar --bn_splits 8
      --batch_size 512 --moco_k 4096 --moco_m 0.99 --moco_t 0.1 --init_lr 0.06 --wd 5e-4 --end_epoch 200
      --min_scale 0.08 --workers 0 --log-every 50
    )
    ;;
  paper)
    # The release's single_crop_200ep: ResNet-50, ImageNet, 200 epochs, 8 GPUs x 32, one level, single crop; linear top-1
    # about 71 to 72 (recalled, unverified). One GPU: --bn_splits 8. Level 3 and multi-crop, reconstructed, with which
    # the paper reports 76.4 (800 epochs, recalled): --mode paper --end_epoch 800. MoCo v2: --mode moco, 67.5 after 200.
    # --feature_dir auto: the 10.5 GB of a refresh lie in the run's own folder, so that several runs may go at once.
    # MoCo v2 took the author 0.18 s a step on 8 GPUs, 50 h for 200 epochs; 2.75 times that is to be expected here.
    flags=(
      --data_dir "${DATA_ROOT:-data}" --feature_dir auto --workers 4 --save-every 1000 --log-every 100
    )
    ;;
esac

"${launch[@]}" -m hsa.main_moco --output-dir "$out" "${flags[@]}" "$@"
if [ -z "${own:-}" ]; then next_job hsa/run_lincls.sh "$tier"; fi # the run has named its own evaluation
