"""Requests, and the tensors of each step."""
