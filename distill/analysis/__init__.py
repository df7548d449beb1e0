"""Looking at runs: methods side by side, a run's diagnosis, what a step costs."""
