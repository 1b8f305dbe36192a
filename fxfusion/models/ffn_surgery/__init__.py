"""Module surgery: a group of FFNs becomes one wider FFN in stock modules, and back."""
