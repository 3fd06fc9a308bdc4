"""The two outputs: results on standard output for people or as JSON, progress and notes on standard error."""
