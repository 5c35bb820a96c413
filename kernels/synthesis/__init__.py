"""Resident uint8 images and global sample indices → clean image, anomalous image, mask (Eq 3.1)."""

from .op import synthesise
from .reference import Batch, Draws, SynthesisSettings, draw, whole_images

__all__ = ["Batch", "Draws", "SynthesisSettings", "draw", "synthesise", "whole_images"]
