"""What transformers leaves out of GGUF files without a word: parts, the scaling of rotations, settings."""
