"""The rows of an extraction on their way into training: read, filtered and mixed."""
