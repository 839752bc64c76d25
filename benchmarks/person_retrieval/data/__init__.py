"""Splits of images and captions, and how they are read: the three public data sets and the rendered pedestrians."""

from .augmentation import Augmentation
from .checks import check_images, too_long
from .errors import DataError
from .folders import LAYOUTS, read_dataset, splits_of
from .pairs import Images, Pairs
from .rendered import catalogue_split, rendered_splits
from .samplers import Batches, IdentitySampler, RandomSampler
from .split import Split

__all__ = [
    "LAYOUTS",
    "Augmentation",
    "Batches",
    "DataError",
    "IdentitySampler",
    "Images",
    "Pairs",
    "RandomSampler",
    "Split",
    "catalogue_split",
    "check_images",
    "read_dataset",
    "rendered_splits",
    "splits_of",
    "too_long",
]
