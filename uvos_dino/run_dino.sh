#!/usr/bin/env bash
# A small DINO of our own: bash uvos_dino/run_dino.sh [mini|small|paper] [flags of uvos_dino.main_dino]
# DATA_ROOT names the folder of the data sets, SET the small tier's, GPUS the processes, RUNS the folder of the outputs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

out=${RUNS:-runs}/uvos_dino/dino/$tier
case "$tier" in
  mini)
    "$PYTHON" -m shared_utils.lab.mini davis >/dev/null
    # 144 generated frames of moving shapes, four layers of 128 channels, patches of 8; half a minute on one core.
    flags=(
      --data_dir data/mini/davis/JPEGImages/480p --image_size 96 160 --arch vit_mini --global_size 64 --local_size 32 --local_crops 2 --out_dim 256
      --teacher_temp 0.02 --batch_size 16 --lr 1e-3 --epochs 10 --workers 0 --threads 1 --amp none --log-every 5
    )
    ;;
  small)
    # The 808 frames of 12 sequences of DAVIS-2016, six layers of 192 channels; 1,200 steps of 16 images, about 20
    # minutes on one CPU core. All arms of run_arms.sh share it.
    set_name=${SET:-davis2016}
    out=$out/$set_name
    flags=(
      --data_dir "${DATA_ROOT:-data}/$set_name/JPEGImages/480p" --image_size 120 214 --arch vit_little
      --global_size 64 --local_size 32 --local_crops 4 --out_dim 1024 --batch_size 16 --lr 1e-3 --epochs 24
      --workers 0 --threads 1
    )
    ;;
  paper)
    # The paper takes DINO's published ViT-S/8 (--dino_path of run_train.sh), so nothing has to be trained here. This is
    # the same network on the paper's own videos, for who wants no other data: never run here, no time is given.
    flags=(
      --data_dir "${DATA_ROOT:-data}/ytvis/train/JPEGImages" --image_size 240 426 --every 5 --arch vit_small
      --global_size 224 --local_size 96 --local_crops 8 --out_dim 65536 --hidden_dim 2048 --bottleneck_dim 256
      --batch_size 256 --momentum_teacher 0.996 --epochs 100 --workers 8 --save-every 1000 --log-every 100
    )
    ;;
esac

"${launch[@]}" -m uvos_dino.main_dino --output-dir "$out" "${flags[@]}" "$@"
next_job uvos_dino/run_train.sh "$tier"
