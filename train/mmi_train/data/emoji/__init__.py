"""Emoji with names and keywords: a set made from two packages, and the documents about it."""
