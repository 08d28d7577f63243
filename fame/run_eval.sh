#!/usr/bin/env bash
# Action recognition: bash fame/run_eval.sh [mini|small|paper] [flags of fame.eval]
# CHECKPOINT names the pretrained weights, DATA_ROOT the folder of the data sets (paper: UCF101_ROOT that of UCF101), SET
# the small one, SPLIT its split, GPUS the processes, RUNS the folder of the outputs (runs).
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
    # Fine-tuning at toy size, on list 2 of the generated videos, whose background is independent of the motion.
    "$PYTHON" -m shared_utils.lab.mini video >/dev/null
    flags=(
      data/mini/video --fold 2 --finetune --hflip 0 --dropout 0 --lr 0.05 --cos --epochs 12 -b 24 --clip_per_video 2 --cache
      --workers 1 --log-every 2
    )
    ;;
  small)
    # Fine-tuning, 20 epochs, of what run_pretrain.sh small left; fight clips are split by source (SPLIT 1 to 3).
    set_name=${SET:-motion}
    where=small/$set_name
    flags=(
      --finetune --dropout 0.5 --lr 0.05 --wd 1e-4 --cos --epochs 20 -b 32 --clip_per_video 2 --eval_every 100
      --cache --cache_side 64 --amp none --workers 0 --threads 1
    )
    case "$set_name" in
      motion)
        "$PYTHON" -m fame.lab.motion >/dev/null
        flags+=(data/mini/motion --fold 2 --hflip 0)
        ;;
      fight) flags+=("${DATA_ROOT:-data}/fight_clips" --dataset fight --fold "${SPLIT:-1}") ;;
      *)
        echo "error: SET '$set_name' has no test part to fine-tune for; choose motion or fight, or" \
          "python -m fame.main_retrieve DIR --dataset folder --pretrained CHECKPOINT" >&2
        exit 2
        ;;
    esac
    ;;
  paper)
    # UCF101 split 1, I3D of run_pretrain.sh paper: 88.6 top-1 in the paper, 88.9 with the released weights (eval.sh of
    # the release: 150 epochs, lr 0.025, 128 clips on 4 GPUs, dropout 0.7). Never run here, so no time is given.
    flags=(
      "${UCF101_ROOT:-ucf101}" --dataset ucf101 --finetune --lr 0.025 --wd 1e-4 --epochs 150 --schedule 60 120 -b 128
      -cs 224 -fpc 16 --dropout 0.7 --val_resize none --seed 42 --workers 16 --log-every 50
    )
    ;;
esac
checkpoint=${CHECKPOINT:-$runs/fame/pretrain/$where/checkpoint.pth}

"${launch[@]}" -m fame.eval --pretrained "$checkpoint" "${flags[@]}" "$@"
