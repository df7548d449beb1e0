"""One report, one row per artifact; the model first, the pages made of it beside it."""
