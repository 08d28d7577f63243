#!/usr/bin/env bash
# Fine-grained recognition: bash sage/run_finegrained.sh [mini|small|paper] [flags of sage.main_finegrained]
# SET is cub, cars or aircraft, PROTOCOL finetune or linear (then the flags are those of sage.main_lincls); CHECKPOINT,
# DATA_ROOT (the folder of CUB_200_2011/, stanford_cars/ or fgvc-aircraft-2013b/), GPUS, RUNS as in run_lincls.sh.
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
set_name=${SET:-cub} protocol=${PROTOCOL:-finetune}
case "$protocol" in finetune) module=sage.main_finegrained ;; linear) module=sage.main_lincls ;; *)
  echo "error: unknown PROTOCOL '$protocol'; choose finetune or linear" >&2
  exit 2
  ;;
esac
flags=(--dataset "$set_name")
weights=$tier
case "$tier" in
  mini)
    "$PYTHON" -m sage.lab.finegrained_mini "$set_name" >/dev/null
    # The generated digits in the layout of CUB-200-2011 (SET=cars, SET=aircraft: in theirs); under a minute.
    flags+=(
      --data_dir data/mini/finegrained --img_size 32 --cache --per_class 40 --total_epochs 10 --lr 0.1 --workers 0 --threads 1 --log-every 5
    )
    ;;
  small)
    # The real set at 64 pixels with the network of run_pretrain.sh small: a few minutes on a GPU. Never run here.
    weights=small/cifar10
    flags+=(--data_dir "${DATA_ROOT:-data}" --img_size 64 --total_epochs 30 --workers 4)
    ;;
  paper)
    # 224 pixels, 100 epochs, SGD 0.01 (PROTOCOL=linear: the linear protocol). The paper's sets and numbers are not
    # known. Never run here, so no time is given.
    flags+=(--data_dir "${DATA_ROOT:-data}" --workers 8)
    ;;
esac
checkpoint=${CHECKPOINT:-$runs/pretrain/$weights/checkpoint.pth}

"${launch[@]}" -m "$module" --pretrained "$checkpoint" \
  --output-dir "$runs/finegrained/$tier/$set_name-$protocol" "${flags[@]}" "$@"
