"""What DeepSpeed imports no sooner than an engine is made: imported before ranks are forked, it costs each of them nothing."""

from contextlib import suppress

import deepspeed

with suppress(ImportError):  # a module of its own making, which loads torch's compiler: most of an engine's start
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
