"""Requests that nobody would write, sent to a real service."""
