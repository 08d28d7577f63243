#!/usr/bin/env bash
# Train: bash sscl/run_train.sh [mini|small|paper] [flags of sscl.main]
# DATA_ROOT names the folder of the data sets (paper: of train/ and val/), LABELS the labelled images of a class at the
# small tier (25), PERCENT those of the paper tier (1 or 10), GPUS the processes, RUNS the folder of the outputs.
# SET=mine at the small tier: own photographs, $DATA_ROOT/mine/{labelled/CLASS/*,unlabelled/*}.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

out=${RUNS:-runs}/sscl/train/$tier
case "$tier" in
  mini)
    # Both exchanges at toy size: 1,000 generated images of coloured digits (so no mirror images), 4 labels a class,
    # ResNet-10 of a quarter of the width, 150 steps, prototypes renewed 4 times; L_x falls from 2.3 to 0.1. lambda_c
    # 0.2, so that the sum falls too: L_c grows with the number of neighbours. Half a minute on two CPU cores.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    flags=(
      --data data/mini/images --cache --img_size 32 --no_flip --weak shift --key_view weak --labels_per_class 4
      --arch resnet10 --width 16 --stem cifar_pool --bn_splits 2 --batch_labelled 16 --mu 4 --epochs 10 --pl_start 2
      --moco_k 256 --moco_m 0.99 --lambda_u 1 --lambda_c 0.2 --da window --theta 0.8 --theta_on raw --proto_every 4 --num_nn 10
      --lr 0.06 --lr_batch 0 --warmup_epochs 0.5 --wd 5e-4 --workers 1 --log-every 5
    )
    ;;
  small)
    # 8,000 images of CIFAR-10 at 32 pixels, LABELS of them a class labelled, 7 epochs = 875 steps; a minute and a
    # half on one core. run_arms.sh trains every arm of README.md's table with these flags. The threshold is of the distribution
    # before Sharpen. A product is sharper than its factors: 0.95 of it covers as many images as 0.7 without calibration
    # (0.50 and 0.52 in a trial run, seed 0, whose top-1 was seen too), which is what arms without calibration take. --bn_splits 2
    # with the keys shuffled: within one batch norm the keys know their queries. bf16 is fast on CPUs with AMX only;
    # elsewhere --amp none.
    labels=${LABELS:-25}
    out=$out/cifar10-$labels
    flags=(
      --data "${DATA_ROOT:-data}/cifar10" --per_class 800 --cache --img_size 32 --weak shift --key_view weak
      --labels_per_class "$labels" --arch resnet10 --width 16 --stem cifar_pool --bn_splits 2 --batch_labelled 16 --mu 4
      --epochs 7 --pl_start 1 --moco_k 1024 --moco_m 0.99 --lambda_u 1 --da window --theta 0.95 --theta_on raw
      --proto_every 2 --num_nn 20 --lr 0.06 --lr_batch 0 --warmup_epochs 0.5 --wd 5e-4 --amp bf16 --workers 0 --threads 1
      --log-every 5
    )
    if [ "${SET:-}" = mine ]; then
      # ResNet-18 at 64 pixels, 60 epochs; of 840 images 780 steps. For a better network --img_size 224, and --init
      # timm:resnet18, which is downloaded.
      out=${RUNS:-runs}/sscl/train/small/mine
      flags=(
        --labelled "${DATA_ROOT:-data}/mine/labelled" --unlabelled "${DATA_ROOT:-data}/mine/unlabelled" --cache
        --img_size 64 --key_view weak --arch resnet18 --bn_splits 2 --batch_labelled 16 --mu 4 --epochs 60 --moco_k 512
        --moco_m 0.99 --lambda_u 1 --da window --theta 0.95 --theta_on raw --lr 0.06 --lr_batch 0 --warmup_epochs 2
        --wd 5e-4 --amp bf16 --workers 0 --threads 1
      )
    fi
    ;;
  paper)
    # ImageNet with 1 % (PERCENT=10: 10 %) of the labels, ResNet-50, 200 epochs, 8 GPUs x (8 labelled + 40 unlabelled);
    # the paper: 60.2 (72.1) top-1. The constants are inferred, see Differences. SimCLR's lists 1percent.txt and
    # 10percent.txt lie beside train/ and val/. On one GPU: --bn_splits 8. Never run here, so no time is given.
    percent=${PERCENT:-1}
    out=$out/${percent}percent
    flags=(
      --data "${DATA_ROOT:-data}" --split_file "${DATA_ROOT:-data}/${percent}percent.txt"
      --workers 8 --save-every 1000 --log-every 100
    )
    ;;
esac

"${launch[@]}" -m sscl.main --output-dir "$out" "${flags[@]}" "$@"
