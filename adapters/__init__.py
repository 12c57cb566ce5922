"""Adapters: one file or folder per family of bases."""
