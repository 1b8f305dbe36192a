"""What a model's layers are, and what they cost: tables of published architectures."""
