"""Studies: papers whose result is a grid of measurements, as a job over one's own models."""
