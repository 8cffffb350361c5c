"""Folders, Hub data sets and streams to checked samples; augmentation; cached features."""

from .augmentation import Normalization, TrainingAugmentation
from .checks import describe_classes, label_encoding, open_samples, print_once
from .failures import Collate, Reported, check_batch
from .features import DecoderOnFeatures, FeatureDataset
from .imagefolder import read_class_names
from .layouts import CITYSCAPES_CLASSES, Splits
from .loading import IMAGE_COLUMNS, LABEL_COLUMNS, find_columns, get_split, load_dataset_splits
from .opening import OpenedData, open_data
from .reading import LabelEncoding, UnreadableImageError
from .samples import (
    EpochSampler,
    EvaluationDataset,
    SegmentationDataset,
    TrainingDataset,
    count_pixels,
    digest,
    read_sample,
    sample_generator,
    undecoded,
)
from .splitting import complete_splits
from .streaming import CHECKED_IMAGES, StreamingDataset, check_stream, count_images, stream_columns

__all__ = [
    "CHECKED_IMAGES",
    "CITYSCAPES_CLASSES",
    "IMAGE_COLUMNS",
    "LABEL_COLUMNS",
    "Collate",
    "DecoderOnFeatures",
    "EpochSampler",
    "EvaluationDataset",
    "FeatureDataset",
    "LabelEncoding",
    "Normalization",
    "OpenedData",
    "Reported",
    "SegmentationDataset",
    "Splits",
    "StreamingDataset",
    "TrainingAugmentation",
    "TrainingDataset",
    "UnreadableImageError",
    "check_batch",
    "check_stream",
    "complete_splits",
    "count_images",
    "count_pixels",
    "describe_classes",
    "digest",
    "find_columns",
    "get_split",
    "label_encoding",
    "load_dataset_splits",
    "open_data",
    "open_samples",
    "print_once",
    "read_class_names",
    "read_sample",
    "sample_generator",
    "stream_columns",
    "undecoded",
]
