#!/usr/bin/env bash
# Distillation, stage 2: bash bingo/run_pretrain.sh [mini|small|paper] [flags of bingo.main_moco]
# DATA_ROOT, SET, GPUS, RUNS as in run_teacher.sh; paper: TEACHER names the file of the teacher.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

runs=${RUNS:-runs}/bingo
out=$runs/pretrain/$tier
case "$tier" in
  mini)
    # The release's loss at toy size: ResNet-10 student of a quarter of the width, 120 steps.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    flags=(
      --data_dir data/mini/images --cache --img_size 32 --s_arch resnet10 --s_width 16 --s_stem cifar_pool
      --t_arch resnet10 --t_width 32 --t_stem cifar_pool --log-every 5
      --pretrain_path "$runs/teacher/mini/checkpoint.pth" --corr_npy "$runs/imgs_corr/mini.npy"
      --batch_size 64 --moco_k 512 --init_lr 0.06 --end_epoch 8 --warmup_epochs 3 --workers 1
    )
    ;;
  small)
    # 4,000 real images at 32 pixels, 620 steps; run_arms.sh trains every arm with these flags.
    # bf16 is fast on CPUs with AMX or AVX512-BF16 only; elsewhere --amp none.
    set_name=${SET:-cifar10} kept=()
    case "$set_name" in
      cifar10) kept=(--per_class 400 --cache) ;;
      tiny_imagenet50) kept=(--per_class 80 --cache) ;;
      *) own=1 ;; # images of your own: all of them, and not decoded in memory
    esac
    out=$out/$set_name
    flags=(
      --data_dir "${DATA_ROOT:-data}/$set_name" "${kept[@]}" --img_size 32 --amp bf16
      --s_arch resnet10 --s_width 16 --s_stem cifar_pool --t_arch resnet18 --t_width 32 --t_stem cifar_pool
      --pretrain_path "$runs/teacher/small/$set_name/checkpoint.pth" --corr_npy "$runs/imgs_corr/$set_name.npy"
      --batch_size 64 --moco_k 1024 --init_lr 0.06 --end_epoch 10 --warmup_epochs 3 --workers 0 --threads 1
    )
    ;;
  paper)
    # Table of the paper: R18 <- SwAV R50x2, 200 epochs, 8 GPUs x 32; linear top-1 65.5. --s_arch resnet34: 68.9.
    # R18 <- MoCo R50: --t_arch resnet50 --pretrain_alg moco, 800 epochs of MoCo: 64.0. EfficientNet-B0:
    # --s_arch efficientnet-b0 --moco_t 0.12 --wd 4e-5, 69.3. --teacher_bn train is what the release does.
    # One GPU: --bn_splits 8, or else --teacher_bn eval.
    flags=(
      --data_dir "${DATA_ROOT:-data}" --s_arch resnet18 --t_arch resnet50w2 --pretrain_alg swav
      --pretrain_path "${TEACHER:-swav_RN50w2_400ep_pretrain.pth.tar}" --corr_npy imgs_corr/imgs_corr_swav_epoch400.npy
      --teacher_bn train --workers 4 --save-every 1000 --log-every 100
    )
    ;;
esac

"${launch[@]}" -m bingo.main_moco --output-dir "$out" "${flags[@]}" "$@"
if [ -z "${own:-}" ]; then next_job bingo/run_lincls.sh "$tier"; fi # the run has named its own evaluation
