#!/usr/bin/env bash
# The arms of the paper's ablation against each other: bash mdp/run_arms.sh [mini|small|paper] [flags of main_pretrain]
# Pretrains each arm, fine-tunes it, and prints the table. ARMS, SEEDS, CONFIGS choose; JOBS runs that many at a time.
# A stopped or repeated call goes on where it was: finished runs are not run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

out=${RUNS:-runs}/mdp/arms/$tier
case "$tier" in
  mini)
    # Every arm once on the mini data, fine-tuned on the unseen third taxonomy: about 2.5 minutes an arm on two CPU
    # cores (pretraining 1 min 47 s, fine-tuning 35 s).
    single=(--datasets ade --epochs 48)
    tune=(--compare none)
    configs=${CONFIGS:-mini}
    ;;
  small)
    # LabelMeFacade + Clothing Co-Parsing, fine-tuned on unseen CamVid and on LabelMeFacade's 100 training images.
    # Equal steps for all arms: 20 epochs of both sets are 47 of LabelMeFacade. 8 minutes an arm and seed on two cores.
    # Acceptance, written before the run: after a tenth of the fine-tuning schedule, multi beats scratch and p2p in the
    # mean of 3 seeds by more than the pooled standard deviation. (It does on LabelMeFacade, not on CamVid: README.md.)
    single=(--datasets labelmefacade --epochs 47)
    tune=(--amp bf16 --threads 1 --workers 1)
    configs=${CONFIGS:-camvid labelmefacade}
    ;;
  paper)
    # Default ablation of the paper: VOC+ADE20K, 100 epochs, bank 4096; single: VOC only at equal images.
    # VOC: p2p 71.19, multihead 71.19, single 70.92, multi 71.98, mix 73.32 (authors' rebuttal draft).
    set -- --datasets voc,ade --epochs 100 --bank-size 4096 "$@"
    single=(--datasets voc --epochs 290)
    tune=()
    configs=${CONFIGS:-voc12aug ade20k cityscapes}
    ;;
esac

run_one() { # arm seed [flags]
  local arm=$1 seed=$2 flags=() weights config
  shift 2
  case "$arm" in
    scratch) ;;
    multihead) flags=(--objective multihead-ce --mix none --csc none) ;;
    unionce) flags=(--objective union-ce --mix none --csc none) ;;
    p2p) flags=(--bank-type none --mix none --csc none) ;;
    region) flags=(--bank-type region --mix none --csc none --anchors 64) ;;
    single) flags=(--mix none --csc none "${single[@]}") ;;
    multi) flags=(--mix none --csc none) ;;
    mix) flags=(--mix both --csc none) ;;
    csc) flags=(--mix both --csc pull) ;;
    *)
      echo "error: unknown arm '$arm'; choose scratch multihead unionce p2p region single multi mix csc" >&2
      return 2
      ;;
  esac
  weights=none
  if [ "$arm" != scratch ]; then
    weights=$out/$arm/seed$seed/checkpoint.pth
    bash mdp/run_pretrain.sh "$tier" "$@" "${flags[@]}" --seed "$seed" --output-dir "${weights%/*}"
  fi
  for config in $configs; do
    CONFIG=$config CHECKPOINT=$weights bash mdp/run_finetune.sh "$tier" --config "$config" --seed "$seed" \
      --output-dir "$out/$arm/seed$seed-$config" "${tune[@]}"
  done
}

mkdir -p "$out"
rm -f "$out/failed" # a job may fail between two looks at the jobs: it leaves its name there
for seed in ${SEEDS:-0}; do
  for arm in ${ARMS:-scratch multihead p2p single multi mix csc}; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n || true; done
    echo "arm $arm, seed $seed -> $out/$arm-seed$seed.log"
    (
      trap '[ $? = 0 ] || echo "$arm, seed $seed" "$(why "$out" "$arm" "$seed")" >>"$out/failed"' EXIT
      run_one "$arm" "$seed" "$@"
    ) >"$out/$arm-seed$seed.log" 2>&1 &
  done
done
while [ -n "$(jobs -rp)" ]; do wait -n || true; done
if [ -f "$out/failed" ]; then
  echo "error: did not finish: $(paste -sd ';' "$out/failed"); see the logs in $out" >&2
  exit 1
fi
"$PYTHON" -m mdp.lab.arms "$out"
