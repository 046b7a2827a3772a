"""dpgbench: Dataset Policy Gradient beside the alternatives a practitioner would weigh, under one budget accounting."""

__version__ = "0.1.0"
