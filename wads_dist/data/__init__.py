"""Shards to images on the device, and what training and scoring take of them."""
