"""Spiking neurons, INT8 weights and what they are measured by."""
