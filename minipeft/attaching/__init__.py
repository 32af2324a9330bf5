"""The contract of a method, the moves of an attachment, its file, and the selection and report of parameters."""
