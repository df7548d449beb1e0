"""One report, one row per artefact; the model first, the pages made of it beside it."""
