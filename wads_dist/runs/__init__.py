"""A run's folder, and nothing else: names, events, the queue, the record."""
