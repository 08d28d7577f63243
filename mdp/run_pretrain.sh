#!/usr/bin/env bash
# Pretrain: bash mdp/run_pretrain.sh [mini|small|paper] [flags of mdp.main_pretrain]
# DATA_ROOT names the folder of the data sets, GPUS the processes, RUNS the folder of the outputs (runs).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=mini
case "${1:-}" in mini | small | paper) tier=$1 && shift ;; --* | "") ;; *)
  echo "error: unknown tier '$1'; choose mini, small or paper" >&2
  exit 2
  ;;
esac
source shared_utils/env.sh

out=${RUNS:-runs}/mdp/pretrain/$tier
case "$tier" in
  mini)
    # Section 3 of the paper at toy size: the VOC and ADE20K layouts of the mini data (800 images, 171 classes of which
    # 15 occur), narrow ResNet-18, 300 steps. About a minute on two CPU cores; loss below log 15 = 2.7 from the
    # first steps on, down to 1.3, of which the sparse coding is 0.26.
    "$PYTHON" -m shared_utils.lab.mini segmentation
    flags=(
      --datasets voc,ade --data-root data/mini/segmentation
      --arch resnet18 --base-channels 16 --head-channels 64 --dilations 1,2,4 --dim 64
      --crop-size 64 --batch-size 32 --epochs 12 --lr 0.1 --bank-size 512
    )
    ;;
  small)
    # Real street facades and clothes (LabelMeFacade 745 + Clothing Co-Parsing 1,004 images), disjoint taxonomies;
    # narrow ResNet-18, 1,080 steps, 4-6 minutes on two CPU cores. The small tier's table in README.md is made of it.
    # On a GPU scale it up by flags: --arch resnet50 --base-channels 64 --head-channels 512 --crop-size 224 --epochs 200
    # bf16 is fast on CPUs with AMX or AVX512-BF16 only; elsewhere --amp none.
    flags=(
      --datasets labelmefacade,ccp --data-root "${DATA_ROOT:-data}" --cache-size 128
      --arch resnet18 --base-channels 16 --head-channels 64 --dilations 1,3,6 --dim 64 --amp bf16
      --crop-size 96 --batch-size 32 --epochs 20 --lr 0.1 --bank-size 1024 --workers 1
    )
    ;;
  paper)
    # Table 1, last row: VOC2012+aug, ADE20K and COCO-Stuff-164k, 149k images, 200 epochs, bank 10560 (one epoch of VOC).
    # 465,000 steps of 64 crops; never run here, so no time is given. Fine-tuned: VOC 77.79, ADE20K 42.69, Cityscapes 80.64.
    # Default ablation: --datasets voc,ade --epochs 100 --bank-size 4096 (VOC 73.32, ADE20K 40.15, Cityscapes 77.75).
    # Augmentation, learning rate, mixing schedule and sparse-coding weight are inferred: see README.md, Differences.
    flags=(
      --datasets voc,ade,coco --data-root "${DATA_ROOT:-data}" --epochs 200 --bank-size 10560
      --workers 8 --save-every 1000 --log-every 50
    )
    ;;
esac

"${launch[@]}" -m mdp.main_pretrain --output-dir "$out" "${flags[@]}" "$@"
word=
for next in "$@"; do # a flag after the tier may name another folder
  case "$word" in --output-dir | --output_dir | --log-dir | --log_dir) out=$next ;; esac
  case "$next" in --output-dir=* | --output_dir=* | --log-dir=* | --log_dir=*) out=${next#*=} ;; esac
  word=$next
done
next_job mdp/run_finetune.sh "$tier" --checkpoint "$(printf %q "$out/checkpoint.pth")"
