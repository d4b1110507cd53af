"""Turns files and chats into batches of tokens, and hashes batches.

    from tg_tinker.data import read_rows, to_batch
    tc.forward_backward(to_batch(tc.tokenizer, read_rows("chats.jsonl")))

- batch.py: the accepted forms of a batch, and the normalized form that all other code uses.
- chat.py: chats and pairs as token ids and labels, by the model's chat template.
- template.py: a chat as text, and where its answers begin and end.
- rows.py: rows of JSONL and Parquet files, split and shuffled.
- text.py: loading of the tokenizer, texts and prompts as tokens.
- decoding.py: tokens as streams of text, stop sequences, the bytes of a token.
- hashing.py: the hash of a batch.
- peft_files.py: a LoRA adapter in a directory as PEFT writes it.

The package imports value modules and `tg_tinker.storage`; it knows no cluster and no model. It
loads pyarrow and transformers when a file is read or a tokenizer is made, never on import.
"""

from tg_tinker.data.batch import IGNORED
from tg_tinker.data.chat import (
    ChatWarning,
    encode_rows,
    render_messages,
    render_prompt,
    render_row_prompt,
    split_turns,
    to_batch,
)
from tg_tinker.data.rows import (
    Encoded,
    Row,
    as_batch,
    ids_of,
    make_batches,
    read_rows,
    split_rows,
)
from tg_tinker.data.text import ChatPrompt

__all__ = [
    "IGNORED",
    "ChatPrompt",
    "ChatWarning",
    "Encoded",
    "Row",
    "as_batch",
    "encode_rows",
    "ids_of",
    "make_batches",
    "read_rows",
    "render_messages",
    "render_prompt",
    "render_row_prompt",
    "split_rows",
    "split_turns",
    "to_batch",
]
