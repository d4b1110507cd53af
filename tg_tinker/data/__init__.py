"""Training data: from files and chats to batches of tokens, and what a batch hashes to.

    from tg_tinker.data import read_rows, to_batch
    tc.forward_backward(to_batch(tc.tokenizer, read_rows("chats.jsonl")))

- batch.py: what a batch may be, and the one form that everything else works with.
- chat.py: chats and pairs into token ids and labels, by the model's chat template.
- rows.py: rows of JSONL and Parquet files, split and shuffled.
- text.py: the door to the tokenizer, prompts, stop sequences, streams of text.
- hashing.py: the hash of a batch.
- peft_files.py: a LoRA adapter in a directory as PEFT writes it.

It imports values and `tg_tinker.storage` and knows no cluster and no model. pyarrow and
transformers are loaded when a file is read or a tokenizer is made, never on import.
"""

from tg_tinker.data.batch import IGNORED
from tg_tinker.data.chat import encode_rows, render_prompt, render_row_prompt, to_batch
from tg_tinker.data.rows import Encoded, Row, as_batch, make_batches, read_rows, split_rows

__all__ = [
    "IGNORED",
    "Encoded",
    "Row",
    "as_batch",
    "encode_rows",
    "make_batches",
    "read_rows",
    "render_prompt",
    "render_row_prompt",
    "split_rows",
    "to_batch",
]
