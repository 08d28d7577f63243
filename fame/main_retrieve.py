"""Video retrieval by pooled features, without training (paper section 4, release main_retrieve.py):
python -m fame.main_retrieve DATA --pretrained CHECKPOINT

Gallery: the training part, queries: the test part; R@k is the share of queries with a video of their class among the k
nearest. Of your own class folders (--dataset folder) each video is a query in turn, all others are its gallery.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fame import augment
from fame.data import DATASETS, VideoSet, add_data_flags, check_classes, check_data_flags, open_videos
from fame.network import add_network_flags, outputs, resolve, trunk
from shared_utils import distributed
from shared_utils.evaluation import gather_rows, write_result
from shared_utils.flags import Parser, add_machine_flags
from shared_utils.neighbours import search
from shared_utils.run import cli, seed_everything, set_threads

KS = (1, 5, 10, 20, 50)


def get_parser() -> Parser:
    p = Parser(prog="fame.main_retrieve", description=" ".join(__doc__.split("\n\n")[0].split()))
    a = p.add_argument
    add_data_flags(p)
    add_network_flags(p)
    a("--stats", choices=["kinetics", "imagenet"], default="kinetics", help="mean and deviation of the input; training "
      "used Kinetics', the release's script ImageNet's")  # fmt: skip
    add_machine_flags(p, output_dir="fame/retrieve")
    return p


def video_feature(features: Tensor) -> Tensor:
    """Clip features [V, clips, C] -> video features [V, C]: the mean of the unit features of the clips."""
    return F.normalize(features, dim=2).mean(1)


def recall(
    gallery: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, leave_out: bool = False
) -> dict[int, float]:
    """R@k in per cent; each set's mean is taken off its own features first, then all are unit vectors.

    Args:
        gallery: [N, C]; queries: [Q, C]; k is cut at N. leave_out: they are the same, and none finds itself.
    """
    gallery, queries = (F.normalize(x - x.mean(0, keepdim=True), dim=1) for x in (gallery, queries))
    nearest = search(queries, gallery, min(max(KS), len(gallery) - leave_out), exclude_self=leave_out)[1]
    right = labels[nearest] == query_labels[:, None]  # [Q, k]
    return {k: 100 * float(right[:, :k].any(1).double().mean()) for k in KS}


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    device = distributed.init(args.device)
    seed_everything(0)
    set_threads(args.threads, args.workers, device)
    resolve(args)
    check_data_flags(args)
    model, report = trunk(args, device)
    stats = augment.IMAGENET if args.stats == "imagenet" else (augment.MEAN, augment.STD)

    def features(videos: VideoSet) -> tuple[Tensor, Tensor]:
        rows = [video_feature(out).cpu() for out, _ in outputs(model, videos, args, device, stats)]
        own = torch.cat(rows) if rows else torch.empty(0, model.num_features)  # type: ignore[call-overload]
        return gather_rows(own, len(videos), device), torch.tensor(videos.labels)

    test = open_videos(args, train=False)
    if DATASETS[args.dataset].split:
        train = open_videos(args, train=True)
        what = f"fold {args.fold}, {len(train)} in the gallery, {len(test)} queries"
    else:
        check_classes(test, args.data)
        what = f"{len(test)} videos of {len(test.classes)} classes, each a query among the others"
    if distributed.rank() == 0:
        print(f"fame/retrieve: {args.data} {what}; {report}", flush=True)
    queries = features(test)
    if DATASETS[args.dataset].split:
        at = recall(*features(train), *queries)
    else:
        at = recall(*queries, *queries, leave_out=True)
    write_result(args, {f"r{k}": value for k, value in at.items()} | {"pretrained": args.pretrained})
    return 0


if __name__ == "__main__":
    cli(main)
