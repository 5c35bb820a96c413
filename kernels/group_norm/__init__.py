"""GroupNorm and the activation behind it, in one pass over channels_last images."""

from .op import group_norm_act

__all__ = ["group_norm_act"]
