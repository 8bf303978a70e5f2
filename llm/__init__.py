"""Everything between a question and its text. Knows nothing of Cog."""
