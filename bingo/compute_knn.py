"""Stage 1 of BINGO: the bag of every training image, by the teacher's features (release compute_knn.py, clustering.py).

    python -m bingo.compute_knn --arch resnet50 --ckpt_name moco_v2_200ep_pretrain.pth.tar --data_dir imagenet \
        --corr_name imgs_corr_moco_epoch200.npy

Writes the release's correlation file, int64 [N, K], with a .json beside it that holds the hash of the image order.
The other bags of the paper's ablation, and random ones as a control, are `--bags`.
"""

from pathlib import Path

import numpy as np
import torch

from bingo.arch import CHOICES, STEMS
from bingo.data import check_writable, save_bags
from bingo.options import add_data_flags, train_images
from bingo.teachers import ALGS, fingerprint, load_teacher
from shared_utils import UserError, distributed, timm_nets
from shared_utils.augment import plain
from shared_utils.data import tell
from shared_utils.flags import Parser, add_aug_flag, add_machine_flags, natural, positive
from shared_utils.layout import place
from shared_utils.neighbours import features, neighbours, purity
from shared_utils.run import cli, set_threads


def get_parser() -> Parser:
    p = Parser(prog="bingo.compute_knn", description=__doc__.splitlines()[0])
    a = p.add_argument
    add_data_flags(p)
    add_aug_flag(p)
    a("--arch", choices=CHOICES, default="resnet50", help="network of the teacher")
    a("--t_width", type=positive, default=64, help="channels of its first stage")
    a("--t_stem", choices=STEMS, default="imagenet")
    a("--ckpt_name", type=Path, help="weights of the teacher")
    a("--pretrain_alg", choices=ALGS, default="moco", help="what wrote them")
    a("--clus_pos_num", type=positive, default=5, help="K, neighbours of an image, itself not counted")
    a("--bags", choices=["knn", "kmeans", "label", "random"], default="knn", help="knn: the method; kmeans: clusters "
      "of the features; label: the upper bound; random: a control")  # fmt: skip
    a("--clusters", type=natural, default=0, help="of --bags kmeans; 0: one for 10 images [inferred]")
    a("--corr_name", type=Path, default="imgs_corr_moco_epoch800.npy", help="file below --corr_dir")
    a("--corr_dir", type=Path, default="imgs_corr", help="folder of correlation files")
    a("--feature_file", type=Path, help="keep the features in this .npy (mapped, not in memory: for ImageNet)")
    a("--batch_size", type=positive, default=32, help="images a process")
    add_machine_flags(p, amp="none")
    a("--seed", type=natural, default=0, help="of kmeans and random bags")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    set_threads(args.threads, args.workers, device)
    images = train_images(args)
    labels = images.labels
    if args.bags == "label" and not images.has_labels:
        raise UserError(f"--bags label: {args.data_dir} has no two class folders, so its images have no labels")
    if args.bags == "knn" and len(images) <= args.clus_pos_num:
        raise UserError(f"--clus_pos_num {args.clus_pos_num} needs more than so many images, there are {len(images)}")
    out, made_by = args.corr_dir / args.corr_name, None
    if distributed.rank() == 0:
        check_writable(out)
    clusters = args.clusters or max(2, len(images) // 10)
    if args.bags == "kmeans" and clusters > len(images):
        raise UserError(f"--clusters {clusters}: there are only {len(images)} images")
    rng = np.random.Generator(np.random.PCG64(args.seed))
    if args.bags == "label":
        array = labels.numpy()
    elif args.bags == "random":
        if len(images) < 2:
            raise UserError("--bags random needs two images at least, there is one")
        others = rng.integers(len(images) - 1, size=(len(images), args.clus_pos_num))
        array = others + (others >= np.arange(len(images))[:, None])  # never the image itself
    else:
        if args.ckpt_name is None:
            raise UserError("--ckpt_name: the weights of the teacher are needed for these bags")
        teacher, read = load_teacher(args.arch, args.ckpt_name, args.pretrain_alg, args.t_width, args.t_stem)
        timm_nets.check_size(teacher, args.arch, args.img_size)
        made_by = {"sha256": fingerprint(teacher), "name": f"{args.arch} of {args.ckpt_name} ({args.pretrain_alg})"}
        if distributed.rank() == 0:
            print(f"bingo/compute_knn: {made_by['name']}, {read} tensors read", flush=True)
        teacher = place(teacher, device).eval()
        images.transform = plain(args.img_size, args.aug_backend)
        bank = features(
            lambda x: teacher(x, pre_out=True),
            images,
            device,
            args.batch_size,
            args.workers,
            args.amp == "bf16",
            args.feature_file,
        )
        if args.bags == "knn":
            array = neighbours(bank, args.clus_pos_num, device).numpy()
        elif distributed.rank() > 0:
            return 0  # the features are complete, one process clusters
        else:
            from sklearn.cluster import MiniBatchKMeans

            array = MiniBatchKMeans(clusters, random_state=args.seed, n_init=1).fit_predict(bank.numpy())
    if distributed.rank() == 0:
        save_bags(out, array, images, args.bags, made_by)
        line = f"{args.bags} bags of {len(images)} images -> {out}"
        if array.ndim == 2 and images.has_labels:
            line += f"; {purity(torch.from_numpy(array), labels):.1f} % of the members have their anchor's label"
        print(line + (f"; not read: {tell(images.unread)}" if images.unread else ""))
    return 0


if __name__ == "__main__":
    cli(main)
