"""Makes corpora: `steps` write their folders from files, mixtures and documents, `mixing` draws, `upload` spools."""
