#!/usr/bin/env bash
# The autoencoder: bash mra/run_pretrain.sh [mini|small|paper] [flags of mra.main_pretrain]
# DATA_ROOT names the folder of the data sets, SET the small tier's (texture, cifar10, or mine: class folders of your
# own below $DATA_ROOT/mine), GPUS the processes, RUNS the folder of the outputs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

out=${RUNS:-runs}/mra/pretrain/$tier
case "$tier" in
  mini)
    # MAE at toy size: 4,000 generated images of 48 pixels, 36 patches, 0.6 M
    # parameters, 6 epochs, about a minute on one core; the loss falls from about 2.2 to 0.7. After 2 epochs the last
    # block's attention keeps 32 % of the object where random masks keep 60, after 6 epochs 65 %.
    "$PYTHON" -m mra.lab.textures >/dev/null
    flags=(
      --data_path data/mini/texture_shortcut --input_size 48 --model mae_tiny_patch8 --resident
      --batch_size 64 --epochs 6 --warmup_epochs 1 --lr 0.001 --workers 0 --threads 1 --log-every 10
    )
    ;;
  small)
    # One autoencoder a set, trained on its training images alone and shared by all arms. texture: 4,000 generated images
    # of 48 pixels, 60 epochs. cifar10: 20,000 images of 32 pixels, 64 patches, 16 epochs. On one CPU core 10 and
    # about 25 minutes; on a GPU about a minute, an estimate.
    set_name=${SET:-texture}
    out=$out/$set_name
    flags=(--resident --workers 0 --threads 1 --log-every 50)
    if [ "$set_name" = texture ]; then
      "$PYTHON" -m mra.lab.textures >/dev/null
      flags+=(--data_path data/mini/texture_shortcut --input_size 48 --model mae_tiny_patch8)
      flags+=(--batch_size 64 --epochs 60 --warmup_epochs 4)
    elif [ "$set_name" = mine ]; then # a fifth of each class is never seen, unless test images lie apart
      flags+=(--data_path "${DATA_ROOT:-data}/$set_name" --holdout 0.2 --input_size 64 --model mae_tiny_patch8)
      flags+=(--batch_size 32 --epochs 200 --warmup_epochs 10)
    else
      flags+=(
        --data_path "${DATA_ROOT:-data}/$set_name" --input_size 32 --model mae_tiny_patch4
        --batch_size 256 --epochs 16 --warmup_epochs 2
      )
    fi
    flags+=(--lr 0.0015)
    ;;
  paper)
    # The light autoencoder on ImageNet, 224 pixels, 196 patches: 200 epochs and the widths are choices of ours, raw
    # pixels as targets inferred; the rest is MAE's recipe. 4,096 images a step with 8 GPUs. Never run here, so no time
    # is given. Its public files (mae_visualize_vit_*.pth) can be taken instead: MAE=FILE bash mra/run_supervised.sh paper.
    flags=(
      --data_path "${DATA_ROOT:-data}" --model mae_mini_patch16 --batch_size 256 --accum_iter 2
      --epochs 200 --warmup_epochs 20 --blr 1.5e-4 --workers 10 --log-every 100
    )
    ;;
esac

"${launch[@]}" -m mra.main_pretrain --output-dir "$out" "${flags[@]}" "$@"
if [ $# = 0 ]; then next_job mra/run_supervised.sh "$tier"; fi # else the lines above name what this run made
