#!/usr/bin/env bash
# Pretrain: bash fame/run_pretrain.sh [mini|small|paper] [flags of fame.train]
# DATA_ROOT names the folder of the data sets (paper: of Kinetics-400), SET the small tier's, GPUS the processes, RUNS
# the folder of the outputs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

out=${RUNS:-runs}/fame/pretrain/$tier
case "$tier" in
  mini)
    # The method at toy size: 120 generated videos of moving digits in UCF101's layout, whose background is tied to the
    # motion, a network of four convolutions, 60 steps; about a minute on two CPU cores.
    "$PYTHON" -m shared_utils.lab.mini video >/dev/null
    flags=(
      data/mini/video -a tiny -cs 48 -fpc 8 --bins 5 --hflip 0 --bn_splits 2 -b 24 --moco_k 192 --moco_m 0.99 --lr 0.05
      --cos --epochs 12 --cache --workers 1 --log-every 2 --image_every 20
    )
    ;;
  small)
    # SET=motion (generated, 300 videos; needs neither a download nor PyAV), fight (fight_clips, 180 clips a split,
    # SPLIT 1 to 3 by source), or any other name: your own videos, everything below $DATA_ROOT/$SET. 360 and 300 steps of 32 videos, 8 frames of 48 pixels, about two minutes on one core;
    # run_arms.sh trains every arm of README.md's table with these flags. 5 bins an axis instead of 10: at 48 pixels the
    # background's 230 pixels would drown in 1,000 added counts. No flip for motion: left and right are classes.
    set_name=${SET:-motion}
    flags=(
      -a tiny -cs 48 -fpc 8 --bins 5 --bn_splits 2 -b 32 --moco_m 0.99 --lr 0.05 --cos --cache --cache_side 64
      --amp none --workers 0 --threads 1 --image_every 1000
    )
    case "$set_name" in
      motion)
        "$PYTHON" -m fame.lab.motion >/dev/null
        flags+=(data/mini/motion --hflip 0 --moco_k 256 --epochs 40)
        ;;
      fight)
        flags+=("${DATA_ROOT:-data}/fight_clips" --dataset fight --fold "${SPLIT:-1}" --stride 1 --moco_k 128 --epochs 60)
        ;;
      *)
        # 16 videos a step, so that 16 are enough; 32 columns of a queue are an epoch of their keys. More videos want a
        # longer queue: --moco_k 256 after the tier.
        flags+=("${DATA_ROOT:-data}/$set_name" --dataset folder --bad_videos skip -b 16 --moco_k 32 --epochs 100)
        ;;
    esac
    out=$out/$set_name
    ;;
  paper)
    # Kinetics-400, I3D, 224 pixels, 16 frames x 2, 64 videos on 8 GPUs, 200 epochs, K 65,536 (release's train.sh);
    # fine-tuned on UCF101 88.6 top-1, the released weights 88.9. One GPU: --bn_splits 8. UCF101:
    # DATA_ROOT=.../UCF101 with --dataset ucf101 after the tier. Never run here, so no time is given.
    flags=(
      "${DATA_ROOT:-data}" --dataset k400 -a I3D -cs 224 -fpc 16 -b 64 --lr 0.01 --cos --epochs 200 --bad_videos skip
      --workers 16 --save-every 1000 --log-every 50
    )
    ;;
esac

"${launch[@]}" -m fame.train --output-dir "$out" "${flags[@]}" "$@"
# Another folder than the tier's, or own videos, which have no test part: the run has named its next command.
if [[ ${set_name:-motion} =~ ^(motion|fight)$ ]]; then next_job fame/run_eval.sh "$tier"; fi
