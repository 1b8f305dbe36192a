"""The nemotron-nas layout (DeciLM): layers that may lack attention or FFN, each FFN with a width of its own."""
