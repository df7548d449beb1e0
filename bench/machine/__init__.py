"""What the machine was doing while something was timed: clocks, accelerators, versions."""
