#!/usr/bin/env bash
# Train the block: bash uvos_dino/run_train.sh [mini|small|paper] [flags of uvos_dino.train_RGB_cluster]
# DINO names the encoder's weights, DATA_ROOT the folder of the data sets, SET the small tier's, GPUS the processes, RUNS
# the folder of the outputs.
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
out=$runs/uvos_dino/train/$tier
case "$tier" in
  mini)
    "$PYTHON" -m shared_utils.lab.mini davis >/dev/null
    # Moving shapes at 12 x 20 patches on the DINO of run_dino.sh mini, 60 iterations: half a minute on one core. The loss
    # falls from 1.6, where the attention is diffuse, to about 0.5.
    dino=${DINO:-$runs/uvos_dino/dino/mini/checkpoint.pth}
    flags=(
      --basepath data/mini/davis/JPEGImages/480p --train_list data/mini/davis/ImageSets/2017/train.txt --cache
      --resolution 96 160 --num_heads 4 --batch_size 2 --num_train_steps 60 --lr 1e-3 --keep_every 0
      --probe_every 30 --probe_videos 2 --dataset DAVIS2017 --val_basepath data/mini/davis --ratio 4
      --tau 0.3 --workers 0 --threads 1 --amp none --log-every 5
    )
    ;;
  small)
    # 12 sequences of DAVIS-2016 without their labels, 12 x 24 patches, 200 iterations of 2 clips, on the DINO of
    # run_dino.sh small, heads of 48 channels as released: about two minutes on one CPU core. Every 100 iterations the
    # clusters of the first two sequences are counted.
    set_name=${SET:-davis2016}
    out=$out/$set_name
    dino=${DINO:-$runs/uvos_dino/dino/small/$set_name/checkpoint.pth}
    flags=(
      --basepath "${DATA_ROOT:-data}/$set_name/JPEGImages/480p" --cache --resolution 96 192 --num_heads 4
      --batch_size 2 --num_train_steps 200 --lr 1e-3 --keep_every 0
      --probe_every 100 --probe_videos 2 --dataset DAVIS --val_basepath "${DATA_ROOT:-data}/$set_name"
      --workers 0 --threads 1
    )
    ;;
  paper)
    # The release's start_rgb.sh: DINO ViT-S/8, 8 GPUs x 1 clip of 3 frames, 192 x 384, lr 1e-5, 60,000 iterations (the
    # paper, as a user quotes it: batch 16, lr 1e-4, 30,000). Its users saw 33.0 J&F after 1,000 and 40.0 after 5,000
    # iterations of 16 clips at lr 1e-4, and too many clusters to evaluate after 30,000: keep early checkpoints.
    # DATA_ROOT holds ytvis/train/JPEGImages/VIDEO/*.jpg. Never run here, so no time is given.
    dino=${DINO:-dino_deitsmall8_pretrain.pth}
    flags=(
      --basepath "${DATA_ROOT:-data}/ytvis/train/JPEGImages" --batch_size 1 --lr 1e-5
      --workers 8 --save-every 1000 --log-every 100
    )
    ;;
esac

"${launch[@]}" -m uvos_dino.train_RGB_cluster --dino_path "$dino" --output-dir "$out" "${flags[@]}" "$@"
next_job uvos_dino/run_eval.sh "$tier"
