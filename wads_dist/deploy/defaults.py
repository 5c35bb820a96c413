"""What command lines say of prediction and export before either is imported."""

OVERLAP = 0.25
"""Fraction of a tile that it shares with its neighbours."""
TOLERANCE = 1e-4
"""Largest difference between an exported model and its checkpoint."""
MAX_IMAGES = 64
"""On which an export is compared with its checkpoint."""
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
"""What an export of each format is called."""
