"""Write GGUF files, which llama.cpp and its kin run. (Reading them is `fxfusion.checkpoints.gguf`.)"""
