"""A training harness that fine-tunes GPTs with DeepSpeed on clusters."""

__version__ = "0.1.0"
