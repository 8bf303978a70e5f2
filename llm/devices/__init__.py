"""A model on its device: how it is loaded and laid out, and what the device offers."""

from llm.devices import libraries

libraries.load()
