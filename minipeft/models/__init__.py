"""The two models: the Transformer of 2017, and T5 (v1.0, v1.1, FLAN) with its Hugging Face files."""
