#!/usr/bin/env bash
# The arms of the small tier's table: bash kscl/run_arms.sh [mini|small|medium|paper] [flags of kscl.main_kscl]
# ARMS, SEEDS, SET (cifar10, or a folder of images of your own below DATA_ROOT), JOBS (arms at once), DATA_ROOT, RUNS.
# What is finished is not run again. An --end_epoch after the tier is every arm's: leave moco_eq* away with it.
# paper: DATA_ROOT is the folder of train/ and val/, GPUS the processes of an arm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | medium | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small, medium or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh
source shared_utils/own_set.sh

# Equal compute counts forward passes, a backward pass as two: K shots take 3 + K a step, MoCo v2 takes 4. So MoCo v2
# gets (3 + K) / 4 times the epochs: 1.5 for K = 3, 2 for K = 5.
out=${RUNS:-runs}/kscl/arms/$tier
loading=(--workers 0 --threads 1)
last=linear pil=() drop=()
case "$tier" in
  mini)
    # Every arm once on the generated images, 10 epochs, about a minute each.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    data=(--data_dir data/mini/images --cache --img_size 32)
    equal3=15 equal5=20
    ;;
  small)
    # 4,000 images, 8 epochs; about 12 minutes on one core for the six arms of a seed that run by default.
    # Acceptance, written before the runs: the claim holds if K = 5, the default, beats MoCo v2 at equal epochs on
    # 10-shot kNN by more than the pooled standard deviation of three seeds. The same rule gives every other pair its
    # status: K = 3 against MoCo v2, both against MoCo v2 at equal compute, and K = 5 against the mean of its keys
    # (rank 1), which is what the subspace itself adds. All of it is printed, whatever it shows.
    # Written on 2026-12-01, before seeds 3 and 4 and before any untrained network: moco, k5 and moco_eq5 with five seeds
    # (0 to 4; 0 to 2 were seen under the rule above), by the rule of docs/contributing.md: k5 against moco and against
    # moco_eq5 in 10-shot kNN; the floor is the untrained network, the positive control moco_eq5 above moco.
    set_name=${SET:-cifar10}
    export SET=$set_name
    data=(--data_dir "${DATA_ROOT:-data}/$set_name")
    # The recorded rows were trained and measured with the releases' loader; new seeds stand beside them.
    case "$set_name" in
      cifar10) data+=(--per_class 400 --cache --img_size 32) pil=(--aug_backend pil) drop=(--drop_last) ;;
      *) own_set "${DATA_ROOT:-data}/$set_name" ;; # at the size of the training
    esac
    equal3=12 equal5=16
    out=$out/$set_name
    ;;
  medium)
    # One GPU, the flags of run_pretrain.sh medium, 200 epochs. Acceptance, written before any run, seeds 0 to 4, by 10-shot
    # kNN: K = 5 against MoCo v2 at equal epochs and at equal compute, two-sided paired t-test, Holm over both, level 5 %;
    # positive control: moco_eq5 above moco; floor: moco above untrained. Never run here: no GPU was at hand.
    data=(--data_dir "${DATA_ROOT:-data}/cifar10_full" --cache --img_size 32)
    loading=(--workers 0)
    equal3=300 equal5=400
    ;;
  paper)
    # 200 epochs an arm on ImageNet. MoCo v2: 67.5 linear top-1 (71.1 after 800 epochs); KSCL: not known. GPUS
    # processes each; never run here, so no time is given.
    data=(--data_dir "${DATA_ROOT:-data}")
    equal3=300 equal5=400
    loading=(--workers 8)
    ;;
esac
mkdir -p "$out"

run_one() { # arm seed [flags]
  local arm=$1 seed=$2 flags=() folder=$out/$1/seed$2
  shift 2
  case "$arm" in
    moco) flags=(--shots 1 --sim signed) ;;
    moco_eq3) flags=(--shots 1 --sim signed --end_epoch "$equal3") ;;
    moco_eq5) flags=(--shots 1 --sim signed --end_epoch "$equal5") ;;
    abs) flags=(--shots 1) ;;
    k3) flags=(--shots 3) ;;
    k5) flags=(--shots 5) ;;
    mean) flags=(--shots 5 --rank_rule fixed --rank 1) ;;
    full) flags=(--shots 5 --energy 1) ;;
    grad) flags=(--shots 3 --subspace_grad pos) ;;
    untrained) flags=(--shots 1 --sim signed --end_epoch 0) ;;
    *)
      echo "error: unknown arm '$arm'; choose moco moco_eq3 moco_eq5 abs k3 k5 mean full grad untrained" >&2
      return 2
      ;;
  esac
  bash kscl/run_pretrain.sh "$tier" "${pil[@]}" "${flags[@]}" --seed "$seed" --output-dir "$folder" "$@"
  "$PYTHON" -m kscl.main_knn --pretrained "$folder/checkpoint.pth" "${pil[@]}" "${data[@]}" "${loading[@]}" \
    --output-dir "$folder-knn"
  if [ "$last" = knn ]; then
    return
  elif [ "$tier" = paper ]; then
    bash kscl/run_lincls.sh paper --pretrained "$folder/checkpoint.pth" --output-dir "$folder-linear"
  else
    "$PYTHON" -m kscl.main_lincls --pretrained "$folder/checkpoint.pth" "${pil[@]}" "${data[@]}" --cached_train \
      --init_lr 0.3 --batch_size 256 --end_epoch 50 --decay_method cos \
      "${loading[@]}" "${drop[@]}" --overwrite --output-dir "$folder-linear"
  fi
}

rm -f "$out/failed" # a job may fail between two looks at the jobs: it leaves its name there
for seed in ${SEEDS:-0}; do
  for arm in ${ARMS:-moco k5 mean moco_eq5 k3 moco_eq3}; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n || true; done
    if [ -f "$out/$arm/seed$seed-$last/result.json" ]; then continue; fi
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
"$PYTHON" -m kscl.lab.arms "$out"
