"""Under which licenses weights are published, by the family that a reader recognises.

What the repositories and model cards said in November 2026. It is told and decides nothing: a
person's own training has that person's license, and the files that came with weights have the last
word.
"""

from __future__ import annotations

from typing import NamedTuple

_APACHE = "Apache-2.0"


class License(NamedTuple):
    """How a family's weights are published.

    Attributes:
        repository: On GitHub.
        name: SPDX identifier.
        but: Published sizes under another license, and under which one.
    """

    repository: str
    name: str = _APACHE
    but: str = ""

    def __str__(self) -> str:
        told = f"published weights of {self.repository} are under {self.name}"
        return f"{told}, but {self.but}" if self.but else told


# Names are those of the readers' tables (``FAMILIES``).
LICENSES = {
    "detr": License("facebookresearch/detr"),
    "conditional_detr": License("Atten4Vis/ConditionalDETR"),
    "dab_detr": License("IDEA-Research/DAB-DETR"),
    "dab_deformable_detr": License("IDEA-Research/DAB-DETR"),
    "deformable_detr": License("fundamentalvision/Deformable-DETR"),
    "h_deformable_detr": License("HDETR/H-Deformable-DETR", "MIT"),
    "dino": License("IDEA-Research/DINO"),
    "mask_dino": License("IDEA-Research/MaskDINO"),
    "detrex": License("IDEA-Research/detrex"),
    "mmdet": License("open-mmlab/mmdetection"),
    "rt_detr": License("lyuwenyu/RT-DETR"),
    "rt_detr_v2": License("lyuwenyu/RT-DETR"),
    "d_fine": License("Peterande/D-FINE"),
    "deim": License("ShihuaHuang95/DEIM"),
    "deimv2": License(
        "Intellindust-AI-Lab/DEIMv2",
        but="the backbones of S, M, L and X come from Meta's DINOv3, whose weights are under the "
        "DINOv3 License",
    ),
    "lw_detr": License("Atten4Vis/LW-DETR"),
    "rf_detr": License(
        "roboflow/rf-detr", but="XLarge and 2XLarge under the Platform Model License 1.0"
    ),
}
