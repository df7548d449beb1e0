"""Synthetic road scenes, deterministic by seed, written as ordinary KITTI or COCO folders."""

from detr.data.synth.scene import CLASSES, Scene, SceneObject, render
from detr.data.synth.write import generate

__all__ = ["CLASSES", "Scene", "SceneObject", "generate", "render"]
