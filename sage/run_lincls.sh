#!/usr/bin/env bash
# Linear evaluation: bash sage/run_lincls.sh [mini|small|paper] [flags of sage.main_lincls]
# CHECKPOINT names the pretrained weights, DATA_ROOT the folder of the data sets (paper: of train/ and val/), GPUS the
# processes, RUNS the folder of the outputs (runs).
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
    # A classifier on features of unaugmented images of the frozen network of run_pretrain.sh mini; seconds.
    flags=(--data_dir data/mini/images --img_size 32 --cached_train --lr 0.3 --batch_size 64 --total_epochs 30)
    ;;
  small)
    # CIFAR-10 at 400 images a class, the cheap probe; under a minute on one core. A comparison of arms, not the paper's
    # protocol: see run_arms.sh.
    where=small/cifar10
    flags=(
      --data_dir "${DATA_ROOT:-data}/cifar10" --img_size 32 --per_class 400 --cached_train --lr 0.3 --batch_size 256
      --total_epochs 80 --workers 0 --threads 1
    )
    ;;
  paper)
    # ImageNet, the release's r50_last_byol: lr 0.2, batch 256, 80 epochs, cosine. BYOL of the code base: 72.35; SaGe:
    # not known. Never run here, so no time is given.
    flags=(--data_dir "${DATA_ROOT:-data}" --workers 8 --log-every 100)
    ;;
esac
checkpoint=${CHECKPOINT:-$runs/pretrain/$where/checkpoint.pth}

"${launch[@]}" -m sage.main_lincls --pretrained "$checkpoint" "${flags[@]}" "$@"
