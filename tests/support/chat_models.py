"""Makes tokenizers of five kinds, and chat templates of twenty families as documented."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

CORPUS = [
    "Where is the spare key? It is behind the boiler, on the second hook.",
    "user assistant system User: Assistant: USER: ASSISTANT: ### Instruction:\n\nResponse:\n\n",
    "def f(x):\n    return x + 1\n\n\nclass A:\n        pass\n",
    "Thanks a lot. Sure! No problem at all, the answer is 42. What else is there to do here?",
    "naïve café, 語 漢 and a 🦦 once: a b c d e f g h i j k l m n o p q r s t u v w x y z . , ? !",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
]


@dataclass(frozen=True)
class Family:
    """A chat template.

    Attributes:
        controls: its control tokens.
        eos: the end of text of its tokenizer.
        bos: the token that its tokenizer puts before plain texts, or None.
        system: whether it takes a system message.
        rewrites: whether it changes earlier turns, so that not all answers can be learned.
        unlike: whether it requests an answer by text that it does not write before one.
        appended: whether an end of turn has to be added after the last answer.
        bare: whether earlier answers end by another token than the last one, which ends none.
        prefix: what the template writes at the beginning of an answer that is learned.
    """

    template: str
    controls: tuple[str, ...]
    eos: str
    bos: str | None = None
    system: bool = True
    rewrites: bool = False
    unlike: bool = False
    appended: bool = False
    bare: bool = False
    prefix: str = ""


def _turns(user: str, assistant: str, system: str = "", request: str = "", before: str = "") -> str:
    """Returns a template that writes each message by its role; @ is the content."""
    cases = [("user", user), ("assistant", assistant)] + ([("system", system)] if system else [])
    refused = (
        "" if system else "{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    )
    body = "".join(
        f"{{% if m['role'] == '{role}' %}}{{{{ {form} }}}}{{% endif %}}" for role, form in cases
    ).replace("@", "m['content']")
    asked = f"{{% if add_generation_prompt %}}{{{{ {request} }}}}{{% endif %}}" if request else ""
    return f"{before}{{% for m in messages %}}{refused}{body}{{% endfor %}}{asked}"


BOS = "{{ bos_token }}"
IM = ("<|im_start|>", "<|im_end|>")
_IM = "'<|im_start|>{0}\n' + @ + '<|im_end|>\n'"
_L3 = "'<|start_header_id|>{0}<|end_header_id|>\n\n' + @ | trim + '<|eot_id|>'"
_PHI = "'<|{0}|>\n' + @ + '<|end|>\n'"
_CR = "'<|START_OF_TURN_TOKEN|><|{0}_TOKEN|>' + @ + '<|END_OF_TURN_TOKEN|>'"
_GR = "'<|start_of_role|>{0}<|end_of_role|>' + @ + '<|end_of_text|>\n'"
_DS = "'<think>' not in @ and @ or @.split('</think>')[-1]"

FAMILIES = {
    "chatml": Family(
        _turns(_IM.format("user"), _IM.format("assistant"), _IM.format("system"),
               "'<|im_start|>assistant\n'"), IM, "<|im_end|>",
    ),
    "chatml with another eos": Family(
        _turns(_IM.format("user"), _IM.format("assistant"), _IM.format("system"),
               "'<|im_start|>assistant\n'"), (*IM, "<|endoftext|>"), "<|endoftext|>",
    ),
    "chatml without a request": Family(
        _turns(_IM.format("user"), _IM.format("assistant"), _IM.format("system")), IM, "<|im_end|>",
    ),
    "llama 2": Family(
        _turns("bos_token + '[INST] ' + @ | trim + ' [/INST]'", "' ' + @ | trim + ' ' + eos_token"),
        ("<s>", "</s>"), "</s>", "<s>", system=False,
    ),
    "llama 3": Family(
        _turns(_L3.format("user"), _L3.format("assistant"), _L3.format("system"),
               "'<|start_header_id|>assistant<|end_header_id|>\n\n'", BOS),
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eot_id|>"), "<|end_of_text|>", "<|begin_of_text|>",
    ),
    "mistral": Family(
        _turns("'[INST] ' + @ + ' [/INST]'", "' ' + @ + eos_token", before=BOS),
        ("<s>", "</s>"), "</s>", "<s>", system=False,
    ),
    "mistral with control tokens": Family(
        _turns("'[INST]' + @ + '[/INST]'", "@ + eos_token", "'[SYSTEM_PROMPT]' + @ +"
               " '[/SYSTEM_PROMPT]'", before=BOS),
        ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "</s>", "<s>",
    ),
    "gemma": Family(
        _turns("'<start_of_turn>user\n' + @ | trim + '<end_of_turn>\n'",
               "'<start_of_turn>model\n' + @ | trim + '<end_of_turn>\n'", "",
               "'<start_of_turn>model\n'", BOS),
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>", system=False,
    ),
    "phi 3": Family(
        _turns(_PHI.format("user"), _PHI.format("assistant"), _PHI.format("system"),
               "'<|assistant|>\n'"),
        ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|endoftext|>", "<s>",
    ),
    "zephyr": Family(
        _turns("'<|user|>\n' + @ + eos_token + '\n'", "'<|assistant|>\n' + @ + eos_token + '\n'",
               "'<|system|>\n' + @ + eos_token + '\n'", "'<|assistant|>\n'"),
        ("<s>", "</s>"), "</s>", "<s>",
    ),
    "vicuna": Family(
        _turns("'USER: ' + @ + ' '", "'ASSISTANT: ' + @ + eos_token", "@ + ' '", "'ASSISTANT:'"),
        ("<s>", "</s>"), "</s>", "<s>",
    ),
    "vicuna without a request": Family(
        _turns("'USER: ' + @ + ' '", "'ASSISTANT: ' + @ + eos_token", "@ + ' '"),
        ("<s>", "</s>"), "</s>", "<s>",
    ),
    "roles as words": Family(
        _turns("'User: ' + @ + '\n'", "'Assistant: ' + @ + '\n'", "@ + '\n\n'", "'Assistant: '"),
        ("<|endoftext|>",), "<|endoftext|>", appended=True,
    ),
    "alpaca": Family(
        _turns("'### Instruction:\n' + @ + '\n\n'", "'### Response:\n' + @ + eos_token + '\n\n'",
               "@ + '\n\n'", "'### Response:\n'"), ("</s>",), "</s>",
    ),
    "command r": Family(
        _turns(_CR.format("USER"), _CR.format("CHATBOT"), _CR.format("SYSTEM"),
               "'<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'", BOS),
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
         "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"), "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>",
    ),
    "glm 4": Family(
        _turns("'<|user|>\n' + @", "'<|assistant|>\n' + @", "'<|system|>\n' + @",
               "'<|assistant|>\n'", "[gMASK]<sop>"),
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
        "<|endoftext|>", appended=True,
    ),
    "granite": Family(
        _turns(_GR.format("user"), _GR.format("assistant"), _GR.format("system"),
               "'<|start_of_role|>assistant<|end_of_role|>'"),
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), "<|end_of_text|>",
    ),
    "openchat": Family(
        _turns("'GPT4 Correct User: ' + @ + '<|end_of_turn|>'",
               "'GPT4 Correct Assistant: ' + @ + '<|end_of_turn|>'", "",
               "'GPT4 Correct Assistant:'", BOS),
        ("<s>", "</s>", "<|end_of_turn|>"), "</s>", "<s>", system=False,
    ),
    "qwen 3": Family(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% else %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        IM, "<|im_end|>", rewrites=True, prefix="<think></think>",
    ),
    "deepseek r1": Family(
        _turns("'<|User|>' + @", f"'<|Assistant|>' + ({_DS}) + eos_token", "@",
               "'<|Assistant|><think>\n'", BOS),
        ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"), "<|end|>", "<|begin|>", unlike=True,
    ),
    "harmony": Family(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
        "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}{% else %}"
        "{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>"), "<|return|>",
        bare=True, prefix="final",
    ),
    "solar": Family(
        _turns("'### User:\n' + @ + '\n\n'", "'### Assistant:\n' + @ + eos_token + '\n\n'",
               "'### System:\n' + @ + '\n\n'", "'### Assistant:\n'", BOS),
        ("<s>", "</s>"), "</s>", "<s>",
    ),
}  # fmt: skip
"""Twenty-two families by name, over the control tokens of each."""


def _byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False),
    )
    return core


def _sentencepiece() -> Any:
    """Returns a BPE with a space before every text, and single bytes for unknown characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    words = [f"{word} " for text in CORPUS[:4] for word in text.split(" ")]
    trained.train_from_iterator(words * 3, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    vocab = {token: i for i, token in enumerate(["<unk>", *bytes_])}
    for token in sorted(state["vocab"], key=state["vocab"].get):
        if token != "\n":
            vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) for pair in state["merges"] if "\n" not in "".join(pair)]
    core = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    core.normalizer = trained.normalizer
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return core


