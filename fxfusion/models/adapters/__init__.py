"""Adapters of PEFT: taken off while a model's modules are changed, and carried over to the changed ones."""
