"""One category, trained by one group of ranks."""