def _wordpiece() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]"], show_progress=False
    )
    core.train_from_iterator(CORPUS * 3, trainer)
    return core


def _unigram() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(CORPUS * 3, trainer)
    return core


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level BPE": _byte_level,
    "SentencePiece BPE": _sentencepiece,
    "WordPiece": _wordpiece,
    "Unigram": _unigram,
}
UNKNOWN = {"SentencePiece BPE": "<unk>", "WordPiece": "[UNK]", "Unigram": "<unk>"}


@cache
def _core(kind: str) -> str:
    return str(KINDS[kind]().to_str())


@cache
def tokenizer(kind: str, family: str) -> Any:
    """Returns a tokenizer of a kind with the template and control tokens of a family."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

    of = FAMILIES[family]
    controls = [AddedToken(text, special=True, normalized=False) for text in of.controls]
    if kind == "slow":  # It has no offsets, and a token for each byte.
        made = ByT5Tokenizer(eos_token=of.eos, additional_special_tokens=controls, extra_ids=0)
        made.bos_token = of.bos
    else:
        core = Tokenizer.from_str(_core(kind))
        core.add_special_tokens(controls)
        if of.bos is not None:
            start = [(of.bos, core.token_to_id(of.bos))]
            core.post_processor = processors.TemplateProcessing(
                single=f"{of.bos} $A", special_tokens=start
            )
        roles = {"bos_token": of.bos, "eos_token": of.eos, "unk_token": UNKNOWN.get(kind)}
        made = PreTrainedTokenizerFast(tokenizer_object=core, **roles)
    made.chat_template = of.template
    return made
