"""Which source of queries a config asks for; a further kind is one entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detr.config import (
    AnchorQueriesConfig,
    DetectorConfig,
    GroupedQueriesConfig,
    LearnedQueriesConfig,
    MixedQueriesConfig,
    SelectedQueriesConfig,
    TwoStageQueriesConfig,
    UnifiedQueriesConfig,
)
from detr.models.queries.grouped import GroupedQueries
from detr.models.queries.proposals import (
    MixedQueries,
    SelectedQueries,
    TwoStageQueries,
    UnifiedQueries,
)
from detr.models.queries.sources import AnchorQueries, LearnedQueries, QuerySource

_SOURCES: dict[type, Callable[[DetectorConfig, Any], QuerySource]] = {
    LearnedQueriesConfig: LearnedQueries,
    AnchorQueriesConfig: AnchorQueries,
    TwoStageQueriesConfig: TwoStageQueries,
    MixedQueriesConfig: MixedQueries,
    SelectedQueriesConfig: SelectedQueries,
    GroupedQueriesConfig: GroupedQueries,
    UnifiedQueriesConfig: UnifiedQueries,
}


def build_queries(config: DetectorConfig) -> QuerySource:
    """A new source of a detector's queries."""
    return _SOURCES[type(config.queries)](config, config.queries)
