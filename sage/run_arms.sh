#!/usr/bin/env bash
# The arms of the small tier's tables: bash sage/run_arms.sh [mini|small|paper] [flags of sage.train]
# ARMS, SEEDS, SET (cifar10, mini_attributes, or a folder of images of your own below DATA_ROOT), DATA_ROOT, RUNS. What
# is finished is not run again. GPUS as in run_pretrain.sh. A --total_epochs after the tier is every arm's: leave byol_sum
# away with it. The evaluator of an arm is the final network of arm byol of the same seed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh
source shared_utils/own_set.sh

out=${RUNS:-runs}/sage/arms/$tier
loading=(--workers 0 --threads 1)
set_name=${SET:-cifar10}
last=linear pil=() drop=()
case "$tier" in
  mini)
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    # Every arm once on the generated images, one to three minutes each.
    set_name=mini_attributes
    data=(--data_dir data/mini/images --img_size 32)
    summed=31
    ;;
  small)
    # Summed budget, in floating-point operations: a step of SaGe is 2.07 steps of BYOL here (2.09 at the paper's size),
    # and the evaluator's own training as long as BYOL's counts too: BYOL for 3.07 times the epochs.
    # Acceptance, written before the runs: on the attribute set SaGe's linear accuracy, mean of the four attributes, is
    # above BYOL's in every seed; on CIFAR-10 SaGe's linear top-1 is above BYOL's at equal epochs by more than the
    # pooled standard deviation of the seeds. The summed budget stands beside it, whatever it shows.
    # Written on 2026-12-01, before seeds 3 and 4 of cifar10 and before any untrained network: byol, sage and byol_sum with
    # five seeds (0 to 4; 0 to 2 were seen under the rule above), by the rule of docs/contributing.md: sage against byol
    # and against byol_sum in linear top-1; the floor is the untrained network, the positive control byol_sum above byol.
    out=$out/$set_name
    data=(--data_dir "${DATA_ROOT:-data}/$set_name")
    # The recorded rows were trained and measured with the releases' loader; new seeds stand beside them.
    case "$set_name" in
      cifar10) data+=(--img_size 32 --per_class 400) summed=16 pil=(--aug_backend pil) drop=(--drop_last) ;;
      mini_attributes)
        "$PYTHON" -m shared_utils.lab.mini images >/dev/null
        data=(--data_dir data/mini/images --img_size 32) summed=47 pil=(--aug_backend pil)
        ;;
      *) own_set "${DATA_ROOT:-data}/$set_name" && summed=47 ;; # at the size of the training
    esac
    ;;
  paper)
    # 300 epochs an arm on ImageNet; the summed budget is 3.09 x 300 epochs. Never run here.
    data=(--data_dir "${DATA_ROOT:-data}")
    summed=927
    loading=(--workers 8)
    ;;
esac
mkdir -p "$out"

run_one() { # arm seed [flags]
  local arm=$1 seed=$2 folder=$out/$1/seed$2
  local evaluator=$out/byol/seed$2/checkpoint.pth common=("${pil[@]}" --seed "$2" --output-dir "$folder")
  shift 2
  case "$arm" in
    byol) bash sage/run_evaluator.sh "$tier" "${common[@]}" "$@" ;;
    byol_sum) bash sage/run_evaluator.sh "$tier" --total_epochs "$summed" "${common[@]}" "$@" ;;
    untrained) bash sage/run_evaluator.sh "$tier" --total_epochs 0 "${common[@]}" "$@" ;;
    pixel) EVALUATOR= bash sage/run_pretrain.sh "$tier" --mode pixel "${common[@]}" "$@" ;;
    sage) # its evaluator first, where arm byol of this seed is not finished
      if [ ! -f "$out/byol/seed$seed-$last/result.json" ]; then
        bash sage/run_evaluator.sh "$tier" "${pil[@]}" --seed "$seed" --output-dir "$out/byol/seed$seed" "$@"
      fi
      EVALUATOR=$evaluator bash sage/run_pretrain.sh "$tier" "${common[@]}" "$@"
      ;;
    random) EVALUATOR=random bash sage/run_pretrain.sh "$tier" "${common[@]}" "$@" ;;
    *)
      echo "error: unknown arm '$arm'; choose byol pixel sage random byol_sum untrained" >&2
      return 2
      ;;
  esac
  if [ "$tier" = paper ]; then
    CHECKPOINT=$folder/checkpoint.pth bash sage/run_knn.sh paper --output-dir "$folder-knn"
    CHECKPOINT=$folder/checkpoint.pth bash sage/run_lincls.sh paper --output-dir "$folder-linear"
  elif [ "$set_name" = mini_attributes ]; then
    "$PYTHON" -m sage.main_attributes --pretrained "$folder/checkpoint.pth" "${pil[@]}" "${data[@]}" "${loading[@]}" \
      --decoder_width 64 --recon_updates 400 --output-dir "$folder-attributes"
  else
    "$PYTHON" -m sage.main_knn --pretrained "$folder/checkpoint.pth" "${pil[@]}" "${data[@]}" "${loading[@]}" \
      --output-dir "$folder-knn"
    if [ "$last" = knn ]; then return; fi
    "$PYTHON" -m sage.main_lincls --pretrained "$folder/checkpoint.pth" "${pil[@]}" "${data[@]}" --cached_train --lr 0.3 \
      --batch_size 256 --total_epochs 80 "${loading[@]}" "${drop[@]}" --log-every 100 --overwrite --output-dir "$folder-linear"
  fi
}

if [ "$set_name" = mini_attributes ]; then last=attributes; fi
trap '[ $? = 0 ] || echo "error: did not finish: $arm, seed $seed $(why "$out" "$arm" "$seed"); see the logs in $out" >&2' EXIT
for seed in ${SEEDS:-0}; do
  for arm in ${ARMS:-byol pixel sage random byol_sum}; do
    if [ -f "$out/$arm/seed$seed-$last/result.json" ]; then continue; fi
    echo "arm $arm, seed $seed -> $out/$arm-seed$seed.log"
    run_one "$arm" "$seed" "$@" >"$out/$arm-seed$seed.log" 2>&1
  done
done
"$PYTHON" -m sage.lab.arms "$out"
