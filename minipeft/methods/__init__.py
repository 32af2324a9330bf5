"""Methods of parameter-efficient fine-tuning, one page each; `minipeft.attaching` attaches, saves and counts them."""
