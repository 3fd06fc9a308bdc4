"""The files next to the SAE: two Parquet tables about its features, and `metadata.json`."""
