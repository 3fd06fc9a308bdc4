"""Trains a sparse autoencoder from a Headrace stream, with SAELens' own trainer, in its own process."""
