"""The best bundle within a latency: measured on this device, chosen, drawn."""
