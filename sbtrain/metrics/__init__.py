"""What a step measured (meter) and where it is told (sinks)."""
