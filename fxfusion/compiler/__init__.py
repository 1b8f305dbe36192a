"""From a captured graph to a fused one that Inductor compiles: capture, pipeline, proofs, packed weights, options."""
