"""Arrays that have a shape and a dtype, and no numbers. A program runs on them as it is, and its memory is counted."""
