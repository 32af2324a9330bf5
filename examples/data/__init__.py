"""The examples' data: readers of the corpora, how the small bases were pretrained, and the bases themselves."""
