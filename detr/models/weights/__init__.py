"""Published weights, one state-dict adapter per family."""
