"""The commands about models: their registration, their files, their memory, and whether they run."""
