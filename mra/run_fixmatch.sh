#!/usr/bin/env bash
# Semi-supervised training, FixMatch with MRA: bash mra/run_fixmatch.sh [mini|small|paper] [flags of mra.main_fixmatch]
# MAE names the autoencoder (default: run_pretrain.sh's; none: plain FixMatch), DATA_ROOT the folder of the data sets, SET
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
    # Eight generated shapes, 10 labels each and 4,000 images without; 40 steps, half a minute on one core. Averages of
    # weights and batch-norm statistics look back ten steps in place of a thousand.
    "$PYTHON" -m mra.lab.textures >/dev/null
    flags=(
      --data_path data/mini/texture_shortcut --tests test_b,test_a
      --input_size 48 --per_class 10 --arch resnet8 --attn_source last_attn --iterations 40 --epoch_steps 20
      --batch_size 16 --mu 2 --threshold 0.6 --ema 0.9 --bn_momentum 0.1 --lr 0.05 --workers 0 --threads 1 --log-every 2
    )
    ;;
  small)
    # CIFAR-10 with 25 labels a class and 20,000 images without, WRN-28-2, 4,096 steps; minutes on a GPU (estimate).
    set_name=${SET:-cifar10}
    where=small/$set_name
    flags=(
      --data_path "$root/$set_name" --input_size 32 --per_class 25 --cache --attn_source last_attn
      --iterations 4096 --epoch_steps 512 --batch_size 32 --mu 3 --workers 2 --log-every 50
    )
    ;;
  paper)
    # SET=stl10: WRN-37-2, an official fold (--label_seed 0 to 9) of 1,000 labels, 100,000 images without. SET=cifar10 and
    # cifar100: 4,000 and 10,000 labels (CIFAR is not confirmed as the paper's). 2^20 steps; the paper's numbers are not
    # known. Never run here, so no time is given. The autoencoder must be one of the set's training images:
    # bash mra/run_pretrain.sh paper --dataset stl10 --input_size 96 --model mae_tiny_patch8, and MAE=FILE here.
    set_name=${SET:-stl10}
    where=paper/$set_name
    flags=(--data_path "$root" --dataset "$set_name" --workers 8 --log-every 100)
    case "$set_name" in
      stl10) flags+=(--input_size 96 --arch wrn37-2 --per_class 100) ;;
      cifar10) flags+=(--input_size 32 --arch wrn28-2 --per_class 400) ;;
      cifar100) flags+=(--input_size 32 --arch wrn28-8 --per_class 100 --wd 0.001) ;;
      *)
        echo "error: unknown SET '$set_name'; choose stl10 cifar10 cifar100" >&2
        exit 2
        ;;
    esac
    ;;
esac
mae=${MAE:-$runs/mra/pretrain/$where/checkpoint.pth}
if [ "$mae" != none ]; then flags+=(--mae_ckpt "$mae"); fi

"${launch[@]}" -m mra.main_fixmatch --output-dir "$runs/mra/fixmatch/$where" "${flags[@]}" "$@"
