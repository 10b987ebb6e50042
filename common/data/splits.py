"""One split of a data set as batches on the device: resize, augment and normalise where the network runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

CACHE_BYTES = 2 * 2**30
"""A split whose resized images take no more than this is resized once and kept as uint8."""


@dataclass(frozen=True)
class Batch:
    """images: (B, C, S, S) float32, normalised · labels: (B,) int64 · indices: (B,) int64, rows of the split."""

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Augmentation:
    """Random affine change of each image; what leaves the frame is filled as `padding_mode` says."""

    shift: float = 0.0  # largest shift, as a share of the image side
    rotation: float = 0.0  # largest rotation, degrees
    scale: float = 0.0  # largest relative change of size
    flip: bool = False  # mirror left and right, every second image
    padding_mode: str = "zeros"

    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return changed images: (B, C, S, S) -> (B, C, S, S), float; the input stays as it is."""
        count, (height, width) = images.shape[0], images.shape[-2:]
        draws = torch.rand(count, 5, generator=generator, device=generator.device).to(images.device) * 2 - 1
        angle = draws[:, 0] * math.radians(self.rotation)
        zoom = 1 + draws[:, 1] * self.scale
        mirror = torch.where(draws[:, 2] < 0, -1.0, 1.0) if self.flip else torch.ones_like(angle)
        # Whole pixels: a shift must not blur. grid_sample's frame is 2 wide, hence the factor 2 / side.
        sides = draws.new_tensor([width, height])
        shift = (draws[:, 3:] * self.shift * sides).round() * (2 / sides)
        theta = torch.stack(
            [
                torch.stack([mirror * zoom * angle.cos(), -zoom * angle.sin(), shift[:, 0]], dim=1),
                torch.stack([mirror * zoom * angle.sin(), zoom * angle.cos(), shift[:, 1]], dim=1),
            ],
            dim=1,
        )  # (B, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        mode = "bilinear" if self.rotation or self.scale else "nearest"
        return F.grid_sample(images, grid, mode=mode, padding_mode=self.padding_mode, align_corners=False)


def both_sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a side or of a pair."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])


@dataclass(frozen=True)
class ImageFormat:
    """What every batch of a data set looks like; mean and std hold one number per channel, for pixels in 0..1.

    `image_size` is the side of square images, or (height, width). `shorter_side` is what an image file is scaled to
    before its middle is cut out; None: the largest middle that has the format's proportions.
    """

    image_size: int | tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation = field(default_factory=Augmentation)
    shorter_side: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return both_sides(self.image_size)

    def resize(self, images: Tensor) -> Tensor:
        """Resize uint8 images: (B, C, H, W) -> (B, C, S, S), bilinear with antialiasing, rounded back to uint8."""
        size = self.size
        if tuple(images.shape[-2:]) == size:
            return images
        resized = F.interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False)
        return resized.round().clamp(0, 255).to(torch.uint8)

    def prepare(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 (B, C, S, S) -> normalised float32 (B, channels, S, S); augmented iff a generator is given."""
        pixels = images.float() / 255
        if generator is not None:
            pixels = self.augmentation.apply(pixels, generator)
        mean, std = (pixels.new_tensor(numbers).view(1, -1, 1, 1) for numbers in (self.mean, self.std))
        return ((pixels - mean) / std).expand(-1, self.channels, -1, -1).contiguous()


class Split:
    """Labelled images that live on one device.

    images: (N, C, H, W) uint8 · labels: (N,) int64, on the same device.
    """

    def __init__(self, images: Tensor, labels: Tensor, image_format: ImageFormat):
        self.labels = labels
        self.format = image_format
        self._images = images
        self._content: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def content(self) -> str:
        """A digest of the images, as they were before any resizing, and of the labels, in their order."""
        if self._content is None:
            digest = hashlib.sha256(self.labels.cpu().numpy().tobytes())
            self._add_images(digest)
            self._content = digest.hexdigest()
        return self._content

    def _add_images(self, digest: hashlib._Hash) -> None:
        digest.update(repr(tuple(self._images.shape)).encode())
        for part in self._images.split(4096):
            digest.update(part.cpu().contiguous().numpy().tobytes())

    def num_batches(self, batch_size: int, *, limit: int | None = None, drop_last: bool = False) -> int:
        """Count the batches that `batches` yields with the same arguments."""
        count = len(self) if limit is None else min(limit, len(self))
        return count // batch_size if drop_last else -(-count // batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        limit: int | None = None,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """Iterate over the split once: shuffled iff a generator is given, else in the split's own order.

        Args:
            augment: apply the data set's augmentation, drawn from the generator.
            limit: stop after the first `limit` images of that order.
            drop_last: leave out an incomplete last batch.

        Raises:
            ValueError: batch_size or limit below 1, or augmentation without a generator.
        """
        if batch_size < 1 or (limit is not None and limit < 1):
            raise ValueError(f"batch_size and limit must be at least 1, got {batch_size} and {limit}")
        if augment and generator is None:
            raise ValueError("augment=True needs a generator: augmentation is random, and randomness is seeded")
        if generator is None:
            order = torch.arange(len(self))
        else:
            order = torch.randperm(len(self), generator=generator, device=generator.device).cpu()
        chunks = list(order[:limit].split(batch_size))
        if drop_last and len(chunks[-1]) < batch_size:
            chunks.pop()
        return self._iterate(chunks, generator if augment else None)

    def sample(self, count: int, seed: int) -> Tensor:
        """Draw `count` different images, normalised and not augmented: (count, channels, S, S).

        Raises:
            ValueError: count outside 1..len(self).
        """
        if not 1 <= count <= len(self):
            raise ValueError(f"a sample of {count} images was asked of a split that holds {len(self)}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return torch.cat([batch.images for batch in self._iterate(list(order.split(512)), None)])

    def _iterate(self, chunks: list[Tensor], augmenter: torch.Generator | None) -> Iterator[Batch]:
        for chunk, raw in zip(chunks, self._raw_batches(chunks), strict=True):
            indices = chunk.to(self.device)
            yield Batch(self.format.prepare(raw, augmenter), self.labels[indices], indices)

    def _raw_batches(self, chunks: list[Tensor]) -> Iterator[Tensor]:
        """Yield uint8 images (B, C, S, S) on the device for each chunk of row numbers."""
        self._resize_once()
        for chunk in chunks:
            yield self.format.resize(self._images[chunk.to(self.device)])

    def _resize_once(self) -> None:
        count, channels, *size = self._images.shape
        height, width = self.format.size
        if size != [height, width] and count * channels * height * width <= CACHE_BYTES:
            self._content = self.content  # while the images are as they came
            self._images = torch.cat([self.format.resize(part) for part in self._images.split(1024)])
