"""distattn: attention for training at 64K to millions of tokens of context, on schedules that are data."""

__version__ = "0.1.0"
