"""Running a bundle: one protocol over every runtime. Imports without torch."""

from engines.base import Engine, RawDetections
from engines.bundle import Bundle, BundleInfo, open_bundle
from engines.open import open_engine

__all__ = ["Bundle", "BundleInfo", "Engine", "RawDetections", "open_bundle", "open_engine"]
