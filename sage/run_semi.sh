#!/usr/bin/env bash
# Few labels: bash sage/run_semi.sh [mini|small|paper] [flags of sage.main_semi]
# CHECKPOINT, DATA_ROOT, GPUS, RUNS as in run_lincls.sh.
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
    # A tenth of the labels of the mini images, two cells of the grid; under a minute on two cores. The loss falls from
    # 2.3 to below 2; at head factor 10 it diverges. So few labels teach little: 13 % of the test images, by chance 10.
    flags=(
      --data_dir data/mini/images --img_size 32 --cache --fraction 0.1 --lr 0.01,0.03 --head_lr_mult 1 --batch_size 25
      --total_epochs 30 --step 20,25 --workers 0 --threads 1 --log-every 10
    )
    ;;
  small)
    # A tenth of 400 labels a class of CIFAR-10; nine cells, some minutes on one core.
    where=small/cifar10
    flags=(
      --data_dir "${DATA_ROOT:-data}/cifar10" --img_size 32 --per_class 400 --cache --fraction 0.1 --batch_size 64
      --workers 0 --threads 1
    )
    ;;
  paper)
    # ImageNet with 1 % of the labels (SimCLR's list beside train/ and val/): nine cells, the best is reported; 10 %:
    # --labels "$DATA_ROOT/10percent.txt" and another --output-dir. The paper's numbers are not known; never run here.
    flags=(--data_dir "${DATA_ROOT:-data}" --labels "${DATA_ROOT:-data}/1percent.txt" --workers 8 --log-every 50)
    ;;
esac
checkpoint=${CHECKPOINT:-$runs/pretrain/$where/checkpoint.pth}

"${launch[@]}" -m sage.main_semi --pretrained "$checkpoint" "${flags[@]}" "$@"
