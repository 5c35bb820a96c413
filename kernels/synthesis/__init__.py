"""Resident uint8 images and global sample indices → clean image, anomalous image, mask (Eq 3.1)."""

from kernels.synthesis.op import synthesise
from kernels.synthesis.reference import Batch, Draws, SynthesisSettings, draw, whole_images

__all__ = ["Batch", "Draws", "SynthesisSettings", "draw", "synthesise", "whole_images"]
