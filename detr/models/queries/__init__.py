"""Where queries come from, and how places become positions."""
