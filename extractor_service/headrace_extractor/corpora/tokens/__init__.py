"""Tokenizers held by child processes: `texts` decodes token ids, `proven` tells which tokenizers a runner may load."""
