#!/usr/bin/env bash
# The arms of the small tier's table: bash bingo/run_arms.sh [mini|small|paper] [flags of the training script]
# Arms that differ in the method alone, with equal heads and batch norms of as many images: alone and bingo_narrow
# (MoCo v2's head), alone_wide and bingo_wide (BINGO's). The others have BINGO's head and one batch norm of the batch.
# ARMS, SEEDS, SET (cifar10, tiny_imagenet50, or a folder of images of your own below DATA_ROOT), JOBS (arms at once),
# DATA_ROOT, RUNS. What is finished is not run again. An --end_epoch after the tier is every arm's: leave *_eq away then.
# paper: DATA_ROOT is the folder of train/ and val/, TEACHER the file of the teacher, GPUS the processes of an arm.
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

runs=${RUNS:-runs}/bingo
set_name=${SET:-cifar10}
export SET=$set_name
teacher=()
loading=(--workers 0 --threads 1)
last=linear pil=() drop=()
case "$tier" in
  mini)
    # Every arm on the generated images; where compute is to be equal the student alone trains 4.4 times as long.
    "$PYTHON" -m shared_utils.lab.mini images >/dev/null
    data=(--data_dir data/mini/images --cache --img_size 32)
    student=(--arch resnet10 --width 16 --init_lr 0.06)
    equal=36 equal_wide=32
    narrow=128 shares=(--bn_splits 2)
    knn=(--data_dir data/mini/images --cache --img_size 32)
    out=$runs/arms/mini
    corr=$runs/imgs_corr/mini
    ;;
  small)
    # 4,000 images, 10 epochs for every arm. Equal compute counts the floating-point operations
    # of a step: BINGO 3 x (forward + backward) of the student + 2 forward of the teacher = 228 M an anchor, MoCo v2 of
    # the student alone 34.4 M: 6.6 times the epochs; with BINGO's head 38.3 M, 6 times. The teacher's own training and
    # the bags are not counted. MoCo v2 needs two batch-norm shares of 32 (run_teacher.sh), so what is held against it
    # has them too.
    # Acceptance, written before any run of the arms with equal heads (SEEDS="0 1 2 3 4"):
    # - claims, by 10-shot kNN, on each set: bingo_wide against alone_wide, and against alone_wide_eq. Two-sided paired
    #   t-test over seeds 0 to 4; Holm's correction over the folder's claims that can be tested; level 5 %;
    # - positive control: alone_wide_eq above alone_wide (p < .05); floor: alone_wide above an untrained network
    #   (p < .05). Where one of the two fails on a set, its claims are "not testable at this size";
    # - everything else is descriptive, bingo against alone too: it differs in the head and in the batch norms.
    data=(--data_dir "${DATA_ROOT:-data}/$set_name") kept=()
    case "$set_name" in # evaluations of recorded rows are by PIL: rows of different runs compare
      cifar10) kept=(--per_class 400) ;;
      tiny_imagenet50) kept=(--per_class 80) ;;
      *) own_set "${DATA_ROOT:-data}/$set_name" ;; # evaluated at the size of the training
    esac
    knn=("${data[@]}" "${kept[@]}")
    if [ ${#kept[@]} -gt 0 ]; then
      loading+=(--aug_backend pil) knn+=(--cache --img_size 32) pil=(--aug_backend pil) drop=(--drop_last)
    fi
    data=("${knn[@]}")
    student=(--arch resnet10 --width 16 "${kept[@]}" --init_lr 0.06 --end_epoch 10)
    equal=66 equal_wide=60
    narrow=128 shares=(--bn_splits 2)
    out=$runs/arms/small/$set_name
    corr=$runs/imgs_corr/$set_name
    ;;
  paper)
    # R18 <- MoCo v2 R50 of 800 epochs (TEACHER), 200 epochs an arm: K = 5 64.0; no bags about 62, label bags about 66
    # (recalled, unverified). Equal compute: (3 x 5.4 + 2 x 4.1) / (5.4 + 1.8) = 3.4 times the epochs. The linear
    # evaluation is run_lincls.sh's. GPUS processes each; never run here, so no time is given.
    data=(--data_dir "${DATA_ROOT:-data}")
    student=(--arch resnet18 --end_epoch 200)
    equal=678 equal_wide=678 # the head is a thousandth of the student
    narrow=512 shares=()     # a process's batch is its share
    knn=("${data[@]}")
    out=$runs/arms/paper
    corr=imgs_corr/imgs_corr_moco_epoch800
    loading=(--workers 8)
    teacher=(
      --t_arch resnet50 --pretrain_alg moco --pretrain_path "${TEACHER:-moco_v2_800ep_pretrain.pth.tar}"
      --corr_npy "$corr.npy"
    )
    ;;
esac
mkdir -p "$out" "$runs/imgs_corr"

# Bags other than the teacher's neighbours need no teacher.
for bags in random label; do
  if [ ! -f "$corr-$bags.npy" ]; then
    "$PYTHON" -m bingo.compute_knn "${data[@]}" --bags "$bags" --corr_dir "$(dirname "$corr")" \
      --corr_name "$(basename "$corr")-$bags.npy" "${loading[@]}"
  fi
done

every="untrained alone alone_eq bingo_narrow alone_wide alone_wide_eq bingo_wide bingo intra anchors random label"
run_one() { # arm seed [flags]
  local arm=$1 seed=$2 flags=() folder=$out/$1/seed$2
  shift 2
  case "$arm" in
    alone | alone_eq | untrained) ;;
    alone_wide | alone_wide_eq) flags=(--hidden 2048) ;;
    intra) flags=(--loss intra) ;;
    anchors) flags=(--lam 1,0 --mix none) ;;
    bingo) ;;
    bingo_narrow) flags=(--hidden "$narrow" "${shares[@]}") ;;
    bingo_wide) flags=("${shares[@]}") ;;
    paper_loss) flags=(--loss paper) ;;
    random) flags=(--corr_npy "$corr-random.npy") ;;
    label) flags=(--corr_npy "$corr-label.npy") ;;
    *)
      echo "error: unknown arm '$arm'; choose $every paper_loss" >&2
      return 2
      ;;
  esac
  # The recorded rows without equal heads were trained with the releases' loader; new seeds stand beside them.
  case "$tier $arm" in
    *wide* | *untrained) ;;
    small*) flags+=("${pil[@]}") ;;
  esac
  case "$arm" in
    alone* | untrained)
      if [ "$arm" = alone_eq ]; then flags+=(--end_epoch "$equal"); fi
      if [ "$arm" = alone_wide_eq ]; then flags+=(--end_epoch "$equal_wide"); fi
      if [ "$arm" = untrained ]; then flags+=(--end_epoch 0); fi
      bash bingo/run_teacher.sh "$tier" "${student[@]}" "${flags[@]}" --seed "$seed" --output-dir "$folder" "$@"
      ;;
    *) bash bingo/run_pretrain.sh "$tier" "${teacher[@]}" "${flags[@]}" --seed "$seed" --output-dir "$folder" "$@" ;;
  esac
  "$PYTHON" -m bingo.main_knn --pretrained "$folder/checkpoint.pth" "${knn[@]}" --bags "$corr.npy" \
    "${loading[@]}" --output-dir "$folder-knn"
  if [ "$last" = knn ]; then
    return
  elif [ "$tier" = paper ]; then
    bash bingo/run_lincls.sh paper --pretrained "$folder/checkpoint.pth" --output-dir "$folder-linear"
  else
    "$PYTHON" -m bingo.main_lincls --pretrained "$folder/checkpoint.pth" "${knn[@]}" --cached_train \
      --selected_feat_id last --init_lr 0.3 --batch_size 256 --end_epoch 50 --decay_method cos --min_lr 0 \
      "${loading[@]}" "${drop[@]}" --overwrite --output-dir "$folder-linear"
  fi
}

rm -f "$out/failed" # a job may fail between two looks at the jobs: it leaves its name there
for seed in ${SEEDS:-0}; do
  for arm in ${ARMS:-$every}; do
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
"$PYTHON" -m bingo.lab.arms "$out"
