#!/usr/bin/env bash
# The arms of the small tier's table: bash uvos_dino/run_arms.sh [mini|small|paper] [flags of train_RGB_cluster]
# ARMS, SEEDS, SET (davis2016), JOBS (arms at once), DINO, DATA_ROOT, RUNS, OTHER_TAU (0.3: a second evaluation, shown and
# not claimed). What is finished is not run again. The encoder that all arms share is trained first where it is not
# there (ARMS=dino: it alone).
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
out=$runs/uvos_dino/arms/$tier
case "$tier" in
  mini)
    "$PYTHON" -m shared_utils.lab.mini davis >/dev/null
    # Every arm once on the generated sequences, half a minute each.
    where=mini
    eval=(--basepath data/mini/davis --dataset DAVIS2017 --resolution 96 160 --ratio 4 --drop_last_frame false)
    claimed=0.3
    ;;
  small)
    # Acceptance, written before the runs: the block trained with both losses (both) has a higher J than the random block
    # on davis2016, matched frame by frame, tau 1, by more than the pooled standard deviation of the seeds. The same rule
    # gives every other comparison its status, arms that differ in one loss or in the entropy weights among them; the
    # number of clusters is claimed by nobody and shown. A run and its evaluation: about 4 minutes on one CPU core.
    where=small/${SET:-davis2016}
    export SET=${SET:-davis2016}
    out=$out/$SET
    eval=(--dataset DAVIS --basepath "${DATA_ROOT:-data}/$SET" --resolution 96 192 --drop_last_frame false)
    claimed=1.0
    ;;
  paper)
    # The same arms with DINO ViT-S/8 on YouTube-VIS, evaluated on DAVIS-2017 (DATA_ROOT/DAVIS) with the release's
    # settings; GPUS processes each. Never run here, so no time is given.
    where=paper
    eval=(--dataset DAVIS2017 --basepath "${DATA_ROOT:-data}/DAVIS")
    claimed=1.0
    ;;
esac
dino=${DINO:-$runs/uvos_dino/dino/$where/checkpoint.pth}
if [ "$tier" = paper ]; then dino=${DINO:-dino_deitsmall8_pretrain.pth}; fi
mkdir -p "$out"

run_one() { # arm seed [flags]
  local arm=$1 seed=$2 flags=() folder=$out/$1/seed$2 norm=(--eval_norm imagenet)
  shift 2
  case "$arm" in
    random) flags=(--num_train_steps 0) ;;
    semantic) flags=(--motion_weight 0) ;;
    motion) flags=(--semantic_weight 0) ;;
    uniform) flags=(--point_weights uniform) ;;
    both) ;;
    both_long) flags=(--num_train_steps 600 --probe_every 100) ;;
    both_noaug) flags=(--augment false) ;;
    *)
      echo "error: unknown arm '$arm'; choose random semantic motion uniform both both_long both_noaug" >&2
      return 2
      ;;
  esac
  if [ "$tier" = paper ]; then norm=(); fi
  DINO=$dino bash uvos_dino/run_train.sh "$tier" "${flags[@]}" --seed "$seed" --output-dir "$folder" "$@"
  for tau in ${OTHER_TAU:-}; do # shown beside the claimed one
    "$PYTHON" -m uvos_dino.eval_oneshot --resume_path "$folder/checkpoint.pth" "${eval[@]}" "${norm[@]}" --tau "$tau" \
      --max_proposals 0 --png false --threads 1 --save_path "$folder-tau$tau"
  done
  "$PYTHON" -m uvos_dino.eval_oneshot --resume_path "$folder/checkpoint.pth" "${eval[@]}" "${norm[@]}" \
    --tau "$claimed" --max_proposals 0 --png false --threads 1 --save_path "$folder-test"
}

if [ ! -f "$dino" ] && [ "$tier" != paper ]; then bash uvos_dino/run_dino.sh "$tier"; fi
rm -f "$out/failed" # a job may fail between two looks at the jobs: it leaves its name there
for seed in ${SEEDS:-0}; do
  for arm in ${ARMS:-random semantic motion uniform both}; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n || true; done
    if [ "$arm" = dino ] || [ -f "$out/$arm/seed$seed-test/result.json" ]; then continue; fi
    echo "arm $arm, seed $seed -> $out/$arm-seed$seed.log"
    (
      trap '[ $? = 0 ] || echo "$arm, seed $seed" >>"$out/failed"' EXIT
      run_one "$arm" "$seed" "$@"
    ) >"$out/$arm-seed$seed.log" 2>&1 &
  done
done
while [ -n "$(jobs -rp)" ]; do wait -n || true; done
if [ -f "$out/failed" ]; then
  echo "error: did not finish: $(paste -sd ';' "$out/failed"); see the logs in $out" >&2
  exit 1
fi
if [ "${ARMS:-}" != dino ]; then "$PYTHON" -m uvos_dino.lab.arms "$out"; fi
