#!/usr/bin/env bash
# The arms of the small tier's table: bash flat/run_arms.sh [mini|small|paper] [flags of flat.train]
# ARMS, SEEDS, SET (cifarfs5, cifarfs5fit, cifarfs, cifarfs_full), JOBS (arms at once), DATA_ROOT, RUNS. What is finished is not run
# again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

out=${RUNS:-runs}/flat/arms/$tier
episodes=(--episodes 2000 --eval_head proto_l2,proto)
case "$tier" in
  mini)
    # Every arm once on the generated classes, half a minute each.
    arms=${ARMS:-base flat shuffled aug rotation avt lambda0.1 lambda0.3 lambda3}
    ;;
  small)
    # Acceptance, written before the runs: on 5 base classes FLAT (lambda 1) beats the baseline at 1 shot and at 5 shots
    # by more than the standard deviation over the seeds of the difference on the same 2,000 episodes. It is due to what
    # is decoded if the same holds against shuffled targets, and more than augmentation if it holds against `aug`.
    # cifarfs5fit, written before its runs: base classes that are over-fitted (30 images each, 240 epochs), seeds 3 to 12;
    # seeds 0 to 2 were the pilot that this protocol was chosen by and do not count. Claim: the mean over the seeds of the
    # paired difference FLAT - baseline on the same 2,000 episodes is above 0, at 1 shot and at 5 shots, two-sided paired
    # t-test, p < .05 after Holm's correction over the folder's claims. Gate: training accuracy on the base classes above
    # 95 % and held-out accuracy below it by 10 points (over-fitted), baseline above an untrained network. Controls:
    # shuffled targets are expected below FLAT at 1 shot; aug is descriptive. Positive control: the baseline is above the
    # one that is trained without augmentation (published on mini-ImageNet, Conv4, CloserLookFewShot's re-implementation:
    # 42.11 against 36.35, the second recalled); where it is not, nothing is claimed.
    # cifarfs_full, written before its runs: the whole of CIFAR-FS, Conv4 of 64 channels, SEEDS="0 1 2 3 4". Anchors, each
    # within 1.5 points of what is published: base (cosine classifier) at 1 shot 58.9 (greentfrapp's
    # few-shot-without-forgetting-tensorflow, data/cifar/results.md, "Ours (64F)"; it has no number at 5 shots), proto1 at
    # 1 shot 55.5 and proto at 5 shots 72.0 (there "ProtoNet (64F)", taken from Bertinetto et al. 2018): 20-way episodes
    # with the test's shots, Adam, the rate halved every 2,000 of 10,000 (Snell et al.), tested by their own distance.
    # flat against base at 1 and 5 shots are claim rows by the rule of cifarfs5fit with n = 5 (floor untrained, positive
    # control base above noaug); proto_flat against proto and proto1_flat against proto1 are descriptive.
    set_name=${SET:-cifarfs5}
    export SET=$set_name
    out=$out/$set_name
    arms=${ARMS:-base flat shuffled aug}
    if [ "$set_name" = cifarfs_full ]; then
      arms=${ARMS:-base flat noaug untrained proto1 proto1_flat proto proto_flat}
    fi
    ;;
  paper)
    # The same arms in CloserLookFewShot's protocol on mini-ImageNet, 10,000 episodes; GPUS processes each. The first 60
    # of a class's 600 images are held out. Never run here, so no time is given.
    arms=${ARMS:-base flat shuffled aug rotation avt lambda0.1 lambda0.3 lambda3}
    episodes=(--episodes 10000 --eval_head proto_l2,proto,finetune_cosine)
    ;;
esac
mkdir -p "$out"

snell=(--method protonet --recipe snell --train_n_way 20 --stop_epoch 100)
run_one() { # arm seed [flags]
  local arm=$1 seed=$2 flags=() folder=$out/$1/seed$2
  shift 2
  case "$arm" in
    base) flags=(--aet none) ;;
    flat) ;;
    shuffled) flags=(--aet_targets shuffled) ;;
    aug) flags=(--aet none --cls_on_transformed 1) ;;
    noaug) flags=(--aet none --no-train_aug) ;;
    untrained) flags=(--aet none --stop_epoch 0) ;;
    rotation) flags=(--aet_shift 0 --shrink 1 --enlarge 1) ;;
    avt) flags=(--aet avt --aet_lambda 0.125) ;;
    lambda0.1 | lambda0.3 | lambda3) flags=(--aet_lambda "${arm#lambda}") ;;
    proto1) flags=("${snell[@]}" --n_shot 1 --aet none) ;;
    proto1_flat) flags=("${snell[@]}" --n_shot 1) ;;
    proto) flags=("${snell[@]}" --n_shot 5 --aet none) ;;
    proto_flat) flags=("${snell[@]}" --n_shot 5) ;;
    *)
      echo "error: unknown arm '$arm'; choose base flat shuffled aug noaug untrained rotation avt lambda0.1 lambda0.3" \
        "lambda3 proto1 proto1_flat proto proto_flat" >&2
      return 2
      ;;
  esac
  if [ "$tier" = small ] && [[ $SET = cifarfs5* ]]; then flags+=(--base_draw "$seed"); fi
  if [ "$tier" = paper ]; then flags+=(--holdout 60); fi
  bash flat/run_train.sh "$tier" "${flags[@]}" --seed "$seed" --output-dir "$folder" "$@"
  "$PYTHON" -m flat.save_features --checkpoint "$folder/checkpoint.pth" --workers 0 --threads 1
  "$PYTHON" -m flat.test --features "$folder/features.pt" "${episodes[@]}" --threads 1 --output-dir "$folder-test"
}

rm -f "$out/failed" # a job may fail between two looks at the jobs: it leaves its name there
for seed in ${SEEDS:-0}; do
  for arm in $arms; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n || true; done
    if [ -f "$out/$arm/seed$seed-test/result.json" ]; then continue; fi
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
"$PYTHON" -m flat.lab.arms "$out"
