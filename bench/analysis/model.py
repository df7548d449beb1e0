"""What an analysis of one artifact holds."""

from __future__ import annotations

from pydantic import BaseModel

from detr.metrics.confusion import Confusion
from detr.metrics.slices import Slices

# In text; all are in the JSON form.
_MOST_CLASSES = 12


class Analysis(BaseModel):
    """Accuracy of one artifact in parts.

    Attributes:
        score: From which on a detection counts in confusions and in the slices' recall.
        iou: Least overlap there.
        curves: By class, and ``all`` for their mean: precision at the recalls 0, 0.01, ... 1 at
            this IoU; classes without objects are left out.
        confusion: What was taken for what.
        slices: By size, class, what the labels tell, and the user's own table.
    """

    score: float
    iou: float
    curves: dict[str, list[float]]
    confusion: Confusion
    slices: list[Slices]

    def text(self) -> list[str]:
        """Slices and the most frequent confusions, for a terminal."""
        lines = []
        for table in self.slices:
            if table.by == "class" and len(table.rows) > _MOST_CLASSES:
                continue
            width = max(len(table.by), *(len(row.value) for row in table.rows))
            lines.append(
                f"{table.by:{width}}  {'objects':>7}  {'AP':>5}  {'AP50':>5}  recall at score "
                f"{self.score:g}"
            )
            for row in table.rows:
                recall = "–"
                if row.recall is not None and row.interval is not None:
                    low, high = (100 * v for v in row.interval)
                    recall = f"{100 * row.recall:.1f} ({low:.1f} – {high:.1f})"
                lines.append(
                    f"{row.value:{width}}  {row.objects:7}  {_percent(row.ap):>5}  "
                    f"{_percent(row.ap50):>5}  {recall}"
                )
        confused = self.confused()
        if confused:
            lines.append("most frequent mistakes: " + ", ".join(confused[:5]))
        return lines

    def confused(self) -> list[str]:
        """``12 Van taken for Car``, the most frequent first."""
        names = self.confusion.names
        found = [
            (count, truth, taken)
            for truth, row in enumerate(self.confusion.counts)
            for taken, count in enumerate(row)
            if count and truth != taken
        ]
        said = []
        for count, truth, taken in sorted(found, key=lambda entry: -entry[0]):
            if truth == len(names):
                said.append(f"{count} {names[taken]} where there is none")
            elif taken == len(names):
                said.append(f"{count} {names[truth]} missed")
            else:
                said.append(f"{count} {names[truth]} taken for {names[taken]}")
        return said


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
