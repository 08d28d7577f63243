#!/usr/bin/env bash
# SaGe: bash sage/run_pretrain.sh [mini|small|paper] [flags of sage.train]
# EVALUATOR names the evaluator's checkpoint (default: that of run_evaluator.sh), DATA_ROOT the folder of the data sets
# (paper: of train/ and val/), SET the small tier's, GPUS the processes, RUNS the folder of the outputs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

runs=${RUNS:-runs}/sage
where=$tier
case "$tier" in
  mini)
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    # As run_evaluator.sh mini, with the decoder and the evaluator; 150 updates. All terms fall, their
    # sum from 6 or 8, by the CPU's kernels, to 1.3. Adam at 3e-3: at 1e-3 the recovered images hardly change in so few.
    flags=(
      --data_dir data/mini/images --cache --img_size 32 --arch resnet10 --width 16 --stem cifar_pool --hid_channels 256
      --out_channels 64 --decoder_width 64 --imgs_per_gpu 64 --update_interval 1 --lr 3 --blur_max 0.5
      --warmup_iters 1 --decoder_lr 3e-3 --total_epochs 10 --workers 1 --log-every 5
    )
    ;;
  small)
    # As run_evaluator.sh small; run_arms.sh trains every arm of README.md's tables with these flags. The decoder's Adam
    # at 1e-3 and half of the release's relative decoder width, so that SaGe costs about twice a BYOL step, as there.
    set_name=${SET:-cifar10} where=small/${SET:-cifar10}
    case "$set_name" in
      cifar10) data=(--data_dir "${DATA_ROOT:-data}/$set_name" --per_class 400 --cache --total_epochs 5) ;;
      mini_attributes)
        "$PYTHON" -m shared_utils.lab.mini images >/dev/null
        data=(--data_dir data/mini/images --cache --total_epochs 15)
        ;;
      *) own=1 data=(--data_dir "${DATA_ROOT:-data}/$set_name" --total_epochs 15) ;; # yours, not decoded in memory
    esac
    flags=(
      "${data[@]}" --img_size 32 --arch resnet10 --width 16 --stem cifar_pool --hid_channels 256
      --out_channels 64 --decoder_width 64 --imgs_per_gpu 64 --update_interval 1 --lr 3 --blur_max 0.5
      --warmup_iters 1 --decoder_lr 1e-3 --amp bf16 --workers 0 --threads 1 --log-every 10
    )
    ;;
  paper)
    # The release's r50_bs64_acc8_ep300: ResNet-50, ImageNet, 300 epochs, 8 GPUs x 64 x 8 = 4,096 (the release: 32 GPUs
    # x 64 x 2), LARS 4.8, decoder's Adam 0.048. Its linear top-1 is not known. Never run here, so no time is given.
    flags=(
      --data_dir "${DATA_ROOT:-data}" --imgs_per_gpu 64 --update_interval 8 --workers 8 --save-every 100 --log-every 25
    )
    ;;
esac
flags=(--evaluator "${EVALUATOR-$runs/evaluator/$where/checkpoint.pth}" "${flags[@]}")

"${launch[@]}" -m sage.train --output-dir "$runs/pretrain/$where" "${flags[@]}" "$@"
if [ -z "${own:-}" ]; then next_job sage/run_lincls.sh "$tier"; fi # the run has named its own evaluation
