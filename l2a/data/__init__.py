"""Domains and their texts: read, checked, fetched, split and tokenised."""
