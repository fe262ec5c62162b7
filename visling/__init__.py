"""visling: the region-based vision-and-language Transformers, exact, fast and readable."""

__version__ = "0.1.0"
