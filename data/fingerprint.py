"""What a tokenizer.json means for token ids, as one number: equal for files that differ in nothing but their layout."""

import hashlib
import struct


def tokens_of(tokenizer):
    """The different pairs (id, token) of a tokenizer.json, given as its object."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        pairs = {(number, token) for token, number in vocabulary.items()}
    else:
        pairs = {(number, piece[0]) for number, piece in enumerate(vocabulary)}
    return pairs | {(added["id"], added["content"]) for added in tokenizer.get("added_tokens") or []}


def fingerprint(tokenizer):
    """SHA-256 over tokens, merges and scores, as corank computes it of a model folder."""
    digest = hashlib.sha256()
    for number, token in sorted((number, token.encode()) for number, token in tokens_of(tokenizer)):
        digest.update(b"t %d %d %b\n" % (number, len(token), token))
    model = tokenizer["model"]
    for merge in model.get("merges") or []:
        first, second = (part.encode() for part in (merge.split(" ", 1) if isinstance(merge, str) else merge))
        digest.update(b"m %d %b %d %b\n" % (len(first), first, len(second), second))
    for _, score in model["vocab"] if isinstance(model["vocab"], list) else []:
        digest.update(b"s %b\n" % struct.pack(">d", score).hex().encode())
    return digest.hexdigest()
