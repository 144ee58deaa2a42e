"""The digest by which tokens, tokenizers and what they are made of are told apart."""

import hashlib


def text_digest(text: str) -> str:
    """Hex digest of a text, 128 bits: part of file names and of what stands in files, so it stays what it is.

    >>> text_digest("ring")
    '7ea2aa69f5d2d29fff7030a894952376'
    """
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
