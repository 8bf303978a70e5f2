"""A model on its device: how it is loaded and laid out, and what the device offers."""

from llm.devices import libraries
from llm.weights import checkpoint

with checkpoint.read_ahead():
    libraries.load()
