"""`headrace pull` behind its options: rows of a stream into safetensors files, resumable after any crash."""
