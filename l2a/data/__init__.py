"""Domains and their texts: read, checked, fetched, split and tokenised.

What other folders need most is here by name; encoding.py, which imports torch, is imported itself.
"""

from l2a.data.bank import Bank, read_bank
from l2a.data.domains import load_domain
from l2a.data.examples import Bools, Domain, Doubles, Examples, Floats, Ints, TextInput, concatenate, normalised_hash

__all__ = ["Bank", "Bools", "Domain", "Doubles", "Examples", "Floats", "Ints", "TextInput"]
__all__ += ["concatenate", "load_domain", "normalised_hash", "read_bank"]
