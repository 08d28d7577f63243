"""A control without a block: k-means on the frozen encoder's keys of all frames of a sequence.

python -m uvos_dino.lab.kmeans --dino_path DINO --basepath DAVIS --dataset DAVIS --clusters 10 --save_path FOLDER

Keys are scaled to length 1 (k-means by cosine); Lloyd's iterations from k-means++, the best of --starts. What a trained
block adds shows against it at the same number of clusters (--like RUN-test/result.json).
"""

import argparse
import time

import torch
import torch.nn.functional as F

from shared_utils import UserError
from shared_utils.flags import Parser, add_machine_flags, positive
from shared_utils.run import cli, set_threads
from uvos_dino import vision_transformer
from uvos_dino.data import NORMS, open_videos, read_video, said
from uvos_dino.eval_oneshot import chosen_device
from uvos_dino.inference import encode_frames
from uvos_dino.lab import grid
from uvos_dino.model_cluster import AttEncoder


def get_parser() -> argparse.ArgumentParser:
    p = Parser(prog="uvos_dino.lab.kmeans", description=__doc__.splitlines()[0])
    a = p.add_argument
    a("--dino_path", required=True, help="weights of the encoder, as of uvos_dino.train_RGB_cluster")
    a("--resolution", type=positive, nargs=2, default=[320, 480], metavar=("H", "W"))
    a("--eval_norm", choices=list(NORMS), default="imagenet")
    a("--frame_batch", type=positive, default=16, help="frames that go through the encoder at once")
    a("--starts", type=positive, default=4, help="of k-means; the one with the least distances is taken")
    add_machine_flags(p, workers=None)
    grid.add_flags(p, "uvos_dino/kmeans")
    return p


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    from sklearn.cluster import KMeans

    started = time.time()
    device = chosen_device(args.device)
    set_threads(args.threads, 0, device)
    videos = open_videos(args.dataset, args.basepath, args.split, args.sequences)
    wanted = grid.numbers(args, videos)
    encoder, loaded = vision_transformer.load(args.dino_path, "vit_small", 8)
    h, w = encoder.grid(*args.resolution)
    print(f"  data: {said(args.dataset, args.basepath, args.split, videos)}\n  encoder: {loaded}")
    model = AttEncoder(encoder, 1, 1).to(device).eval()
    for video in videos:
        frames = read_video(video.frames, tuple(args.resolution))
        keys = F.normalize(encode_frames(model, frames, args.eval_norm, device, args.frame_batch), dim=-1)  # [T, N, C]
        count = wanted[video.name]
        if count > keys.shape[0] * keys.shape[1]:
            raise UserError(f"{video.name}: {count} clusters of {keys.shape[0] * keys.shape[1]} patches")
        found = KMeans(count, n_init=args.starts, random_state=args.seed % 2**32)
        labels = torch.from_numpy(found.fit_predict(keys.flatten(0, 1).cpu().numpy())).to(torch.int32)
        grid.save(args, video, labels.view(len(frames), h, w).numpy(), count)
    return grid.leave(args, videos, started)


if __name__ == "__main__":
    cli(main)
