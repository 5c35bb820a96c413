"""Categories over nodes and GPUs. It knows training only as a command line."""
