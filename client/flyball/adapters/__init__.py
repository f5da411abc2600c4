"""Adapters: how each training library is steered. One file per library, named after it."""
