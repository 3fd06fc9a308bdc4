"""Progress and results for people at a terminal, for log files and for machines."""
