"""The networks, frozen features and their bank, and weights as files."""
