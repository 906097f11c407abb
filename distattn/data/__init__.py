"""Documents, tokenised once, packed into sequences whose order is a pure function of seed and step."""

from distattn.data.bigram import bigram_loss, bigram_unsupported
from distattn.data.cache import TokenCache, open_cache
from distattn.data.config import DataConfig
from distattn.data.packing import IGNORED_LABEL, PackedSequence, PackedStream

__all__ = [
    "IGNORED_LABEL",
    "DataConfig",
    "PackedSequence",
    "PackedStream",
    "TokenCache",
    "bigram_loss",
    "bigram_unsupported",
    "open_cache",
]
