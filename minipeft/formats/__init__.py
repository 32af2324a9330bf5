"""Other people's adapters and models: their files, read and written."""
