#!/usr/bin/env bash
# Few labels: bash bingo/run_semi.sh [mini|small|paper] [flags of bingo.main_semi]
# CHECKPOINT names the pretrained weights, DATA_ROOT the folder of the data sets (paper: of train/ and val/), SET the
# small one, GPUS the processes, RUNS the folder of the outputs (runs).
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
case "$tier" in
  mini)
    # A tenth of the labels of the mini images, the whole student of run_pretrain.sh mini; seconds on two CPU cores.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    flags=(
      --data_dir data/mini/images --img_size 32 --fraction 0.1
      --end_epoch 10 --batch_size 32 --log-every 5
    )
    ;;
  small)
    # A tenth of 400 (SET=tiny_imagenet50: 80) labels a class, drawn by --seed; about a minute on two CPU cores.
    set_name=${SET:-cifar10} per_class=400
    where=small/$set_name
    if [ "$set_name" = tiny_imagenet50 ]; then per_class=80; fi
    flags=(
      --data_dir "${DATA_ROOT:-data}/$set_name" --img_size 32 --per_class "$per_class" --cache --fraction 0.1
      --end_epoch 30 --batch_size 64
    )
    ;;
  paper)
    # ImageNet with 1 % of the labels; 10 %: --labels "$DATA_ROOT/10percent.txt" and another --output-dir.
    # ResNet-18 from ResNet-50x2: 48.2 top-1, and 60.2 with 10 % (release README).
    # $DATA_ROOT is the folder of train/ and val/; SimCLR's lists of labelled images lie beside them. Epochs and learning
    # rates are inferred from the common protocol, so sweep them before quoting; never run here, so no time is given.
    flags=(
      --data_dir "${DATA_ROOT:-data}" --labels "${DATA_ROOT:-data}/1percent.txt"
      --workers 8 --log-every 50
    )
    ;;
esac
checkpoint=${CHECKPOINT:-$runs/bingo/pretrain/$where/checkpoint.pth}

"${launch[@]}" -m bingo.main_semi --pretrained "$checkpoint" "${flags[@]}" "$@"
