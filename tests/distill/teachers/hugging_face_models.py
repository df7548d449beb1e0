"""Tiny detectors of the transformers library with random weights, as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

SIZE = (64, 64)
NAMES = ("tree", "Car", "Pedestrian", "Cyclist", "Van", "Truck", "Person_sitting", "Tram")
_HYBRID: dict[str, Any] = {
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "hidden_expansion": 0.5,
    "num_queries": 9,
}
_RESNET = {
    "model_type": "rt_detr_resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 20],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
_HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 12, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 12, 16, 20],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "hidden_sizes": [8, 12, 16, 20],
    "depths": [1, 1, 1, 1],
    "embedding_size": 8,
    "out_features": ["stage2", "stage3", "stage4"],
}
_GROUPED: dict[str, Any] = {
    "d_model": 32,
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "num_queries": 9,
    "group_detr": 2,
}
_CHANNELS = {"encoder_in_channels": [12, 16, 20]}
CONFIGS: dict[str, dict[str, Any]] = {
    "rt_detr": {**_HYBRID, **_CHANNELS, "backbone_config": _RESNET},
    "rt_detr_v2": {**_HYBRID, **_CHANNELS, "backbone_config": _RESNET},
    "d_fine": {**_HYBRID, **_CHANNELS, "backbone_config": _HGNET, "decoder_n_points": [3, 6, 3]},
    "deimv2": {**_HYBRID, **_CHANNELS, "backbone_config": _HGNET, "decoder_n_points": [3, 6, 3]},
    "rf_detr": {
        **_GROUPED,
        "backbone_config": {
            "model_type": "rf_detr_dinov2",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "num_windows": 2,
            "out_features": ["stage1", "stage2"],
        },
    },
    "lw_detr": {
        **_GROUPED,
        "projector_scale_factors": [1.0],
        "backbone_config": {
            "model_type": "lw_detr_vit",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "pretrain_image_size": 64,
            "num_windows": 4,
            "window_block_indices": [0],
            "out_indices": [1, 2],
        },
    },
}


def write(kind: str, folder: Path) -> Path:
    """A published model of a kind; it knows one class more than KITTI has, in another order."""
    torch.manual_seed(0)
    labels = dict(enumerate(NAMES))
    config = transformers.CONFIG_MAPPING[kind](
        **CONFIGS[kind], id2label=labels, label2id={n: i for i, n in labels.items()}
    )
    model = transformers.AutoModelForObjectDetection.from_config(config).eval()
    model.save_pretrained(folder)
    processor = {"do_normalize": kind in ("rf_detr", "lw_detr"), "do_rescale": True}
    processor |= {"size": {"height": SIZE[0], "width": SIZE[1]}, "rescale_factor": 1 / 255}
    processor |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
