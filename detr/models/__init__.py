"""Detectors: one module over shared parts for every architecture. Needs torch and timm."""

from __future__ import annotations

from detr.models.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from detr.models.checkpoint import load_model, save_info, save_model
from detr.models.describe import parameters
from detr.models.detector import Detector, build_detector, detections
from detr.models.protocol import Facts, Teacher, TeacherPart
from detr.models.structures import (
    Denoising,
    DenseAttention,
    GroupOutput,
    LevelShapes,
    Memory,
    PixelMap,
    Proposals,
    QueryGroup,
    SampledAttention,
    Target,
)

__all__ = [
    "Denoising",
    "DenseAttention",
    "Detector",
    "Facts",
    "GroupOutput",
    "LevelShapes",
    "Memory",
    "PixelMap",
    "Proposals",
    "QueryGroup",
    "SampledAttention",
    "Target",
    "Teacher",
    "TeacherPart",
    "build_detector",
    "cxcywh_to_xyxy",
    "detections",
    "inverse_sigmoid",
    "load_model",
    "parameters",
    "save_info",
    "save_model",
    "xyxy_to_cxcywh",
]
