"""GGUF files, which llama.cpp and its kin run."""
