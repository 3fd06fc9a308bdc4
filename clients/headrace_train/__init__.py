"""Trains a sparse autoencoder from a Headrace stream, with SAELens' own trainer, in a process of its own."""
