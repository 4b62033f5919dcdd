"""Small tokenizers of every kind that public models have, built by the package ``tokenizers`` itself."""

import json

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SENTENCES = [
    "The cat sat on the mat, and the dog sat on the log.",
    "Scanning comes first; then the attention snaps: it's sudden.",
    "Ein größerer Käse kostet 12 345 Stück — ça va? 東京",
] * 3


def byte_level(beginning="<|begin_of_text|>"):
    """As Llama 3 (with a first token) or Pythia and Qwen (``beginning=None``) have it."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"] + ([beginning] if beginning else [])
    found.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    # Pythia has such runs of spaces, which are no special tokens.
    found.add_tokens(["    "])
    if beginning:
        number = found.token_to_id(beginning)
        found.post_processor = processors.TemplateProcessing(
            single=f"{beginning} $A", pair=f"{beginning} $A $B", special_tokens=[(beginning, number)]
        )
    return found


def word_piece():
    """As BERT has it."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    found.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    )
    ends = [(token, found.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return found


def metaspace(older=True):
    """As Llama 2, TinyLlama and Mistral have it: pieces, and single bytes for what no piece covers.

    ``older`` files add the first space by a normalizer, newer ones by the pre-tokenizer.
    """
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{value:02X}>" for value in range(256)]
    found = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    found.train_from_iterator(
        SENTENCES[::3], trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    )
    # Only training needs the bytes to be special tokens, and text to be cut into words.
    model = json.loads(found.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    found = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    found.add_special_tokens(special[:3])
    if older:
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", found.token_to_id("<s>"))]
    )
    return found


KINDS = {
    "llama3": byte_level(),
    "pythia": byte_level(None),
    "bert": word_piece(),
    "llama2": metaspace(),
    "mistral": metaspace(older=False),
}
