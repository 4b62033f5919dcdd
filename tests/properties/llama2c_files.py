"""Files as llama2.c writes them."""

import struct


def tokenizer_bytes(pieces, score=lambda n: -n):
    whole = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % value for value in range(256)), *pieces]
    scored = zip(range(len(whole)), whole, strict=True)
    return struct.pack("<i", 9) + b"".join(struct.pack("<fi", score(n), len(p)) + p for n, p in scored)
