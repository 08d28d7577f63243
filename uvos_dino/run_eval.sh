#!/usr/bin/env bash
# Segment and score: bash uvos_dino/run_eval.sh [mini|small|paper] [flags of uvos_dino.eval_oneshot]
# CHECKPOINT names the trained block, DATA_ROOT the folder of the data sets, SET the small tier's, RUNS the folder of the
# outputs.
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
    "$PYTHON" -m shared_utils.lab.mini davis >/dev/null
    # The four validation sequences of moving shapes, twelve frames each; seconds on one core. tau .3 and not the paper's
    # 1: after so few iterations the attention is not sharp.
    flags=(
      --basepath data/mini/davis --dataset DAVIS2017 --resolution 96 160 --eval_norm imagenet --drop_last_frame false --ratio 4 --tau 0.3 --threads 1
    )
    ;;
  small)
    # 12 sequences of DAVIS-2016 at 12 x 24 patches, any number of clusters; under a minute on one core.
    set_name=${SET:-davis2016}
    where=small/$set_name
    flags=(
      --dataset DAVIS --basepath "${DATA_ROOT:-data}/$set_name" --resolution 96 192 --eval_norm imagenet
      --drop_last_frame false --max_proposals 0 --threads 1
    )
    ;;
  paper)
    # The release's start_eval.sh: DAVIS-2017 unsupervised, 320 x 480, every 10th frame gives keys, tau 1, a matching in
    # every frame. Third-party run of the released checkpoint: J&F 39.7, J 35.3, F 44.1. DATA_ROOT holds DAVIS.
    flags=(
      --dataset DAVIS2017 --basepath "${DATA_ROOT:-data}/DAVIS" --resolution 320 480 --ratio 10 --tau 1.0
    )
    ;;
esac
checkpoint=${CHECKPOINT:-$runs/uvos_dino/train/$where/checkpoint.pth}
"$PYTHON" -m uvos_dino.eval_oneshot --resume_path "$checkpoint" "${flags[@]}" "$@"
