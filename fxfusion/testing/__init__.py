"""Random stacks with ground truth, and oracles, for tests of fxfusion and of what is built on it.

spec -> Stack(spec): module, chains(), groups(), parallel_forward(x, groups, norm)
strategies.stacks(), effect_stacks(): random specs (needs hypothesis; nothing else here does)
"""

from __future__ import annotations

from fxfusion.testing.oracles import straddles
from fxfusion.testing.spec import Again, Block, Effect, Ffn, Mixer, NotFfn, StackSpec, StreamNorm, Tap
from fxfusion.testing.stack import Stack

__all__ = ["Again", "Block", "Effect", "Ffn", "Mixer", "NotFfn", "Stack", "StackSpec", "StreamNorm", "Tap", "straddles"]
