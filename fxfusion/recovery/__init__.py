"""Making good what dropping attention and fusing FFNs cost: `refit`, in closed form, and `recover`, by training."""
