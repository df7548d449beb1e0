"""Smaller detectors within a detector: the same weights, fewer layers and queries.

The first layers of encoder and decoder, with the decoder's heads, and the first queries. A decoder
whose every layer is trained to answer is nested that way already; what else is, training decides.
"""

from __future__ import annotations

from torch import Tensor, nn

from detr.models.detector import Detector, build_detector


class FirstRows(nn.Module):
    """The first rows of a table of embeddings, which stays the one that is trained.

    Args:
        table: ``[N, D]``.
        rows: How many.
    """

    def __init__(self, table: nn.Embedding, rows: int) -> None:
        super().__init__()
        self.table, self.rows = table, rows

    @property
    def weight(self) -> Tensor:
        """``[rows, D]``, with the table's gradient."""
        return self.table.weight[: self.rows]


def share_tensors(module: nn.Module, source: nn.Module) -> list[str]:
    """Gives a module the very parameters and buffers of another, where name and shape agree.

    Args:
        module: Changed in place.
        source: Whose tensors it shares from now on.

    Returns:
        Names of the tensors that stay its own.
    """
    theirs = dict(source.named_modules(remove_duplicate=False))
    own = []
    for path, part in module.named_modules():
        other = theirs.get(path)
        for kind in ("_parameters", "_buffers"):
            tensors: dict[str, Tensor | None] = getattr(part, kind)
            shared = {} if other is None else getattr(other, kind)
            for name, tensor in tensors.items():
                found = shared.get(name)
                if tensor is None:
                    continue
                if found is not None and found.shape == tensor.shape:
                    tensors[name] = found
                else:
                    own.append(f"{path}.{name}".lstrip("."))
    return own


def query_tables(detector: Detector) -> dict[str, nn.Embedding]:
    """A detector's tables of its queries, by name."""
    return {
        name: table
        for name, table in detector.source.named_modules()
        if isinstance(table, nn.Embedding)
    }


def within(detector: Detector, encoder: int, decoder: int, queries: int) -> Detector:
    """A smaller detector that shares every tensor with a larger one.

    What moves the larger one's weights moves its own; it is another view and no copy.

    Args:
        detector: The larger one.
        encoder: Layers of its encoder, the first ones.
        decoder: The same of its decoder.
        queries: Of its own group, the first ones; of proposals, the best.

    Raises:
        pydantic.ValidationError: Where there is no such detector.
    """
    config = detector.config.replace(
        encoder={"layers": encoder}, decoder={"layers": decoder}, queries={"number": queries}
    )
    smaller = build_detector(config, pretrained=False)
    own = share_tensors(smaller, detector)
    tables = query_tables(detector)
    for name, table in query_tables(smaller).items():
        if len(table.weight) < len(tables[name].weight):
            owner, _, last = name.rpartition(".")
            rows = FirstRows(tables[name], len(table.weight))
            setattr(smaller.source.get_submodule(owner), last, rows)
            own.remove(f"source.{name}.weight")
    assert not own, own
    return smaller.keep_frozen(detector)
