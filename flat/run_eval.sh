#!/usr/bin/env bash
# Few-shot evaluation on novel classes: bash flat/run_eval.sh [mini|small|paper] [flags of flat.test]
# CHECKPOINT names the trained network, SET the small tier's data (cifarfs5, cifarfs), RUNS the folder of the outputs.
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
    # 600 episodes of the 8 novel classes of the generated set, five heads; a quarter of a minute.
    flags=(--eval_head proto,proto_l2,cosine,ridge,lr)
    workers=1
    ;;
  small)
    # CIFAR-FS, 20 novel classes x 150 images, 2,000 episodes; seconds.
    where=small/${SET:-cifarfs5}
    flags=(--episodes 2000 --eval_head proto_l2,proto,ridge)
    workers=0
    ;;
  paper)
    # CloserLookFewShot: 600 episodes, 15 queries, a new head trained on the support of each (100 epochs of mini-batches
    # of 4); prototypes are printed too. 10,000 episodes as in S2M2: --episodes 10000.
    flags=()
    workers=8
    ;;
esac
checkpoint=${CHECKPOINT:-$runs/flat/train/$where/checkpoint.pth}
features=$(dirname "$checkpoint")/features.pt

"$PYTHON" -m flat.save_features --checkpoint "$checkpoint" --out "$features" --workers "$workers"
"$PYTHON" -m flat.test --features "$features" ${flags[@]+"${flags[@]}"} "$@"
