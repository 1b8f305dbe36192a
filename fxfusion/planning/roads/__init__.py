"""Plans over three roads to chains of FFNs: drop the attention between them, hoist it, or make it one wide block."""
