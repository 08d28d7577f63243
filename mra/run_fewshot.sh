#!/usr/bin/env bash
# Few-shot classification with MRA on the base classes: bash mra/run_fewshot.sh [mini|small|paper] [flags of
# mra.main_fewshot]
# MAE names the autoencoder (default: run_pretrain.sh's; none: the baseline), DATA_ROOT the folder of the data sets, SET
# the set, GPUS the processes, RUNS the folder of the outputs.
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
root=${DATA_ROOT:-data}
case "$tier" in
  mini)
    # 24 base, 8 validation and 8 novel classes of generated digits, 30 images each; half a minute on one core. The
    # autoencoder is run_pretrain.sh's, of other images.
    "$PYTHON" -m shared_utils.lab.mini fewshot >/dev/null
    flags=(
      --data_path data/mini/fewshot --input_size 48 --arch resnet8 --crop padded --cache --attn_source last_attn
      --epochs 4 --batch_size 48 --decay cos
      --episodes 200 --eval_every 4 --workers 0 --threads 1 --log-every 2
    )
    ;;
  small)
    # CIFAR-FS, 64 / 16 / 20 classes, 9,600 images of base classes, 60 epochs of ResNet-12 of a quarter of the width;
    # minutes on a GPU (an estimate). Its autoencoder: SET=cifarfs bash mra/run_pretrain.sh small
    set_name=${SET:-cifarfs}
    where=small/$set_name
    flags=(
      --data_path "$root/$set_name" --input_size 32 --width 16 --crop padded --cache --attn_source last_attn
      --epochs 60 --decay cos --eval_every 20 --workers 2 --log-every 20
    )
    ;;
  paper)
    # mini-ImageNet 64 / 16 / 20 classes, 84 pixels (p = 12: 7 x 7 patches), ResNet-12, 100 epochs; the paper's numbers
    # are not known. Never run here, so no time is given. Its autoencoder, of the base classes alone:
    # bash mra/run_pretrain.sh paper --data_path $DATA_ROOT/BASE --input_size 84 --patch_size 12, and MAE=FILE here.
    where=paper/miniImagenet
    flags=(--data_path "$root/miniImagenet" --workers 8 --log-every 50)
    ;;
esac
mae=${MAE:-$runs/mra/pretrain/$where/checkpoint.pth}
if [ "$mae" != none ]; then flags+=(--mae_ckpt "$mae"); fi

"${launch[@]}" -m mra.main_fewshot --output-dir "$runs/mra/fewshot/$where" "${flags[@]}" "$@"
