"""COCO and KITTI AP, and which detection answers which object."""
