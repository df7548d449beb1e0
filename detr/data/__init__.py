"""Images and labels: data sets, preprocessing, synthetic scenes. Imports without torch."""

from detr.data.dataset import Dataset, Labels
from detr.data.findings import Finding, Findings, inspect
from detr.data.open import open_dataset
from detr.data.preprocess import Inputs, PreprocessConfig, preprocess

__all__ = [
    "Dataset",
    "Finding",
    "Findings",
    "Inputs",
    "Labels",
    "PreprocessConfig",
    "inspect",
    "open_dataset",
    "preprocess",
]
