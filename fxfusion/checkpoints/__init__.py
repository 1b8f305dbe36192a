"""Folders of model files: written whole or not at all, read without trust."""
