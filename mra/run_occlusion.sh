#!/usr/bin/env bash
# Robustness to occlusion, and one picture of MRA: bash mra/run_occlusion.sh [mini|small|paper] [flags of
# mra.eval_occlusion]
# CHECKPOINT names the classifier and MAE the autoencoder (defaults: run_supervised.sh's and run_pretrain.sh's), SET the
# set, RUNS the folder of the outputs.
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
    # Cells of 8 pixels, 200 images of test_b, shares 0 to 0.9 in three orders: seconds.
    flags=(--cell 8 --images 200 --threads 1 --attn_source last_attn)
    "$PYTHON" -m mra.lab.textures >/dev/null
    picture=(--data_path data/mini/texture_shortcut/train --input_size 48 --attn_source last_attn)
    ;;
  small)
    # All test images; half a minute on one core. The attention is the one that the classifiers were trained with.
    where=small/${SET:-texture}
    flags=(--cell 8)
    picture=(--data_path data/mini/texture_shortcut/train --input_size 48)
    if [ "${SET:-texture}" = texture ]; then
      "$PYTHON" -m mra.lab.textures >/dev/null
    else
      flags=(--cell 4)
      picture=(--data_path "${DATA_ROOT:-data}/$SET/test" --input_size 32)
    fi
    flags+=(--attn_source last_attn)
    picture+=(--attn_source last_attn)
    ;;
  paper)
    # 14 x 14 cells of 16 pixels on ImageNet's validation images; the paper's protocol and numbers are not known.
    flags=(--cell 16)
    picture=(--data_path "${DATA_ROOT:-data}/val")
    ;;
esac
mae=${MAE:-$runs/mra/pretrain/$where/checkpoint.pth}
out=$where
if [ "$tier" = paper ]; then out=paper/${SET:-imagenet}; fi
checkpoint=${CHECKPOINT:-$runs/mra/supervised/$out/checkpoint.pth}

"$PYTHON" -m mra.visualize --mae_ckpt "$mae" "${picture[@]}" --out "$runs/mra/occlusion/$out/mra.png"
"$PYTHON" -m mra.eval_occlusion --checkpoint "$checkpoint" --mae_ckpt "$mae" "${flags[@]}" "$@"
