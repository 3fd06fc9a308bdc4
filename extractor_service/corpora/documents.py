"""Documents of a corpus as the packer reads them."""

from __future__ import annotations

from extractor_service.corpora.reader import DocumentReader
from extractor_service.corpora.tokenizer import Tokenizer
from extractor_service.packing import Int32Array


class TokenizedDocuments:
    """Tokenizes a corpus as it is read, or passes its token ids through; not for several threads at once."""

    def __init__(self, reader: DocumentReader, tokenizer: Tokenizer) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int, /) -> Int32Array:
        raise NotImplementedError
