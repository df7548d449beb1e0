"""A student starts from its teacher's weights, matched by name and layer map.

D3ETR's "inheriting strategy": encoder and decoder start where the teacher ended, and with them
heads, queries and input projections. A backbone is taken where it is the teacher's; most students
have another.
"""

from __future__ import annotations

from collections.abc import Sequence

from detr.errors import UserError
from detr.models.detector import Detector
from detr.models.transfer import Source, TransferReport, transfer


def inherit(
    student: Detector,
    teacher: Detector,
    encoder: Sequence[int] | None = None,
    decoder: Sequence[int] | None = None,
    columns: Sequence[int | None] | None = None,
) -> TransferReport:
    """Copies the teacher's weights into the student; see :func:`detr.models.transfer.transfer`.

    Raises:
        UserError: ``inherit-layer-map`` for a map that does not fit the depths, ``inherit-nothing``
            where no tensor agrees.
    """
    source = Source("teacher", teacher.config, teacher.state_dict())
    report = transfer(student, source, encoder, decoder, columns)
    if not report.inherited:
        raise UserError(
            "inherit-nothing",
            "inherit: no tensor of the student has the shape of the teacher's "
            f"(width {student.config.width} and {teacher.config.width}); --set inherit=false",
        )
    return report
