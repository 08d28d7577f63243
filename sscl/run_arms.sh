#!/usr/bin/env bash
# The arms of the small tier's table: bash sscl/run_arms.sh [mini|small|paper] [flags of sscl.main]
# ARMS, SEEDS (default: 1 2 3 at the small tier, otherwise 0), SET (cifar10-4, cifar10-25, cifar10-400: labels a class;
# mine: own photographs, $DATA_ROOT/mine/{labelled/CLASS/*,unlabelled/*,test/CLASS/*}),
# JOBS (arms at once), DATA_ROOT, RUNS. Seed s trains on label split s, every arm alike. What is finished is not run again.
# paper: DATA_ROOT is the folder of train/ and val/, PERCENT the labels (1 or 10), GPUS the processes of an arm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

out=${RUNS:-runs}/sscl/arms/$tier
loading=(--workers 0 --threads 1)
arms=${ARMS:-joint full fixmatch neighbours calibration supervised}
seeds=${SEEDS:-0}
set_name=
pseudo=(--pseudo) shots=(--shots 5) backend=()
case "$tier" in
  mini)
    # Every arm once on the generated images, about a minute each.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    data=(--data_dir data/mini/images --cache --img_size 32)
    ;;
  small)
    # 875 steps on 8,000 images of CIFAR-10; about 3 minutes on one core for an arm.
    # The seeds are 1 2 3: a test result of seed 0 (full 38.3, joint 39.1) was seen before --theta was set, so seed 0 is
    # no evidence. Acceptance, written before the runs of these seeds, whose arms share split, start and batches: the
    # claim holds if
    # both exchanges (full) beat joint training without them (joint) in top-1 of the class head by more than the
    # standard deviation of the differences seed by seed, with 4 and with 25 labels a class; 400 stands beside them. The
    # same rule gives each direction its status: `neighbours` and `calibration` against `joint`, and, inside a run,
    # the accuracy of pseudo-labels after the calibration against before it, at equal coverage (the more confident half
    # by each), over the first third of the training and at its end. All of it is printed, whatever it shows.
    # Baselines of the literature stand above their own floor, training on the labels alone (`supervised`): an arm below
    # it is no baseline, and the table says so. That befalls `pseudo` with 400 labels (30.3 against 42.7).
    # Written on 2026-12-01, before seeds 4 and 5 of any arm and when FixMatch had been seen with 25 labels alone (35.0):
    # five seeds (1 to 5) of supervised, fixmatch, joint and full with 4, 25 and 400 labels, by the rule of
    # docs/contributing.md: the claim is full against joint in top-1 of the class head, the floor `supervised`, the
    # positive control FixMatch above `supervised`. Where it is not, nothing is claimed.
    # These sets were trained with PIL, view by view, and go on so.
    seeds=${SEEDS:-1 2 3}
    backend=(--aug_backend pil)
    set_name=${SET:-cifar10-25}
    export SET=$set_name
    out=$out/$set_name
    case "$set_name" in
      cifar10-4 | cifar10-25 | cifar10-400)
        export LABELS=${set_name#cifar10-}
        data=(--data_dir "${DATA_ROOT:-data}/cifar10" --per_class 800 --cache --img_size 32)
        ;;
      mine)
        for part in labelled unlabelled test; do
          if [ -d "${DATA_ROOT:-data}/mine/$part" ]; then continue; fi
          echo "error: ${DATA_ROOT:-data}/mine/$part: no such folder; expected labelled/CLASS/*, unlabelled/* and" \
            "test/CLASS/* there" >&2
          exit 2
        done
        data=(--val_dir "${DATA_ROOT:-data}/mine/test")
        backend=() pseudo=() shots=(--protocols "knn,linear") # nobody knows the classes of the unlabelled images
        ;;
      *)
        echo "error: unknown SET '$set_name'; choose cifar10-4, cifar10-25, cifar10-400 or mine" >&2
        exit 2
        ;;
    esac
    ;;
  paper)
    # The same arms on ImageNet, 200 epochs each. GPUS processes; never run here, so no time is given.
    data=(--data_dir "${DATA_ROOT:-data}")
    loading=(--workers 8)
    out=$out/${PERCENT:-1}percent
    ;;
esac
mkdir -p "$out"

run_one() { # arm seed [flags]
  local arm=$1 seed=$2 flags=() folder=$out/$1/seed$2
  shift 2
  case "$arm" in
    supervised) flags=(--lambda_u 0 --lambda_c 0) ;;
    fixmatch)
      # As published: RandAugment with Cutout, threshold 0.95 from the first step, all views in one pass, and the EMA
      # (`ema_top1` in the table) with the query's running statistics. Published: EMA 0.999, batch-norm momentum 0.001;
      # the tiers of 875 and fewer steps have 0.99, and the momentum that goes with it. Network, batches and schedule
      # are those of every arm.
      flags=(--lambda_c 0 --calib none --da off --theta 0.95 --pl_start 0 --strong fixmatch --joint_views)
      if [ "$tier" = paper ]; then flags+=(--bn_momentum 0.001); else flags+=(--bn_momentum 0.01); fi
      ;;
    pseudo) flags=(--lambda_c 0 --calib none --da off --theta 0.7) ;; # the views of the method, its threshold
    pseudo_da) flags=(--lambda_c 0 --calib none --theta 0.7) ;;
    joint) flags=(--calib none --neighbours off --theta 0.7) ;;
    neighbours) flags=(--calib none --theta 0.7) ;;
    calibration) flags=(--neighbours off) ;;
    full) ;;
    labelled) flags=(--proto labelled) ;;
    positive) flags=(--ctr per_positive) ;;
    *)
      echo "error: unknown arm '$arm'; choose supervised fixmatch pseudo pseudo_da joint neighbours calibration full" \
        "labelled positive" >&2
      return 2
      ;;
  esac
  if [ "$tier" != paper ] && [ "$set_name" != mine ]; then flags+=(--split "$seed"); fi
  bash sscl/run_train.sh "$tier" "${backend[@]}" "${flags[@]}" --seed "$seed" --output-dir "$folder" "$@"
  "$PYTHON" -m sscl.eval_cls --pretrained "$folder/checkpoint.pth" "${data[@]}" "${loading[@]}" "${pseudo[@]}" \
    --output-dir "$folder-cls"
  "$PYTHON" -m sscl.eval_features --pretrained "$folder/checkpoint.pth" "${data[@]}" "${loading[@]}" \
    "${shots[@]}" --output-dir "$folder-linear"
}

rm -f "$out/failed" # a job may fail between two looks at the jobs: it leaves its name there
for seed in $seeds; do
  for arm in $arms; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n || true; done
    if [ -f "$out/$arm/seed$seed-linear/result.json" ]; then continue; fi
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
"$PYTHON" -m sscl.lab.arms "$out"
