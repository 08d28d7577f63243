#!/usr/bin/env bash
# Bags, stage 1: bash bingo/run_knn.sh [mini|small|paper] [flags of bingo.compute_knn]
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
case "$tier" in
  mini)
    # Five neighbours of each of the 1,000 generated images.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    flags=(
      --data_dir data/mini/images --cache --img_size 32 --arch resnet10 --t_width 32 --t_stem cifar_pool
      --ckpt_name "$runs/teacher/mini/checkpoint.pth" --corr_dir "$runs/imgs_corr" --corr_name mini.npy
    )
    ;;
  small)
    set_name=${SET:-cifar10} kept=() # images of your own: all of them, and not decoded in memory
    case "$set_name" in
      cifar10) kept=(--per_class 400 --cache) ;;
      tiny_imagenet50) kept=(--per_class 80 --cache) ;;
    esac
    flags=(
      --data_dir "${DATA_ROOT:-data}/$set_name" "${kept[@]}" --img_size 32
      --arch resnet18 --t_width 32 --t_stem cifar_pool --workers 0 --threads 1
      --ckpt_name "$runs/teacher/small/$set_name/checkpoint.pth" --corr_dir "$runs/imgs_corr" --corr_name "$set_name.npy"
    )
    ;;
  paper)
    # SwAV's ResNet-50x2 on ImageNet (release run_knn.sh): K = 5. For MoCo: --arch resnet50 --pretrain_alg moco.
    # The features of 1.28 M images, 4096 dimensions, are 21 GB: --feature_file keeps them on disk.
    flags=(
      --data_dir "${DATA_ROOT:-data}" --arch resnet50w2 --pretrain_alg swav --batch_size 256 --workers 8
      --ckpt_name "${TEACHER:-swav_RN50w2_400ep_pretrain.pth.tar}" --corr_name imgs_corr_swav_epoch400.npy
      --feature_file "$runs/imgs_corr/features.npy"
    )
    ;;
esac

"${launch[@]}" -m bingo.compute_knn "${flags[@]}" "$@"
next_job bingo/run_pretrain.sh "$tier"
