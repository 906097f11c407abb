"""What the `data` section of a run's configuration may say."""

from __future__ import annotations

from dataclasses import dataclass

from distattn.errors import DataError


@dataclass(frozen=True)
class DataConfig:
    """The `data.*` keys. The seed of the order is `train.seed`."""

    # "stdlib", or a directory, file or glob of text, .jsonl and .parquet
    source: str = "stdlib"
    # "bytes", or the path of a Hugging Face tokenizer.json (or of the directory that holds one)
    tokenizer: str = "bytes"
    # the field of a .jsonl line, and the column of a .parquet file, that holds the text
    text_key: str = "text"
    # tokens of a packed sequence
    seq_len: int = 8192
    # where tokens are kept; empty: distattn/tokens in the user's cache directory ($XDG_CACHE_HOME or ~/.cache)
    cache_dir: str = ""
    # share of the tokens that is held out for evaluation, in whole documents
    held_out_fraction: float = 0.01
    # held-out sequences of one evaluation; 0: all of them
    eval_sequences: int = 8

    def check(self) -> None:
        """Raise DataError, in one sentence, for a value that no source could make right."""
        if not self.source.strip():
            raise DataError("data.source is empty: give a directory, file or glob of text, .jsonl or .parquet, or 'stdlib'.")
        if not self.text_key:
            raise DataError("data.text_key is empty: name the field or column that holds the text.")
        if self.seq_len < 1:
            raise DataError(f"data.seq_len={self.seq_len} is not a length: give at least 1 token.")
        if not 0 < self.held_out_fraction <= 0.5:
            raise DataError(
                f"data.held_out_fraction={self.held_out_fraction} is out of range: give more than 0 and at most 0.5."
            )
        if self.eval_sequences < 0:
            raise DataError(f"data.eval_sequences={self.eval_sequences} is negative: give a number of sequences, or 0 for all.")
