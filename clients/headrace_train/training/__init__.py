"""The training itself: SAELens' trainer, its progress, and evaluation on held-out rows."""
