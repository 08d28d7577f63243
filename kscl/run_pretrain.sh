#!/usr/bin/env bash
# Pretrain: bash kscl/run_pretrain.sh [mini|small|medium|paper] [flags of kscl.main_kscl]
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

out=${RUNS:-runs}/kscl/pretrain/$tier
case "$tier" in
  mini)
    # Five shots at toy size: 1,000 generated images of coloured digits, ResNet-10 of a quarter of the width, 150 steps.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    flags=(
      --data_dir data/mini/images --cache --img_size 32 --arch resnet10 --width 16 --stem cifar_pool --bn_splits 2
      --batch_size 64 --moco_k 512 --moco_m 0.99 --init_lr 0.06 --end_epoch 10 --workers 1 --log-every 5
    )
    ;;
  small)
    # bf16 is fast on CPUs with AMX or AVX512-BF16 only; elsewhere --amp none.
    # 4,000 real images at 32 pixels, 496 steps, about 2 minutes on one core (MoCo v2: --shots 1 --sim signed, 1 minute);
    # run_arms.sh trains every arm of README.md's table with these flags. --bn_splits 2 with the keys shuffled: two
    # shares of 32 images, as on two GPUs; within one batch norm the keys know their queries.
    set_name=${SET:-cifar10} kept=()
    case "$set_name" in
      cifar10) kept=(--per_class 400 --cache) ;;
      *) own=1 ;; # images of your own: all of them, and not decoded in memory
    esac
    out=$out/$set_name
    flags=(
      --data_dir "${DATA_ROOT:-data}/$set_name" "${kept[@]}" --img_size 32
      --arch resnet10 --width 16 --stem cifar_pool --bn_splits 2 --batch_size 64 --moco_k 1024 --moco_m 0.99
      --init_lr 0.06 --end_epoch 8 --amp bf16 --workers 0 --threads 1
    )
    ;;
  medium)
    # One GPU: the whole of CIFAR-10 in its memory, ResNet-18 with the CIFAR stem, 200 epochs of 97 steps. The settings of
    # MoCo's own CIFAR-10 notebook (facebookresearch/moco, colab: 82.6 by 200 nearest neighbours), but MoCo v2's MLP, blur
    # and crops from 0.2 of the area (there 0.08); hsa's medium tier has that anchor. DATA_ROOT holds
    # cifar10_full/train,test/CLASS.
    # Never run to its end here: no GPU was at hand.
    flags=(
      --data_dir "${DATA_ROOT:-data}/cifar10_full" --cache --img_size 32 --arch resnet18 --stem cifar --bn_splits 8
      --batch_size 512 --moco_k 4096 --moco_m 0.99 --moco_t 0.1 --init_lr 0.06 --wd 5e-4 --end_epoch 200
      --workers 0 --log-every 50
    )
    ;;
  paper)
    # ImageNet, ResNet-50, 200 epochs, 8 GPUs x 32 images, K = 5, 90 % of the energy [inferred]; 800 epochs: --end_epoch
    # 800. The paper's numbers are not known; MoCo v2 (--shots 1 --sim signed) has 67.5 linear top-1, 71.1 after 800.
    # One GPU: --bn_splits 8. MoCo v2 takes about 53 h on 8 V100; five shots cost twice its passes and three times its
    # augmentations, so about 106 h are to be expected. Never run here.
    flags=(
      --data_dir "${DATA_ROOT:-data}" --workers 8 --save-every 1000 --log-every 100
    )
    ;;
esac

"${launch[@]}" -m kscl.main_kscl --output-dir "$out" "${flags[@]}" "$@"
if [ -z "${own:-}" ]; then next_job kscl/run_lincls.sh "$tier"; fi # the run has named its own evaluation
