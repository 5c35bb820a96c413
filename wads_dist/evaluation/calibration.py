"""Makes the experts of a category comparable (`experts.py`), and the bank of its normal patches, from its normal images alone.

Scales come from images held out of training, if there are enough of them. If not, from those trained on, each measured against
the bank without its own patches: the segmenter and the error are then a little surer of them than of new ones.
"""

import torch
from torch import Tensor

from wads_dist.common.errors import NotFiniteError
from wads_dist.common.ranks import Ranks
from wads_dist.config.schema import Config
from wads_dist.data.images import Entry, decode_entries
from wads_dist.data.training import TrainingSplit
from wads_dist.evaluation.scoring import rank_batches
from wads_dist.kernels.objective import ssim
from wads_dist.kernels.philox import shuffled
from wads_dist.kernels.synthesis import whole_images
from wads_dist.model.bank import Chosen, PatchBank, choose_patches, embed, resized
from wads_dist.model.experts import Experts
from wads_dist.model.features import FrozenNetwork
from wads_dist.model.networks import Wads
from wads_dist.shards.errors import DataError
from wads_dist.shards.source import Dataset

ENOUGH, AT_MOST = 20, 64
"""Images held out that scales can be fitted to, and images that they are fitted to."""
GRID = 128
"""Pixels a side of an image that take part; of larger maps, every second, third, …"""


@torch.inference_mode()
def fit_experts(
    model: Wads, network: FrozenNetwork | None, config: Config, dataset: Dataset, category: str, ranks: Ranks
) -> Experts:
    """The experts of ``model``, which it does not have yet, with a bank if there is a ``network``; the same on every rank and
    for any number of them. Collective.

    Raises:
        DataError: an image cannot be decoded, which is named, or there are too few.
        NotFiniteError: the model has diverged.
    """
    torch.backends.cudnn.allow_tf32 = False  # as where images are scored
    split, device = TrainingSplit.of(dataset, category, config), ranks.device
    own, bank = None, None
    if network is not None:
        own, bank = build_bank(network.to(device), config, dataset, category, split.trained, ranks)
    entries, place = calibration_images(split, config.trainer.seed)
    scores, followed, step = [], [0, 0], max(1, config.data.image_size // GRID)
    for batch in rank_batches(len(entries), config.evaluation.batch_size, ranks):
        part = [entries[i] for i in batch]
        stored = decode_entries(dataset, category, part, config.data.store_size).to(device)
        image = whole_images(stored, config.data.image_size).contiguous(memory_format=torch.channels_last)
        reconstruction, _ = model.generator.reconstruct(image)
        left_out, usable = None, torch.ones(len(part), dtype=torch.bool)
        if own is not None:
            left_out = own.image[None] == torch.tensor([place[i] for i in batch])[:, None]
            usable, left_out = ~left_out.all(1), left_out.to(device)
        of_batch = model.raw_scores(image, reconstruction, stored.float() / 255, bank, left_out)
        scores.append(of_batch[:, :, ::step, ::step].cpu()[usable])
        followed = [a + b for a, b in zip(followed, follows_input(image, reconstruction), strict=True)]
    everywhere = torch.cat([part for of_rank in ranks.gather(scores) for part in of_rank])
    won, pairs = (sum(column) for column in zip(*ranks.gather(followed), strict=True))
    if not len(everywhere):
        raise DataError(
            f"category {category!r}: all patches of the bank are of one image, which cannot be measured against itself; give "
            "more images, or raise features.images and features.patches"
        )
    if not everywhere.isfinite().all():
        raise NotFiniteError(
            f"{category}: the trained network's scores of normal images are not finite; train it again"
        )
    experts = Experts(config.experts, bank)
    experts.fit(everywhere)
    if pairs:
        experts.weigh_error(won / pairs)
    return experts.to(device)


def follows_input(images: Tensor, reconstructions: Tensor) -> tuple[int, int]:
    """In how many of how many pairs (i, j ≠ i; at most 16 partners an image) X̂_i is more similar (SSIM) to X_i than to X_j, of
    [N, 3, H, H] in [0, 1]. Half of the pairs is chance."""
    own, won, pairs = ssim(images, reconstructions), 0, 0
    for shift in range(1, min(len(images), 17)):
        won += int((own > ssim(images.roll(shift, 0), reconstructions)).sum())
        pairs += len(images)
    return won, pairs


def build_bank(
    network: FrozenNetwork, config: Config, dataset: Dataset, category: str, entries: list[Entry], ranks: Ranks
) -> tuple[Chosen, PatchBank]:
    """Which patches of ``entries``, and the bank of them on the rank's device. Every rank reads its batches of images, one at a
    time. Collective."""
    settings = config.features
    indices = drawn(config.trainer.seed, len(entries), settings.images)
    side = settings.size // 8
    count = min(settings.patches, round(settings.fraction * len(indices) * side * side))
    chosen = choose_patches(config.trainer.seed, indices, side * side, max(1, count))
    rows = []
    for batch in rank_batches(len(indices), config.evaluation.batch_size, ranks):
        part = [indices[i] for i in batch]
        stored = decode_entries(dataset, category, [entries[i] for i in part], config.data.store_size)
        patches = embed(*network(resized(stored.to(ranks.device).float() / 255, settings.size))).flatten(2)
        for i, image in zip(part, patches, strict=True):
            rows.append(image[:, chosen.place[chosen.image == i].to(ranks.device)].T.cpu())
    bank = torch.cat([part for of_rank in ranks.gather(rows) for part in of_rank])
    return chosen, PatchBank(network, settings.size, bank).to(ranks.device)


def drawn(seed: int, total: int, most: int) -> list[int]:
    """At most ``most`` of ``total``, rising. At random: files that stand together in a folder are often of one day or lot."""
    return sorted(shuffled(seed, torch.arange(min(total, most)), total).tolist())


def calibration_images(split: TrainingSplit, seed: int) -> tuple[list[Entry], list[int]]:
    """The images that scales are fitted to, and the place of each among those trained on, −1 for the others."""
    if len(split.held_out) >= ENOUGH:
        entries, place = split.held_out, [-1] * len(split.held_out)
    else:
        entries = split.held_out + split.trained
        place = [-1] * len(split.held_out) + list(range(len(split.trained)))
    kept = drawn(seed, len(entries), AT_MOST)
    return [entries[i] for i in kept], [place[i] for i in kept]
